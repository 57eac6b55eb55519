"""Folders that one process has to itself. The locks are the operating system's:
they end with the process, however it ends.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

LOCK = ".in-use.lock"


class FolderInUseError(ValueError):
    """Another process works in the folder; the message says which."""


@contextmanager
def sole_use(folder: str | Path, instead: str = "give another folder") -> Iterator[None]:
    """Nobody else gets ``folder`` (made if it is missing) from `sole_use` while the block runs; who only reads it does
    not ask.

    Raises:
        FolderInUseError: another process (or thread) has it.
        OSError: nothing can be written there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK
    lock = locked(path)
    if lock is None:
        raise FolderInUseError(f"{folder} is in use by {_owner(path)}: wait until that is done, stop it, or {instead}")
    try:
        with suppress(OSError):  # where a locked file cannot be written others are not told whose it is
            since = datetime.now(UTC).isoformat(timespec="seconds")
            path.write_text(
                json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}), encoding="utf-8"
            )
        yield
    finally:
        # nobody is to read of a process that is done
        with suppress(OSError):
            path.unlink()
        lock.release()


def _owner(path: Path) -> str:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return f"process {values['pid']} on {values['host']} since {values['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # not written yet
        return "another process"


def locked(path: Path, seconds: float = 0) -> BaseFileLock | None:
    """The lock of that file, held; None if somebody else still has it after that time."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return None
    return lock
