"""Rows of JSON, Parquet, CSV and of datasets of the Hub, as a stream of ``datasets``."""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import io
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sparse_attn_kernels.caching import cache_folder

from ..files import write_atomically
from .formats import SourceFile, identity
from .sources import SourceError
from .survey import chunks, survey

if TYPE_CHECKING:
    from datasets import IterableDataset

ROWS = 1000  # of a Parquet file, read at a time


class TableRows:
    """(row, text) of a table, rows counted from 0; a missing text reads as an empty one.

    Args:
        file: a table (``file.is_table``).
        state: what ``state()`` returned when the last row before these was read.

    Raises:
        SourceError: the file cannot be read or has no such column; while iterating, a row cannot be read or is no text.
    """

    def __init__(self, file: SourceFile, state: dict[str, Any] | None = None) -> None:
        self.file, self.row = file, state["row"] if state else 0
        with _named(file):
            self.rows = open_table(file)
        if state:
            self.rows.load_state_dict(state["rows"])

    def state(self) -> dict[str, Any]:
        return {"row": self.row, "rows": self.rows.state_dict()}

    def __iter__(self) -> Generator[tuple[int, str]]:
        with _named(self.file), contextlib.closing(iter(self.rows)) as rows:
            for values in rows:
                text, row = values[self.file.column], self.row
                if text is not None and not isinstance(text, str):
                    raise SourceError(f"{self.file.path}, row {row}: column {self.file.column!r} holds {type(text).__name__}, not text")
                self.row += 1
                yield row, text or ""


@contextlib.contextmanager
def _named(file: SourceFile) -> Iterator[None]:
    """Errors of ``datasets`` name the file."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        causes = [str(e) for e in (error, error.__cause__) if e is not None]
        hint = "check the name and the network" if file.format == "hub" else f"check that it is a whole {file.format} file"
        raise SourceError(f"cannot read {file.path}: {': '.join(causes)}; {hint}") from error


def open_table(file: SourceFile) -> IterableDataset:
    """The text column of a table as a stream; no row is read yet. Raises SourceError if there is no such column."""
    if file.format == "hub":
        from datasets import load_dataset  # heavy, and needed for tables only

        rows = load_dataset(file.path, split=file.split, streaming=True)
        _check_column(file, _columns(rows))
        return rows.select_columns([file.column])
    if file.format == "parquet":
        return _parquet(file)
    return _json(file) if file.format == "json" else _csv(file)


def _columns(rows: IterableDataset) -> list[str]:
    if rows.column_names is not None:
        return list(rows.column_names)
    return list(next(iter(rows.take(1)), {}))


def _check_column(file: SourceFile, columns: list[str]) -> None:
    if columns and file.column not in columns:
        raise SourceError(f"{file.path} has no column {file.column!r} but {', '.join(columns)}: write {file.path}#COLUMN")


def _load(form: str, path: str, **options: Any) -> IterableDataset:
    from datasets import load_dataset

    return load_dataset(form, data_files=glob.escape(path), split="train", streaming=True, **options)


def _json(file: SourceFile) -> IterableDataset:
    rows = _load("json", file.path, encoding=survey(file).encoding)
    _check_column(file, _columns(rows))
    return rows.select_columns([file.column])


def _csv(file: SourceFile) -> IterableDataset:
    """Every text as it stands (``NA`` is two letters, ``007`` three); a row with more or fewer fields than the header is refused."""
    from datasets import IterableDataset

    encoding = survey(file).encoding
    with _csv_lines(file, encoding) as lines:
        _check_column(file, next(lines, []))
    return IterableDataset.from_generator(_csv_rows, gen_kwargs={"file": file, "encoding": encoding})


@contextlib.contextmanager
def _csv_lines(file: SourceFile, encoding: str) -> Iterator[Any]:
    import fsspec

    csv.field_size_limit(sys.maxsize)
    with (
        fsspec.open(file.path, "rb", compression=file.compression) as raw,
        io.TextIOWrapper(raw, "utf-8-sig" if encoding == "utf-8" else encoding, newline="") as text,
    ):
        yield csv.reader(text, delimiter="\t" if file.format == "tsv" else ",", strict=True)


def _csv_rows(file: SourceFile, encoding: str) -> Iterator[dict[str, str]]:
    with _csv_lines(file, encoding) as lines:
        header: list[str] = next(lines, [])
        at = header.index(file.column)
        for row in lines:
            if row and len(row) != len(header):
                raise SourceError(
                    f"{file.path}, line {lines.line_num}: {len(row)} fields where the header has {len(header)}: "
                    "quote the texts that hold a separator or a line end"
                )
            if row:
                yield {file.column: row[at]}


def _parquet(file: SourceFile) -> IterableDataset:
    """By pyarrow, page by page: ``datasets`` holds two whole row groups in memory, and one may be as large as the file.

    One shard for each row group, so that a place in the file is found without reading what comes before it.
    """
    from datasets import IterableDataset
    from pyarrow.parquet import ParquetFile

    path = _unpacked(file) if file.compression else file.path
    with ParquetFile(path) as opened:
        _check_column(file, opened.schema_arrow.names)
        groups: list[int | None] = [*range(opened.num_row_groups)] or [None]  # a stream has a shard at least
    return IterableDataset.from_generator(_parquet_rows, gen_kwargs={"path": path, "column": file.column, "groups": groups})


def _parquet_rows(path: str, column: str, groups: list[int | None]) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as opened:
        for batch in opened.iter_batches(ROWS, [group for group in groups if group is not None], [column], use_threads=False):
            for text in batch.column(0).to_pylist():
                yield {column: text}


def _unpacked(file: SourceFile) -> str:
    """A Parquet file is read from its end: a compressed one is unpacked into the cache once."""
    key = hashlib.sha256(repr(identity(file)).encode()).hexdigest()[:32]
    path = cache_folder() / "unpacked" / f"{key}.parquet"
    if not path.exists():
        write_atomically(path, lambda temporary: _write(temporary, file))
    return str(path)


def _write(path: Path, file: SourceFile) -> None:
    with path.open("wb") as out:
        for part in chunks(file):
            out.write(part)
