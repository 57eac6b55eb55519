"""Build backend of pyproject.toml: setuptools, but archives have the same bytes whenever and wherever they are made.

Times in the archives are SOURCE_DATE_EPOCH, by default the time of the last commit. Entries belong to no particular
user and are readable by all, whatever the umask was; those of an sdist are sorted.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are

EARLIEST = 315532800  # 1980-01-01: a wheel is a zip file, which knows no time before


def source_date_epoch() -> int:
    """Seconds: of the environment, else of the last commit, else of an unpacked sdist's metadata."""
    if value := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(value)
    if Path(".git").exists():
        shown = subprocess.run(["git", "log", "-1", "--format=%ct"], capture_output=True, text=True, check=False)
        if shown.returncode == 0 and shown.stdout.strip():
            return int(shown.stdout)
    metadata = Path("PKG-INFO")
    return max(EARLIEST, int(metadata.stat().st_mtime)) if metadata.exists() else EARLIEST


def build_wheel(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    """As setuptools does, at the time of `source_date_epoch`, packed anew with the modes that every file may have."""
    os.environ["SOURCE_DATE_EPOCH"] = str(source_date_epoch())
    name = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    repack_wheel(Path(wheel_directory) / name)
    return name


def build_sdist(sdist_directory: str, config_settings: dict | None = None) -> str:
    """As setuptools does, packed anew without what differs from build to build."""
    os.environ["SOURCE_DATE_EPOCH"] = str(source_date_epoch())
    name = build_meta.build_sdist(sdist_directory, config_settings)
    repack_sdist(Path(sdist_directory) / name, source_date_epoch())
    return name


def repack_wheel(path: Path) -> None:
    """Rewrite a wheel: the same entries in the same order, with mode 644."""
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            content = old.read(entry)
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            new.writestr(entry, content, zipfile.ZIP_DEFLATED)
    path.write_bytes(packed.getvalue())


def repack_sdist(path: Path, epoch: int) -> None:
    """Rewrite a ``.tar.gz``: entries by name, at the time ``epoch``, of user 0, readable by all."""
    packed = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new:
        for entry in sorted(old.getmembers(), key=lambda entry: entry.name):
            entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname, entry.pax_headers = epoch, 0, 0, "", "", {}
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            new.addfile(entry, old.extractfile(entry) if entry.isfile() else None)
    with open(path, "wb") as file, gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=epoch) as compressed:
        compressed.write(packed.getvalue())
