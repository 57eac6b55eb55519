"""Paths and globs of local files; a match that holds no bytes to be read is refused, never passed over."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from .package_cache import SourceError

KINDS = {
    stat.S_IFIFO: "a pipe, which can be read once only: write what it gives to a file",
    stat.S_IFSOCK: "a socket, no file",
    stat.S_IFCHR: "a device, no file",
    stat.S_IFBLK: "a device, no file",
    stat.S_IFDIR: "a folder: name its files, such as FOLDER/*.log, or FOLDER/**/*.log for those of its folders, too",
}


def matching_files(pattern: str) -> list[Path]:
    """Files of a path or, failing that, of a glob, in order; ``~`` is the home folder; none if nothing matches.

    ``**`` enters every folder once, by whatever links it is reached. Folders among the matches of a glob are left out.

    Raises:
        SourceError: what is named is a folder; a match is a pipe, a device, or a link to nothing; a folder cannot be
            read.
    """
    if not os.path.lexists(pattern):
        pattern = os.path.expanduser(pattern)
    if os.path.lexists(pattern):
        return [_file(Path(pattern))]
    files = sorted(set(_matches(pattern)))
    return [_file(Path(path)) for path in files if not os.path.isdir(path)]


def _file(path: Path) -> Path:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        what = (
            "is a link to nothing, or one of a circle of links"
            if path.is_symlink()
            else f"cannot be read: {error.strerror}"
        )
        raise SourceError(f"{path} {what}; repair it, or narrow the glob") from error
    if not stat.S_ISREG(mode):
        raise SourceError(f"{path} is {KINDS.get(stat.S_IFMT(mode), 'no file')}")
    return path


def _matches(pattern: str) -> Iterator[str]:
    parts = pattern.replace(os.altsep or os.sep, os.sep).split(os.sep)
    if "**" not in parts:
        _check_access(pattern)
        yield from glob.glob(pattern)
        return
    at = parts.index("**")
    # what stands before ** may be a glob itself; what follows is looked for in every folder below
    head, tail = os.sep.join(parts[:at]) or (os.sep if at else ""), parts[at + 1 :] or ["*"]
    for start in glob.glob(head) if head else [os.curdir]:
        for folder in _folders(start):
            yield from _matches(os.path.join("" if folder == os.curdir else glob.escape(folder), *tail))


def _check_access(pattern: str) -> None:
    """``glob`` finds nothing in a folder that may not be read."""
    folder = os.path.dirname(pattern)
    if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
        raise _unreadable(folder)


def _unreadable(folder: object) -> SourceError:
    return SourceError(f"the folder {folder} cannot be read: check its permissions")


def _refuse(error: OSError) -> NoReturn:
    raise _unreadable(error.filename) from error


def _folders(start: str) -> Iterator[str]:
    """``start`` and the folders in it but for hidden ones, each once; what links lead to comes last."""
    seen, links = set(), [start]
    while links:
        for folder, names, _ in os.walk(links.pop(0), onerror=_refuse):
            # by device and inode: links may lead in a circle
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                names.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            # os.walk enters what is left in ``names``
            names[:] = sorted(name for name in names if not name.startswith("."))
            links += [path for name in names if os.path.islink(path := os.path.join(folder, name))]
            yield folder
