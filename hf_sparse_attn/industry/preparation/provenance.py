"""From a row of a prepared dataset to the place in its file, and back."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from ...data.formats import SourceFile, source_files
from ...system.extras import needs_extra
from ..dataset import PlantDataset
from ..errors import PlantDataError
from .csv_fields import LONGEST, opening_quote
from .json_records import is_lines
from .text_blocks import TextFile, blocks, parts_of, text_file

with needs_extra("industry", "data of plants"):
    import polars as pl

Table = Literal["readings", "events"]


@dataclass(frozen=True)
class Place:
    """Where a row came from.

    Attributes:
        file: path as it was given.
        line: from 1; of a Parquet file its row from 1.
        text: what stands there, as it was read; a record over several lines with all of them, a row of Parquet as JSON.
    """

    file: str
    line: int
    text: str


def locate(dataset: PlantDataset, asset: str, table: Table, row: int) -> Place:
    """Where a row came from.

    Args:
        dataset: opened.
        asset: one of its assets.
        table: "readings" or "events".
        row: its place in the table, from 0, as rows are stored (``in_order=False``).

    Raises:
        PlantDataError: there is no such row, or its file is gone.
    """
    frame = dataset.readings(asset, in_order=False) if table == "readings" else dataset.events(asset, in_order=False)
    found = frame.select("source", "line").slice(row, 1).collect()
    if found.is_empty() or row < 0:
        raise PlantDataError(
            f"{table} of {asset} have no row {row}",
            ["count rows from 0", "ask for rows with in_order=False", "open the dataset anew"],
            file=dataset.folder,
        )
    source, line = found.row(0)
    return places(dataset, source, [line])[0]


def places(dataset: PlantDataset, source: int, lines: list[int]) -> list[Place]:
    """Places of several lines of one file, in the order given; the file is read once."""
    entry = dataset.manifest.sources[source]
    if not Path(entry.path).is_file():
        raise PlantDataError(
            "is no longer where it was read",
            ["put it back", "call from the folder in which prep was called", "prepare the data again"],
            file=entry.path,
        )
    file = source_files([entry.path])[0]
    if entry.form.startswith("parquet"):
        texts = _parquet_texts(file, sorted({*lines}))
    else:
        notes = dataset.manifest.settings["reading"][source]
        texts = _texts(text_file(file, notes["encoding"]), sorted({*lines}), entry.form, notes["separator"])
    return [Place(entry.path, line, texts[line]) for line in lines]


def rows_of(dataset: PlantDataset, file: str, line: int) -> list[tuple[str, Table, int]]:
    """(asset, table, row from 0) of everything that came from a line of a file.

    Raises:
        PlantDataError: the dataset was not read from that file.
    """
    numbers = [at for at, source in enumerate(dataset.manifest.sources) if source.path == str(file)]
    if not numbers:
        known = ", ".join(source.path for source in dataset.manifest.sources[:5])
        raise PlantDataError(
            f"was not read from {file}",
            [f"name one of {known}", "write the path as it was given", "prepare that file, too"],
            file=dataset.folder,
        )
    here = (pl.col("source") == numbers[0]) & (pl.col("line") == line)
    found: list[tuple[str, Table, int]] = []
    for asset in dataset.manifest.assets:
        for table, rows in (("readings", dataset.readings), ("events", dataset.events)):
            frame = rows(asset, in_order=False).with_row_index("row").filter(here).select("row")
            found += [(asset, table, row) for row in frame.collect()["row"].to_list()]  # type: ignore[misc]
    return found


def _texts(text: TextFile, lines: list[int], form: str, separator: str) -> dict[int, str]:
    """The records that start at these lines."""
    whole = form in ("jsonl", "otel") and not is_lines(text)
    wanted, found = iter(lines), {}
    line = next(wanted, None)
    held: list[str] = []
    for block in blocks(text):
        first = block.first - len(held)
        here = [*held, *block.lines.to_list()]
        held = []
        while line is not None and line < first + len(here):
            tail = here[line - first :]
            record = _record(tail, separator, whole)
            if record is None and len(tail) < LONGEST:  # it goes on in the next block
                held = tail
                break
            found[line] = tail[0] if record is None else record
            line = next(wanted, None)
        if line is None:
            return found
    if held:
        for start in range(len(held)):
            number = first + len(here) - len(held) + start
            if number in lines:
                found[number] = _record(held[start:], separator, whole) or held[start]
    return found


def _record(tail: list[str], separator: str, whole: bool) -> str | None:
    """The record that starts with the first of these lines; None if it goes on behind the last."""
    if whole:
        return _json_text(tail)
    if not separator or tail[0].count('"') % 2 == 0 or not opening_quote(separator).search(tail[0]):
        return tail[0]
    quotes = 0
    for count, line in enumerate(islice(tail, LONGEST), 1):
        quotes += line.count('"')
        if count > 1 and quotes % 2 == 0:
            return "\n".join(tail[:count])
    return None


def _json_text(tail: list[str]) -> str | None:
    text = "\n".join(tail)
    start = text.find("{")
    try:
        _, end = json.JSONDecoder().raw_decode(text, start)
    except ValueError:
        return None
    return text[start:end]


def _parquet_texts(file: SourceFile, rows: list[int]) -> dict[int, str]:
    found: dict[int, str] = {}
    source: Any = file.path
    if file.compression is not None:
        source = io.BytesIO(b"".join(parts_of(file)))
    before = 0
    with pq.ParquetFile(source, pre_buffer=False) as opened:
        for group in range(opened.num_row_groups):
            count = opened.metadata.row_group(group).num_rows
            here = [row for row in rows if before < row <= before + count]
            if here:
                table = opened.read_row_group(group).take([row - before - 1 for row in here])
                for row, values in zip(here, table.to_pylist(), strict=True):
                    found[row] = json.dumps(values, default=str, ensure_ascii=False)
            before += count
    return found
