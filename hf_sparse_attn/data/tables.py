"""Rows of JSON, Parquet, CSV and of datasets of the Hub, as a stream of ``datasets``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hf_sparse_attn_kernels.caching import cache_folder

from ..system.files import write_atomically
from .file_check import chunks, survey
from .formats import SourceFile, changed, stamp
from .line_rows import CsvRows, column_error, json_rows
from .sources import SourceError

if TYPE_CHECKING:
    from datasets import IterableDataset


class Rows(Protocol):
    """Rows {column: value} that are taken up where a state says."""

    def __iter__(self) -> Generator[dict[str, Any]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


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
                row = self.row
                self.row += 1
                yield row, self._text(values[self.file.column], row)

    def _text(self, value: Any, row: int) -> str:
        try:
            text = value.decode() if isinstance(value, bytes) else value
            if isinstance(text, str):
                # half of a pair of surrogates, as a cut "\\ud83d\\ude00" of JSON leaves it, is no character
                text.encode()
        except UnicodeError as error:
            raise SourceError(
                f"{self.file.path}, row {row}: column {self.file.column!r} holds what is no UTF-8 ({error}); repair "
                "or remove it"
            ) from error
        if text is not None and not isinstance(text, str):
            raise SourceError(
                f"{self.file.path}, row {row}: column {self.file.column!r} holds {type(text).__name__}, not text"
            )
        return text or ""


@contextlib.contextmanager
def _named(file: SourceFile) -> Iterator[None]:
    """Errors of ``datasets`` name the file."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        causes = [str(e) for e in (error, error.__cause__) if e is not None]
        hint = (
            "check the name and the network" if file.format == "hub" else f"check that it is a whole {file.format} file"
        )
        raise SourceError(f"cannot read {file.path}: {': '.join(causes)}; {hint}") from error


def open_table(file: SourceFile) -> Rows:
    """Rows {column: value} of a table; none is given yet. Raises SourceError if there is no such column."""
    if file.format == "hub":
        from datasets import load_dataset  # heavy, and needed for datasets and Parquet only

        rows: IterableDataset = load_dataset(file.path, split=file.split, streaming=True)
        # a stream may know its columns only when a row was read
        columns = list(rows.column_names or next(iter(rows.take(1)), {}))
        if columns and file.column not in columns:
            raise column_error(file, columns)
        chosen: Rows = rows.select_columns([file.column])
        return chosen
    if file.format == "parquet":
        return _parquet(file)
    return json_rows(file) if file.format == "json" else CsvRows(file)


def _parquet(file: SourceFile) -> Rows:
    """By pyarrow, page by page: ``datasets`` holds two whole row groups in memory, and one may be as large as the file.

    One shard for each row group, so that a place in the file is found without reading what comes before it.
    """
    from datasets import IterableDataset
    from pyarrow.parquet import ParquetFile

    path = _unpacked(file) if file.compression else file.path
    with ParquetFile(path) as opened:
        columns: list[str] = opened.schema_arrow.names
        if file.column not in columns:
            raise column_error(file, columns)
        if (count := columns.count(file.column)) > 1:
            raise SourceError(f"{file.path} has {count} columns {file.column!r}: name them apart")
        groups: list[int | None] = [*range(opened.num_row_groups)] or [None]  # a stream has a shard at least
    arguments = {"path": path, "column": file.column, "groups": groups}
    return IterableDataset.from_generator(_parquet_rows, gen_kwargs=arguments)  # type: ignore[no-any-return]


def _parquet_rows(path: str, column: str, groups: list[int | None]) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    before = stamp(os.stat(path))
    # no read-ahead, which would hold a whole row group in memory
    with ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as opened:
        for batch in opened.iter_batches(
            ROWS, [group for group in groups if group is not None], [column], use_threads=False
        ):
            if stamp(os.stat(path)) != before:
                raise changed(path)
            for text in batch.column(0).to_pylist():
                yield {column: text}


def _unpacked(file: SourceFile) -> str:
    """A Parquet file is read from its end: a compressed one is unpacked into the cache once."""
    path = cache_folder() / "unpacked" / f"{survey(file).digest}.parquet"
    if not path.exists():
        write_atomically(path, lambda temporary: _write(temporary, file))
    return str(path)


def _write(path: Path, file: SourceFile) -> None:
    with path.open("wb") as out:
        for part in chunks(file):
            out.write(part)
