"""Where the header and the data of a CSV export stand, and how its fields are separated, told from its first lines."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .ingest_settings import IngestSettings
from .table_columns import NUMBER, WORDS, Columns, columns_of, kind_of, words_of

SEPARATORS = (";", "\t", ",", "|")
MOST = 0.8  # share of the lines behind the header that have as many fields as most
UNIT_IN_NAME = re.compile(r"^(?P<name>.*\S)\s*(?:\[(?P<unit>[^\[\]]*)\]|\((?P<other>[^()]{1,12})\))\s*$")
UNIT = re.compile(r"-|[\[(]?[-°%℃℉µμΩa-zA-Z²³/·*^0-9. ]{0,12}[\])]?|[^\W\d]{1,3}")  # a unit is short


@dataclass(frozen=True)
class CsvLayout:
    """How a CSV file is laid out."""

    separator: str
    width: int  # fields of a row
    first: int  # line of the first row of data, from 1
    names: tuple[str, ...]
    units: tuple[str | None, ...]
    decimal: str  # "." or ","
    columns: Columns


def csv_layout(lines: Sequence[str], settings: IngestSettings, file: str) -> CsvLayout | None:
    """The layout told by the first lines of a file; None if they are no table with a time.

    Raises:
        PlantDataError: they are a table, and what its columns hold is unclear.
    """
    best: tuple[float, CsvLayout] | None = None
    for separator in SEPARATORS:
        rows = _rows(lines, separator)
        widths = Counter(len(row) for _, row in rows if len(row) > 1)
        if not widths:
            continue
        width = widths.most_common(1)[0][0]
        layout = _layout(rows, separator, width, settings, file)
        if layout is None:
            continue
        behind = [row for line, row in rows if line >= layout.first]
        share = sum(len(row) == width for row in behind) / len(behind)
        if share >= MOST and (best is None or (share, width) > (best[0], best[1].width)):
            best = share, layout
    return None if best is None else best[1]


def _rows(lines: Sequence[str], separator: str) -> list[tuple[int, list[str]]]:
    """(line from 1, fields) of the rows that are not blank."""
    reader = csv.reader((line + "\n" for line in lines), delimiter=separator)
    rows: list[tuple[int, list[str]]] = []
    before = 0
    try:
        for row in reader:
            if any(field.strip() for field in row):
                rows.append((before + 1, row))
            before = reader.line_num
    except csv.Error:
        return rows
    return rows


def _layout(
    rows: list[tuple[int, list[str]]], separator: str, width: int, settings: IngestSettings, file: str
) -> CsvLayout | None:
    full = [(line, row) for line, row in rows if len(row) == width]
    start = _first_of_data(full, width)
    if start is None:
        return None
    first = full[start][0]
    names, units = _header([row for line, row in rows if line < first], width)
    body = [row for _, row in full[start:]]
    samples = [[row[at] for row in body] for at in range(width)]
    columns = columns_of(names, samples, settings, file)
    if columns is None:
        return None
    held = [*columns.values, *(at for role, at in columns.roles.items() if role == "value")]
    decimal = _decimal(separator, [text for at in held for text in samples[at]])
    return CsvLayout(separator, width, first, tuple(names), tuple(units), decimal, columns)


def _first_of_data(full: list[tuple[int, list[str]]], width: int) -> int | None:
    """Place of the first row whose fields are what they are further down."""
    # the second half of the sample stands behind any header
    half = [row for _, row in full[len(full) // 2 :]]
    kinds = [kind_of([row[at] for row in half]) for at in range(width)]
    telling = [at for at, kind in enumerate(kinds) if kind not in ("text", "empty")]
    if not telling:
        return None
    times = [at for at in telling if kinds[at] in ("stamp", "date", "clock")] or telling
    for place, (_, row) in enumerate(full):
        if any(row[at].strip() and kind_of([row[at]]) not in ("text", "empty") for at in times):
            return place
    return None


def _header(above: list[list[str]], width: int) -> tuple[list[str], list[str | None]]:
    """(names, units) from the rows above the data."""
    fitting = [row for row in above if width - 1 <= len(row) <= width]
    # rows of a preamble are mostly empty, or say a time or a number
    named = [row for row in fitting if sum(bool(field.strip()) for field in row) >= 0.5 * width]
    fitting = [row for row in named if all(kind_of([field]) in ("text", "empty") for field in row)] or fitting[-1:]
    if not fitting:
        return [f"column {at + 1}" for at in range(width)], [None] * width
    header = [field.strip() for field in fitting[-1]]
    units: list[str | None] = [None] * width
    if len(fitting) > 1 and _are_units(fitting[-1], fitting[-2]):
        header = [field.strip() for field in fitting[-2]]
        units = [field.strip().strip("[]()") or None for field in fitting[-1]]
    header += [""] * (width - len(header))
    units += [None] * (width - len(units))
    header[0] = header[0].lstrip("#").strip()
    names: list[str] = []
    for at, name in enumerate(header):
        if units[at] is None and (match := UNIT_IN_NAME.match(name)):
            name, units[at] = match["name"], (match["unit"] if match["unit"] is not None else match["other"]).strip()
        # two channels of one name stay two
        names.append(name if name not in names or not name else f"{name} ({at + 1})")
    return names, units


def _are_units(row: list[str], names: list[str]) -> bool:
    held = [field.strip() for field in row if field.strip()]
    if any(words_of(field) & WORDS["time"] for field in held):  # the names themselves
        return False
    return (
        bool(held)
        and len({*held}) <= len({*names})
        and all(UNIT.fullmatch(field) for field in held)
        and (sum(map(len, held)) / len(held) < sum(map(len, names)) / max(1, len(names)))
    )


def _decimal(separator: str, texts: Sequence[str]) -> str:
    """The mark before the fraction of numbers."""
    numbers = [text.strip() for text in texts if NUMBER.fullmatch(text.strip())]
    commas = [text for text in numbers if "," in text]
    if not commas or any("." in text and text.rfind(".") > text.rfind(",") for text in commas):
        return "."
    if any("." in text for text in commas):
        return ","
    # 1,234 alone, between commas, groups thousands; where semicolons separate, a comma is there for fractions
    thousands = all(re.fullmatch(r"[+-]?\d{1,3}(?:,\d{3})+", text) for text in commas)
    points = any("." in text for text in numbers)
    return "." if points or (thousands and separator == ",") else ","
