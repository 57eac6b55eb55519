"""CSV and Parquet files, plain, compressed or in a zip -> tables of pandas whose time stamps and names are as they
stand.
"""

from __future__ import annotations

import csv
import io
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.decoding import EncodingCheck
from ...data.file_check import CHUNK, chunks
from ...data.formats import COMPRESSIONS, SourceFile
from ...data.line_rows import SEPARATORS
from ...data.sources import SourceError, local_files, package_files

if TYPE_CHECKING:
    import pandas as pd

KINDS = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
FORMS = ".csv, .tsv, .parquet (each also .gz or .zst)"
NO_NUMBER = ("", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "-NaN", "-nan", "NULL", "null", "None", "-", "?")


def read_tables(source: str, names: Sequence[str]) -> list[tuple[str, str, pd.DataFrame]]:
    """(file, its name without ending, its rows) of each file of ``source``; columns ``names`` of CSV are read as texts.

    Raises:
        SourceError: no such file, it cannot be read, it is no table, or lacks one of ``names``.
    """
    pattern, _, member = source.partition("::")
    paths = package_files(pattern) if pattern.startswith(("pypi:", "deb:")) else local_files(pattern)
    if not paths:
        raise SourceError(
            f"source {source!r}: no such file; series are read from CSV or Parquet files, or FILE.zip::MEMBER"
        )
    return [_table(path, member, names) for path in paths]


def _table(path: Path, member: str, names: Sequence[str]) -> tuple[str, str, pd.DataFrame]:
    name = Path(member or path.name)
    compression = None if member else COMPRESSIONS.get(name.suffix.lower())
    kind = KINDS.get(Path(name.stem if compression else name).suffix.lower())
    if kind is None:
        raise SourceError(f"{path}: series are read from {FORMS}, or from such a file of a zip, named FILE.zip::MEMBER")
    shown = f"{path}::{member}" if member else str(path)
    raw = b"".join(chunks(SourceFile(str(path), kind, compression)))
    try:
        raw = _member(raw, member) if member else raw
        table = _parquet(raw) if kind == "parquet" else _csv(shown, raw, kind, names)
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"{shown} cannot be read: {error}; check that it is a whole {kind} file") from error
    for column in names:
        if column not in table.columns:
            raise SourceError(f"{shown} has no column {column!r}; columns: {', '.join(map(str, table.columns))}")
    if not len(table):
        raise SourceError(f"{shown} holds no rows: leave it out")
    return shown, name.stem, table


def _member(raw: bytes, member: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return archive.read(member)


def _parquet(raw: bytes) -> pd.DataFrame:
    import pandas as pd  # heavy, and needed for series only

    table = pd.read_parquet(io.BytesIO(raw))
    # an index with a name was a column when the file was written
    return table.reset_index() if any(name is not None for name in table.index.names) else table


def _csv(shown: str, raw: bytes, kind: str, names: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    seen = EncodingCheck(shown)
    seen.add(raw)
    encoding = seen.encoding()
    # of the header alone, which the first megabyte holds
    separator, header = _header(raw[:CHUNK].decode(encoding, "ignore").removeprefix("\ufeff"), kind, names)
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise SourceError(f"{shown} has {header.count(twice[0])} columns {twice[0]!r}: name them apart")
    if header and all(_is_number(name) for name in header):
        raise SourceError(
            f"{shown} has no line of column names, it starts with {', '.join(header[:5])}: put one before it"
        )
    # as pandas names them
    columns = [name or f"Unnamed: {at}" for at, name in enumerate(header)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", pd.errors.ParserWarning)
        table = pd.read_csv(
            io.BytesIO(raw),
            sep=separator,
            encoding="utf-8-sig" if encoding == "utf-8" else encoding,
            # pandas would take the first column for names of rows where rows are longer than the header
            index_col=False,
            dtype=dict.fromkeys(names, str),
            keep_default_na=False,
            na_values={name: NO_NUMBER for name in columns if name not in names},
            low_memory=False,
        )
    if caught:  # fields that the header has no name for are left out
        raise SourceError(
            f"{shown}: its rows have more fields than the {len(header)} of its header: name them all, or leave them out"
        )
    return table if separator == "," else _with_comma(table, names)


def _header(text: str, kind: str, names: Sequence[str]) -> tuple[str, list[str]]:
    """(separator, column names): the first separator that gives all of ``names``, or several columns."""
    columns = []
    for separator in SEPARATORS[kind]:
        header = next((row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if row), [])
        if set(names) <= set(header) and (names or len(header) > 1):
            return separator, header
        columns.append((separator, header))
    return columns[0]


def _with_comma(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Columns of numbers with a comma before the fraction, as they are written where a semicolon separates."""
    import pandas as pd

    for name in table.columns:
        values = table[name].dropna()
        if (
            name not in names
            and values.dtype.kind not in "fiub"
            and values.astype(str).str.fullmatch(r"\s*[+-]?\d*(,\d+)?([eE][+-]?\d+)?").all()
        ):
            table[name] = pd.to_numeric(table[name].str.replace(",", "."), errors="coerce")
    return table


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
