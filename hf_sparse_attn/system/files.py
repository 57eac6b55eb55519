"""Writing files so that a kill or a full disk never costs what was there before."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .exchange import NEW, PLAN, exchange, keep_mode, sync, sync_folder
from .outputs import (
    IN_PLACE,
    OutputError,
    check_folder,
    dangling,
    destination,
    is_stream,
    open_stream,
    refuse_read_only,
)
from .scratch import SUFFIX, clear_leftovers, scratch_folder


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path on the same disk, then rename it to ``path``; on failure ``path`` stays as
    it was.

    A file that is replaced passes its mode on, a new one has that of the umask. Where ``path`` is a link the file that
    it leads to is written. What is no file (a pipe, /dev/stdout) gets the bytes; so does a file that can be written but
    not replaced (mounted by itself, or in a folder that is not writable), which a kill in that moment leaves half
    written.

    Raises:
        OutputError: ``path`` is a folder, or a link in a circle.
        OSError: it cannot be written.
    """
    target = destination(path)
    with ExitStack() as stack:
        # a stream knows no rename: the whole is written elsewhere, then copied
        if is_stream(target):
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            refuse_read_only(target)
            scratch = _scratch_for_file(target, stack)
        temporary = scratch / target.name
        temporary.touch()
        write(temporary)
        if is_stream(target):
            with temporary.open("rb") as source, open_stream(target) as out:
                shutil.copyfileobj(source, out)
            return
        # content before name: after a crash the name never stands for a part
        sync(temporary)
        keep_mode(temporary, target)
        try:
            temporary.replace(target)
        except OSError as error:
            if error.errno not in IN_PLACE or not target.is_file():
                raise
            _pour(temporary, target)
        sync_folder(target.parent)


def _scratch_for_file(target: Path, stack: ExitStack) -> Path:
    try:
        return stack.enter_context(scratch_folder(target.parent, target.name))
    except OSError as error:
        if error.errno not in IN_PLACE or not target.is_file():
            raise
        return Path(stack.enter_context(tempfile.TemporaryDirectory()))


def _pour(source: Path, target: Path) -> None:
    # the file itself is written, as a rename cannot replace what is mounted
    with source.open("rb") as new, target.open("r+b") as file:
        shutil.copyfileobj(new, file)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def write_text(path: str | Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any, *, finite: bool = True) -> None:
    """Write JSON with a final newline. With ``finite=False``, for files that only Python reads, NaN and infinity are
    kept.

    Raises:
        ValueError: a value is NaN or infinite, which JSON cannot hold; the message names its key.
    """
    if finite and (bad := not_finite(value)):
        raise ValueError(f"{path}: {'; '.join(bad[:3])}{' …' if len(bad) > 3 else ''}: JSON cannot hold that")
    write_text(path, json.dumps(value, indent=2, allow_nan=not finite) + "\n")


def not_finite(value: Any, key: str = "") -> list[str]:
    """The keys of a JSON value that are NaN or infinite, each as 'windows[3].loss is nan'."""
    if isinstance(value, float):
        return [] if math.isfinite(value) else [f"{key or 'the value'} is {value}"]
    if isinstance(value, Mapping):
        return [
            place for name, part in value.items() for place in not_finite(part, f"{key}.{name}" if key else str(name))
        ]
    if isinstance(value, list | tuple):
        return [place for at, part in enumerate(value) for place in not_finite(part, f"{key}[{at}]")]
    return []


def finite_results(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same JSON object with null in place of NaN and infinity, and their keys under ``not_finite``;
    itself if it has none.
    """
    bad = not_finite(value)
    return {**_with_nulls(value), "not_finite": bad} if bad else value


def _with_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _with_nulls(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | Path) -> Any:
    """What a JSON file holds. Raises ValueError if it is cut off or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(
            f"{path} is not a whole JSON file ({error}): it was cut off or changed; write it anew"
        ) from error


@contextmanager
def replaced_folder(target: str | Path, valid: str | None = None) -> Iterator[Path]:
    """A temporary folder whose files move into ``target`` when the block ends well; if it fails ``target`` stays as it
    was.

    Every file is complete on disk before the first one is moved. The one that makes a folder valid (``config.json``,
    ``adapter_config.json``, or ``valid``) leaves first and comes last: after a kill in between nothing loads a mix of
    old and new, and the next save there completes the move. Weight files of the same variant that the new set does not
    have (another number of shards) go. The temporary folder is beside ``target``, or in it where that is another disk
    or not writable.

    Raises:
        OSError: nothing can be written there; or a file cannot be moved, then the message says where the new files are
            kept.
    """
    folder = _folder(Path(target))
    with _scratch_for_folder(folder) as scratch:
        new = scratch / NEW
        new.mkdir()
        yield new
        try:
            exchange(scratch, folder, valid)
        except BaseException as error:
            # the scratch folder goes at the end: the new files need another place
            kept = _keep(scratch, folder)
            if not isinstance(error, OSError):
                error.add_note(f"the new files of {target} are in {kept}")
                raise
            reason = error.strerror or str(error)
            raise OSError(
                error.errno, f"{target} stays as it was ({reason}); the new files are complete in {kept}"
            ) from error


def check_folder_output(target: str | Path) -> None:
    """Find out now whether `replaced_folder` can write into ``target`` later; makes it if it is missing.

    Raises:
        OutputError: it cannot, and why.
    """
    try:
        with _scratch_for_folder(_folder(Path(target))) as scratch:
            check_folder(scratch)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OutputError(
            f"cannot write into {target}: {reason}; give another folder, or make room or permission for it"
        ) from error


def _folder(target: Path) -> Path:
    """The real path of a folder, made if it is missing."""
    if missing := dangling(target):
        raise FileNotFoundError(
            f"{missing} is a link to {os.readlink(missing)}, which is not there: make that folder, or mount its disk"
        )
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file, not a folder: give another name, or move it away")
    target.mkdir(parents=True, exist_ok=True)
    return Path(os.path.realpath(target))


@contextmanager
def _scratch_for_folder(target: Path) -> Iterator[Path]:
    clear_leftovers(target)
    with ExitStack() as stack:
        try:
            scratch = stack.enter_context(scratch_folder(target.parent, target.name))
            # a move that is tried: a rename from one disk to another fails
            probe = scratch / "probe"
            probe.mkdir()
            moved = target / f".probe{scratch.name.removesuffix(SUFFIX)}{SUFFIX}"  # cleared like a scratch folder
            probe.rename(moved)
            moved.rmdir()
        except OSError:  # a mount point, a link to another disk, a parent that is not writable
            stack.close()
            scratch = stack.enter_context(scratch_folder(target, target.name))
        yield scratch


def _keep(scratch: Path, target: Path) -> Path:
    """Where what was not moved is kept for good."""
    kept = scratch.parent / f"{target.name}.unsaved-{secrets.token_hex(4)}"
    # the plan is there still: not all could be moved back
    (scratch if (scratch / PLAN).exists() else scratch / NEW).rename(kept)
    return kept


def copied_folder(source: Path, target: Path) -> None:
    """Copy the files of ``source`` into ``target`` as `replaced_folder` does."""
    with replaced_folder(target) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
