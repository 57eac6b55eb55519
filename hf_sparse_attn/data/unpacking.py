"""Unpacking the archive of a package: plain files, inside of one folder, up to a size. What they hold is never run."""

from __future__ import annotations

import gzip
import logging
import lzma
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

MOST_BYTES = 16 << 30
MOST_FILES = 200_000
MOST_AT_ONCE = 16 << 20  # bytes of a header, which tarfile reads in one piece
WINDOWS_SIGNS = re.compile(r'[:*?"<>|]')
Open = Callable[[], IO[bytes] | None]


class ArchiveError(ValueError):
    """An archive that is damaged, too large, or would write outside of its folder."""


def unpack(archive: Path, into: Path) -> None:
    """Write the files of a wheel, ``.zip`` or ``.tar.gz`` below ``into``; links and devices are left out, which is
    logged.

    Raises:
        ArchiveError: it cannot be read, a name leads out of ``into``, or it holds more than 200,000 files or 16 GB.
    """
    size = count = 0
    members = _of_zip if archive.suffix in (".whl", ".zip") else _of_tar
    with _readable(archive):
        for name, length, opened in members(archive):
            size, count = size + length, count + 1
            # by the headers, before a byte of it is written
            if size > MOST_BYTES or count > MOST_FILES:
                raise ArchiveError(
                    f"{archive.name} holds more than {MOST_FILES} files or {MOST_BYTES >> 30} GB: it is not unpacked"
                )
            target = into.joinpath(*_parts(archive.name, name))
            target.parent.mkdir(parents=True, exist_ok=True)
            source = opened()
            if source is not None:
                with source, target.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)


@contextmanager
def _readable(archive: Path) -> Iterator[None]:
    try:
        yield
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        lzma.LZMAError,
        gzip.BadGzipFile,
        EOFError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise ArchiveError(f"{archive.name} cannot be unpacked: {error}") from error


def _of_zip(archive: Path) -> Iterator[tuple[str, int, Open]]:
    """(name, bytes, what opens it) of all files; a file never gives more bytes than it is said to have."""
    with zipfile.ZipFile(archive) as packed:
        for member in packed.infolist():
            if not member.is_dir():
                yield member.filename, member.file_size, lambda member=member: packed.open(member)  # type: ignore[misc]


def _tar(plain: gzip.GzipFile) -> tarfile.TarFile:
    pieces: Any = _Pieces(plain)
    return tarfile.open(fileobj=pieces, mode="r:")


def _of_tar(archive: Path) -> Iterator[tuple[str, int, Open]]:
    left_out = 0
    with gzip.open(archive) as plain, _tar(plain) as packed:
        for seen, member in enumerate(packed):
            if seen > MOST_FILES:
                raise ArchiveError(
                    f"{archive.name} holds more than {MOST_FILES} files, folders and links: it is not unpacked"
                )
            if member.isreg():
                yield member.name, member.size, lambda member=member: packed.extractfile(member)  # type: ignore[misc]
            elif not member.isdir():
                left_out += 1
    if left_out:
        logger.info("%s: %d links and devices are left out", archive.name, left_out)


class _Pieces:
    """A file of which nobody reads much at once: a header may say that it has gigabytes."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MOST_AT_ONCE:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)


def _parts(archive: str, name: str) -> list[str]:
    """The parts of a name that stays inside of its folder on any system. Raises ArchiveError for others."""
    # both formats separate folders by / on any system
    parts = [part for part in name.split("/") if part not in ("", ".")]
    odd = "\\" in name or "\0" in name or (os.name == "nt" and WINDOWS_SIGNS.search(name))
    if odd or not parts or ".." in parts or name.startswith("/"):
        raise ArchiveError(f"{archive} holds the file {name!r}, whose name leads out of its folder: it is not unpacked")
    return parts
