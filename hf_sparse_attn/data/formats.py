"""Sources -> files to read: format, compression and text column are told by the name.

``logs/*.log.zst`` is compressed text, ``rows.jsonl#message`` a table whose column ``message`` holds the texts (``text``
unless told), ``notes`` (no known extension) text. One text file is one document, and so is each row of a table.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hf_sparse_attn_kernels.caching import cache_folder

from .package_cache import SourceError
from .sources import FORMS, local_files, package_files

TEXT_COLUMN = "text"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TABLES = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "tsv"}
TEXTS = {**dict.fromkeys((".txt", ".log", ".md", ".rst"), "text"), **dict.fromkeys((".html", ".htm"), "html")}
FORMATS = ", ".join((*TEXTS, *TABLES)) + " (each also .gz or .zst)"


@dataclass(frozen=True)
class SourceFile:
    """One file, or one split of a dataset, to read documents from."""

    path: str  # for a dataset: what ``load_dataset`` takes
    format: str  # "text", "html", "json", "parquet", "csv", "tsv" or "hub"
    compression: str | None = None  # "gzip" or "zstd"
    column: str = TEXT_COLUMN  # of tables
    split: str | None = None  # of a dataset

    @property
    def is_table(self) -> bool:
        return self.format not in ("text", "html")

    @property
    def size(self) -> int:
        """Bytes on disk; 0 for a dataset, which is not known."""
        return 0 if self.format == "hub" else Path(self.path).stat().st_size


def source_files(sources: Sequence[str]) -> list[SourceFile]:
    """The files of all sources in order, a file that a glob reaches by several links once; nothing is read yet.

    Raises:
        SourceError: a source is incomplete, matches nothing, names a column of a text file, or two sources have a file
            in common.
    """
    if not sources:
        raise SourceError(f"no source of texts is given; forms: {FORMS}, or a table such as rows.jsonl#COLUMN")
    files = [file for source in sources for file in _files(source)]
    counts = Counter(
        file if file.format == "hub" else replace(file, path=str(Path(file.path).resolve())) for file in files
    )
    if twice := [file.path for file, count in counts.items() if count > 1]:
        raise SourceError(f"{', '.join(twice[:3])} would be read twice; narrow the globs")
    return files


def _files(source: str) -> list[SourceFile]:
    if source.startswith("hub:"):
        parts = source.split(":")
        if len(parts) != 4 or not all(parts):
            raise SourceError(f"source {source!r} is incomplete; forms: {FORMS}")
        return [SourceFile(parts[1], "hub", column=parts[3], split=parts[2])]
    pattern, column = _split_column(source)
    paths = package_files(pattern) if pattern.startswith(("pypi:", "deb:")) else local_files(pattern)
    if not paths:
        raise SourceError(f"source {source!r}: no such file; forms: {FORMS}")
    # folders of packages are full of links to each other
    # of several links to one file the first gives the path
    return [_file(path, column, source) for path in {path.resolve(): path for path in reversed(paths)}.values()][::-1]


def _split_column(source: str) -> tuple[str, str | None]:
    """``PATTERN#COLUMN`` in two; a ``#`` that belongs to a file's name stays there."""
    pattern, mark, column = source.rpartition("#")
    if not mark or any(os.path.lexists(name) for name in (source, os.path.expanduser(source))):
        return source, None
    if not column:
        raise SourceError(f"source {source!r} names no column after '#'")
    return pattern, column


def _file(path: Path, column: str | None, source: str) -> SourceFile:
    name = path.name.lower()
    compression = COMPRESSIONS.get(Path(name).suffix)
    # rows.jsonl.zst: the format stands before the ending of the compression
    suffix = Path(Path(name).stem if compression else name).suffix
    form = {**TEXTS, **TABLES}.get(suffix, "text")
    if column is not None and suffix not in TABLES:
        raise SourceError(f"source {source!r}: {path} is text and has no columns; tables are {', '.join(TABLES)}")
    return SourceFile(str(path), form, compression, column or TEXT_COLUMN)


def stamp(status: os.stat_result) -> list[int]:
    """What tells a changed file; unlike the time of change of its content, that of its entry (ctime) cannot be set
    back.
    """
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def changed(path: str | Path) -> SourceError:
    """The error of a file that is not the one whose reading began."""
    return SourceError(f"{path} changed while it was read: wait until it is written, or name a copy of it")


def identity(file: SourceFile) -> list[str | int]:
    """What tells a changed content without reading it: path, size, times of change and inode; of a PyPI package its
    version instead.

    For a dataset: the hash that ``datasets`` gives it, which follows the revision on the Hub or the local files.

    Raises:
        SourceError: the file cannot be found, or the dataset cannot be loaded.
    """
    common: list[str | int] = [file.format, file.compression or "", file.column if file.is_table else ""]
    if file.format == "hub":
        from datasets import load_dataset_builder  # heavy, and needed for this kind of source only

        try:
            builder = load_dataset_builder(file.path)
        except Exception as error:
            raise SourceError(f"cannot load the dataset {file.path!r}: {error}") from error
        return [*common, file.path, file.split or "", str(builder.hash), str(builder.config.create_config_id({}))]
    path, packages = Path(file.path).resolve(), (cache_folder() / "pypi").resolve()
    try:
        status = path.stat()
    except OSError as error:
        raise SourceError(
            f"cannot read {file.path}: {error.strerror or error}; check the path and its permissions"
        ) from error
    if path.is_relative_to(packages):
        return [*common, str(path.relative_to(packages)), status.st_size]
    return [*common, str(path), *stamp(status)]
