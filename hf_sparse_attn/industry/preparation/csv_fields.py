"""Rows of a CSV file as columns of text, each with the line that it starts in; lines that are no rows are named."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ...system.extras import needs_extra
from .csv_layout import CsvLayout
from .text_blocks import Block, TextFile, blocks

with needs_extra("industry", "data of plants"):
    import polars as pl

LONGEST = 1000  # lines of a quoted field; a quote that is not closed by then is no quote


@dataclass(frozen=True)
class BadLine:
    """A line that could not be read, and what was found."""

    line: int
    found: str
    kind: str = "bad_line"


Fields = tuple[pl.DataFrame, list[BadLine]]


def csv_rows(text: TextFile, layout: CsvLayout) -> Iterator[Fields]:
    """(columns ``0``, ``1`` … of text and ``line``; lines that are none) of each block."""
    held: list[str] = []
    held_from = 0
    for block in blocks(text):
        first = held_from if held else block.first
        lines = pl.concat([pl.Series("lines", held, dtype=pl.String), block.lines.alias("lines")])
        damaged = {at + len(held): found for at, found in block.damaged.items()}
        rows, held = _rows(Block(first, lines, damaged), layout)
        held_from = first + len(lines) - len(held)
        yield rows
    if held:  # a quote that is never closed
        rows = _lone(held_from, held, layout)
        yield rows


def _rows(block: Block, layout: CsvLayout) -> tuple[Fields, list[str]]:
    """The rows of a block, and the lines at its end that go on in the next one."""
    frame = block.lines.alias("text").to_frame().with_row_index("at")
    frame = frame.with_columns(line=pl.col("at").cast(pl.UInt64) + block.first).drop("at")
    bad = [BadLine(block.first + at, found) for at, found in block.damaged.items()]
    if block.damaged:
        frame = frame.filter(~pl.col("line").is_in([each.line for each in bad]))
    if block.first < layout.first:
        frame = frame.filter(pl.col("line") >= layout.first)
    quoted = frame["text"].str.contains('"', literal=True)
    if not quoted.any():
        return (_split(frame, layout, bad), bad), []
    frame, held = _joined(frame, layout.separator)
    quoted = frame["text"].str.contains('"', literal=True)
    parts = [_split(frame.filter(~quoted), layout, bad), _parsed(frame.filter(quoted), layout, bad)]
    rows = pl.concat([part for part in parts if part.height] or parts[:1])
    return (rows.sort("line"), bad), held


def opening_quote(separator: str) -> re.Pattern[str]:
    """What opens a quoted field: a quote within a field is a letter like others."""
    return re.compile(rf'(?:^|{re.escape(separator)})\s*"')


def _joined(frame: pl.DataFrame, separator: str) -> tuple[pl.DataFrame, list[str]]:
    """Lines of a quoted field that goes on over line ends as one row; and the lines of one that goes on further."""
    texts = frame["text"]
    odd = (texts.str.count_matches('"', literal=True) % 2 == 1).arg_true().to_list()
    opens = opening_quote(separator)
    gone: list[int] = []
    joined: dict[int, str] = {}
    start: int | None = None
    for at in odd:
        if start is not None and at - start <= LONGEST:
            joined[start] = "\n".join(texts[start : at + 1].to_list())
            gone += range(start + 1, at + 1)
            start = None
        elif opens.search(texts[at]):
            start = at
    held: list[str] = []
    if start is not None and len(texts) - start <= LONGEST:
        held = texts[start:].to_list()
        gone += range(start, len(texts))
    if joined:
        texts = texts.scatter(list(joined), list(joined.values()))
    keep = ~pl.int_range(len(texts), eager=True).is_in(gone)
    return frame.with_columns(text=texts).filter(keep), held


def _split(frame: pl.DataFrame, layout: CsvLayout, bad: list[BadLine]) -> pl.DataFrame:
    """Rows of lines without quotes."""
    fields = frame["text"].str.count_matches(layout.separator, literal=True) + 1
    fits = fields == layout.width
    if not fits.all():
        wrong = frame.with_columns(fields=fields).filter(~fits & (pl.col("text").str.strip_chars() != ""))
        found = wrong.select("line", "fields").iter_rows()
        bad += [BadLine(line, _counted(count, layout)) for line, count in found]
        frame = frame.filter(fits)
    names = [str(at) for at in range(layout.width)]
    pieces = frame["text"].str.split_exact(layout.separator, layout.width - 1).struct.rename_fields(names)
    return pieces.struct.unnest().with_columns(frame["line"])


def _counted(count: int, layout: CsvLayout) -> str:
    return f"{count} fields where the others have {layout.width}"


def _parsed(frame: pl.DataFrame, layout: CsvLayout, bad: list[BadLine]) -> pl.DataFrame:
    """Rows of lines with quotes."""
    names = [str(at) for at in range(layout.width)]
    lines, rows, kept = frame["line"].to_list(), [], []
    for line, row in zip(lines, _fields(frame["text"].to_list(), layout.separator), strict=True):
        if isinstance(row, list) and len(row) == layout.width:
            rows.append(row)
            kept.append(line)
        else:
            bad.append(BadLine(line, _counted(len(row), layout) if isinstance(row, list) else row))
    columns = list(zip(*rows, strict=True)) if rows else [()] * layout.width
    schema = dict.fromkeys(names, pl.String)
    return pl.DataFrame(dict(zip(names, columns, strict=True)), schema=schema).with_columns(
        pl.Series("line", kept, dtype=pl.UInt64)
    )


def _fields(texts: list[str], separator: str) -> list[list[str] | str]:
    """The fields of each text, or what is wrong with it."""
    try:
        rows: list[list[str] | str] = [*csv.reader(texts, delimiter=separator)]
        # one row for each text, or a quote reached over several
        if len(rows) == len(texts):
            return rows
    except csv.Error:
        pass
    rows = []
    for text in texts:
        try:
            rows.append(next(csv.reader([text], delimiter=separator), []))
        except csv.Error as error:
            rows.append(str(error))
    return rows


def _lone(first: int, lines: list[str], layout: CsvLayout) -> Fields:
    """Rows of the lines behind a quote that is never closed; the one with the quote is none."""
    bad = [BadLine(first, "a quote that is not closed")]
    frame = pl.DataFrame(
        {"text": lines[1:], "line": range(first + 1, first + len(lines))}, schema={"text": pl.String, "line": pl.UInt64}
    )
    frame = frame.filter(pl.col("text").str.strip_chars() != "")
    return _split(frame, layout, bad), bad
