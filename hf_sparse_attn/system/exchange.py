"""New files in the place of old ones in a folder that is never taken for whole while it holds some of both.

What makes a folder valid (``config.json``, an index of shards) leaves it first and comes back last. Old files wait in
the scratch folder until all new ones are there: an error puts them back, and after a kill the next save completes what
was begun.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .locks import locked

NEW, OLD, PLAN = "new", "old", "exchange.json"
EXCHANGE_LOCK = ".exchange.lock"
PATIENCE = 600  # seconds for another process that exchanges files of the same folder, which takes it milliseconds
VARIANT = r"(\.(?P<variant>\w+))"
WEIGHTS = re.compile(
    rf"(?P<kind>(adapter_)?model)((-\d{{5}}-of-\d{{5}})?{VARIANT}?\.safetensors"
    r"|\.(?P<before>\w+)-\d{5}-of-\d{5}\.safetensors"
    r"|\.safetensors\.index(\.(?P<index>\w+))?\.json)"
)


def exchange(scratch: Path, target: Path, valid: str | None = None) -> None:
    """Move the files of ``scratch/new`` into ``target``; what they replace, and weight files of the same variant that
    the new set does not have, go. ``valid`` is the file that comes last, if it is not one that Transformers or PEFT
    look for.

    Raises:
        OSError: a file cannot be moved; ``target`` is as it was, and ``scratch/new`` is whole again.
    """
    new = scratch / NEW
    # in the order in which they come: what makes the folder valid is last
    files = sorted(
        (path.relative_to(new) for path in new.rglob("*") if not path.is_dir()), key=lambda file: _rank(file, valid)
    )
    # all content is on the disk before the first name moves
    for file in files:
        sync(new / file)
    for folder in (new, *(path for path in new.rglob("*") if path.is_dir())):
        sync_folder(folder)
    with _alone(target, PATIENCE):
        _refuse_obstacles(target, files)
        leaving = [file for file in files if os.path.lexists(target / file)] + _stale(target, files)
        # in the reverse order: what makes the folder valid leaves first
        leaving.sort(key=lambda file: _rank(file, valid), reverse=True)
        _write_plan(scratch, target, files, leaving)
        try:
            _move(scratch, target, files, leaving)
        except BaseException:
            _move_back(scratch, target, files, leaving)
            raise


def finish(scratch: Path) -> None:
    """Complete an exchange that a killed process was in the middle of. One that had not begun is left: the old files
    are whole.

    Raises:
        OSError: a file cannot be moved.
    """
    try:
        plan = json.loads((scratch / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no plan, or not a whole one: nothing was moved
        return
    target, files, leaving = (
        scratch.parent / plan["target"],
        [Path(f) for f in plan["files"]],
        [Path(f) for f in plan["leaving"]],
    )
    # nothing was to come, or the folder itself is gone
    if not files or not target.is_dir():
        return
    with _alone(target, 0):
        # the last file is there before the first one has left, and again where somebody else has written the folder
        # anew
        if not os.path.lexists(target / files[-1]):
            _move(scratch, target, files, leaving)


@contextmanager
def _alone(target: Path, patience: float) -> Iterator[None]:
    lock = locked(target / EXCHANGE_LOCK, patience)
    if lock is None:
        raise OSError(f"another process is exchanging files of {target} (waited {patience} s): stop it, and save again")
    try:
        yield
    finally:
        with suppress(OSError):
            (target / EXCHANGE_LOCK).unlink()
        lock.release()


def _write_plan(scratch: Path, target: Path, files: Sequence[Path], leaving: Sequence[Path]) -> None:
    # relative, so that the plan holds where the disk is mounted elsewhere
    place = os.path.relpath(target, scratch.parent)
    (scratch / OLD).mkdir()
    plan = {"target": place, "files": list(map(str, files)), "leaving": list(map(str, leaving))}
    (scratch / PLAN).write_text(json.dumps(plan), encoding="utf-8")
    sync(scratch / PLAN)
    sync_folder(scratch)


def _move(scratch: Path, target: Path, files: Sequence[Path], leaving: Sequence[Path]) -> None:
    """As far as it was not done before."""
    new, old, replaced = scratch / NEW, scratch / OLD, set(files)
    for file in leaving:
        # what is not in ``new`` was moved before a kill: the file of that name is the new one, and stays
        waits = os.path.lexists(new / file) if file in replaced else True
        if waits and os.path.lexists(target / file) and not os.path.lexists(old / file):
            (old / file).parent.mkdir(parents=True, exist_ok=True)
            (target / file).replace(old / file)
    # the disk, too, has an invalid folder before the first new file comes
    sync_folder(target)
    for file in files:
        if os.path.lexists(new / file):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            # what left has the mode that the new file is to have
            keep_mode(new / file, old / file)
            if file == files[-1]:
                sync_folder(target)  # all others are there for good
            (new / file).replace(target / file)
    sync_folder(target)


def _move_back(scratch: Path, target: Path, files: Sequence[Path], leaving: Sequence[Path]) -> None:
    new, old = scratch / NEW, scratch / OLD
    for file in reversed(files):
        if not os.path.lexists(new / file):
            (target / file).replace(new / file)
    # in reverse, so that what makes the folder valid is back last
    for file in reversed(leaving):
        if os.path.lexists(old / file):
            (old / file).replace(target / file)
    # without a plan nothing is there to be completed
    (scratch / PLAN).unlink()


def _rank(file: Path, valid: str | None) -> int:
    """The order in which files come: weights, settings, the index of shards, what makes the folder a model's or an
    adapter's.
    """
    name = str(file)
    last = (valid, "config.json", "adapter_config.json")
    if name in last:
        return 9 - last.index(name)
    if ".index." in name and WEIGHTS.fullmatch(name):
        return 6
    return 5 if name.endswith("config.json") else 0


def _refuse_obstacles(target: Path, files: Sequence[Path]) -> None:
    for file in files:
        if (target / file).is_dir() and not (target / file).is_symlink():
            raise IsADirectoryError(
                errno.EISDIR, f"{target / file} is a folder, where a file of that name is to be: move it away"
            )
        if (target / file).is_file():
            # raises for one that may not be changed, although its folder lets it be replaced
            (target / file).open("r+b").close()
        for folder in list(file.parents)[:-1]:
            if os.path.lexists(target / folder) and not (target / folder).is_dir():
                raise NotADirectoryError(
                    errno.ENOTDIR, f"{target / folder} is a file, where a folder of that name is to be: move it away"
                )


def _stale(target: Path, files: Sequence[Path]) -> list[Path]:
    """Weight files of variants that the new set has, but with other names (another number of shards)."""
    variants, known = {_variant(str(file)) for file in files} - {None}, set(files)
    present = [Path(path.name) for path in target.iterdir() if _variant(path.name) in variants]
    return [file for file in present if file not in known]


def _variant(name: str) -> tuple[str, str] | None:
    """(model or adapter, variant) of a weight file's name, None for any other file."""
    match = WEIGHTS.fullmatch(name)
    return None if match is None else (match["kind"], match["variant"] or match["before"] or match["index"] or "")


def keep_mode(new: Path, old: Path) -> None:
    """Give ``new`` the mode of ``old``, and its owner where that is allowed, if there is one."""
    try:
        known = old.stat()
    except OSError:
        return
    status = new.stat()
    if (status.st_uid, status.st_gid) != (known.st_uid, known.st_gid):
        with suppress(OSError):
            os.chown(new, known.st_uid, known.st_gid)
    # setuid and setgid are not handed on
    new.chmod(stat.S_IMODE(known.st_mode) & 0o777)


def sync(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system knows such a thing."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
