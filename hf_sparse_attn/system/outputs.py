"""Where a path that a result is written to leads: a file, or something that takes a stream of bytes;
asked before the work is done.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from .scratch import scratch_folder

DESCRIPTOR = re.compile(r"/(?:dev|proc/(?P<process>\d+)(?:/task/\d+)?)/fd/(?P<number>\d+)")
MOST_LINKS = 40  # as Linux has it
PROBE_BYTES = 1 << 16
OTHERS = stat.S_IWGRP | stat.S_IWOTH
# a file may be written although its folder may not
IN_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV, errno.EBUSY)


class OutputError(OSError):
    """A path that nothing can be written to; the message says why."""


def destination(path: str | Path) -> Path:
    """The absolute path that ``path`` stands for, links followed; an open descriptor (/dev/stdout, /dev/fd/3) stays
    one.

    Raises:
        OutputError: links that lead in a circle, a folder, or something that cannot be written to.
    """
    target = Path(path)
    # link by link, so that a descriptor on the way stays one
    for _ in range(MOST_LINKS):
        folder = Path(os.path.realpath(target.parent))
        target = folder / target.name
        if DESCRIPTOR.fullmatch(str(target)) or not target.is_symlink():
            break
        target = folder / os.readlink(target)
    else:
        raise OutputError(f"cannot write {path}: its symbolic links lead in a circle")
    if (missing := dangling(Path(path))) and not target.parent.is_dir():
        raise OutputError(
            f"cannot write {path}: {missing} is a link to what is not there; make that folder, or mount its disk"
        )
    if target.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; give the name of a file in it")
    if target.is_block_device() or target.is_socket():
        raise OutputError(
            f"cannot write {path}: it is a {'disk' if target.is_block_device() else 'socket'}; give the name of a file"
        )
    return target


def dangling(path: Path) -> Path | None:
    """The part of a path that is a link to what is not there:
    nothing is made behind it, since a disk may not be mounted yet.
    """
    # the nearest part that is there, were it a link to nothing
    there = next((part for part in (path, *path.parents) if os.path.lexists(part)), None)
    return there if there is not None and there.is_symlink() and not there.exists() else None


def is_stream(target: Path) -> bool:
    """Whether a `destination` takes bytes as they come (a pipe, a terminal, /dev/null):
    it cannot be replaced by a file.
    """
    return DESCRIPTOR.fullmatch(str(target)) is not None or target.is_fifo() or target.is_char_device()


def open_stream(target: Path) -> BinaryIO:
    """Such a destination, opened; a descriptor of this process goes on where it stands."""
    descriptor = _own_descriptor(target)
    if descriptor is None:
        # what the owner of the descriptor wrote there stays
        return target.open("ab" if DESCRIPTOR.fullmatch(str(target)) else "wb", buffering=0)
    # what was printed before must come before
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # a copy: closing it leaves the process its own
    return os.fdopen(os.dup(descriptor), "wb")


def _own_descriptor(target: Path) -> int | None:
    match = DESCRIPTOR.fullmatch(str(target))
    return int(match["number"]) if match and match["process"] in (None, str(os.getpid())) else None


def check_output(path: str | Path) -> None:
    """Find out now whether a file can be written to ``path`` later. Folders that are missing are made.

    A small file is written beside it, since what modes say does not hold for root, on disks that are full or mounted to
    be read only.

    Raises:
        OutputError: it cannot, and why.
    """
    try:
        target = destination(path)
        if is_stream(target):
            _check_stream(target)
        else:
            _check_file(target)
    except OutputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OutputError(
            f"cannot write {path}: {reason}; give another path, or make room or permission for it"
        ) from error


def _check_stream(target: Path) -> None:
    descriptor = _own_descriptor(target)
    if descriptor is not None:
        os.close(os.dup(descriptor))  # raises where it is closed
    elif not os.access(target, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _check_file(target: Path) -> None:
    refuse_read_only(target)
    try:
        check_folder(target.parent)
    except OSError as error:
        if not (error.errno in IN_PLACE and target.is_file()):
            raise


def refuse_read_only(target: Path) -> None:
    """Raise OSError for a file that is there and may not be changed, although its folder would let it be replaced, or a
    name too long.
    """
    # r+b neither makes the file nor cuts it
    with suppress(FileNotFoundError), target.open("r+b"):
        pass


def check_folder(folder: Path) -> None:
    """Make ``folder`` and write a small file into it. Raises OSError where that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder, "probe") as scratch, tempfile.TemporaryFile(dir=scratch) as file:
        # bytes, as a full disk still takes an empty file
        file.write(b"\0" * PROBE_BYTES)
        file.flush()
        os.fsync(file.fileno())


def close_to_others(path: Path) -> None:
    """Let only this user change ``path``. Raises PermissionError if it is not this user's."""
    status = path.stat()
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        raise PermissionError(errno.EACCES, "it belongs to another user", str(path))
    if status.st_mode & OTHERS:
        path.chmod(stat.S_IMODE(status.st_mode) & ~OTHERS)


def is_own(path: Path) -> bool:
    """Whether ``path`` is a plain file of this user that nobody else may change."""
    status = path.lstat()
    mine = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return mine and stat.S_ISREG(status.st_mode) and (os.name == "nt" or not status.st_mode & OTHERS)
