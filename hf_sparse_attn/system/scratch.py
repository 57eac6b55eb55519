"""Temporary folders beside what is being written.
One that a killed process left is cleared by the next that writes there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock

from .exchange import finish
from .locks import locked

LOCK, SUFFIX = "lock", ".saving"
LONGEST = 100  # bytes of a name that its scratch folder's own name repeats
UNLOCKED_SECONDS = 3600  # after which a scratch folder that has no lock file is taken for abandoned
ATTEMPTS = 100


@contextmanager
def scratch_folder(place: Path, name: str) -> Iterator[Path]:
    """A new folder in ``place`` for what is to become ``name``, removed afterwards;
    what killed processes left in ``place`` goes first.
    """
    clear_leftovers(place)
    # in bytes, as file systems count names; a character that is cut in two goes
    folder, lock = _new_folder(place, name.encode()[:LONGEST].decode(errors="ignore"))
    try:
        yield folder
    finally:
        _remove(folder, lock)


def _new_folder(place: Path, name: str) -> tuple[Path, BaseFileLock]:
    for _ in range(ATTEMPTS):
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=SUFFIX, dir=place))
        lock = None
        with suppress(FileNotFoundError):  # another process came between the two calls, and took it for abandoned
            lock = locked(folder / LOCK)
        if lock is not None and (folder / LOCK).exists():
            return folder, lock
    raise OSError(f"other processes keep removing the temporary folders that are made in {place}")


def _remove(folder: Path, lock: BaseFileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()
    shutil.rmtree(folder, ignore_errors=True)  # where a file that is open cannot be removed


def clear_leftovers(place: Path) -> None:
    """Remove the scratch folders in ``place`` that dead processes of this user left;
    an exchange that one had begun is completed.
    """
    try:
        folders = [
            Path(entry.path)
            for entry in os.scandir(place)
            if entry.name.startswith(".") and entry.name.endswith(SUFFIX)
        ]
    except OSError:  # not readable
        return
    for path in folders:
        with suppress(OSError):
            if _is_own_folder(path):
                _clear(path)


def _clear(path: Path) -> None:
    if not (path / LOCK).exists():  # it is being made just now, or its process was killed between two calls
        if time.time() - path.stat().st_mtime > UNLOCKED_SECONDS:
            path.rmdir()
        return
    lock = locked(path / LOCK)
    if lock is None:
        return
    # the dead process may have been in the middle of an exchange
    try:
        finish(path)
    except OSError:  # what cannot be completed is kept
        lock.release()
        raise
    _remove(path, lock)


def _is_own_folder(path: Path) -> bool:
    return (
        path.is_dir() and not path.is_symlink() and (not hasattr(os, "geteuid") or path.stat().st_uid == os.geteuid())
    )
