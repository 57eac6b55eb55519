"""One file of any form -> chunks of one of three kinds: wide tables, long tables, events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from ...data.formats import SourceFile
from ...system.extras import needs_extra
from ..errors import PlantDataError
from .csv_fields import BadLine, csv_rows
from .csv_layout import csv_layout
from .ingest_settings import Form, IngestSettings
from .json_records import flat, flat_rows, is_otel, otel_rows, records
from .log_lines import log_form, log_rows
from .parquet_rows import parquet_names, parquet_rows
from .table_columns import WAYS, Columns, columns_of
from .text_blocks import TextFile, blocks, parts_of, text_file

with needs_extra("industry", "data of plants"):
    import polars as pl

SAMPLE = 1000  # lines, or records, that tell a form
Chunk = tuple[pl.DataFrame, list[BadLine]]
EVENTS = ("origin", "level", "text", "template", "label")
NEITHER = [
    "name the form: --form csv-wide, csv-long, csv-events, jsonl, otel or text",
    "name the column of the time: --column time=NAME",
    "say how it is encoded: --encoding cp932",
]


@dataclass
class OpenedFile:
    """A file whose form is known.

    ``chunks`` gives frames with ``stamp``, ``line`` and, where rows name it, ``asset``, and lines that are none.
    Beside these: wide, a column for each of ``names`` by its number; long, ``channel``, ``value`` and ``unit``;
    events, those of EVENTS.
    """

    file: SourceFile
    form: Form
    kind: Literal["wide", "long", "events"]
    chunks: Callable[[], Iterator[Chunk]]
    names: list[str]
    units: list[str | None]
    decimal: str = "."
    by_asset: bool = False  # rows name their machine
    separator: str = ""  # of CSV
    text: TextFile | None = None  # None of Parquet


def opened(file: SourceFile, settings: IngestSettings, scratch: Path) -> OpenedFile:
    """Open a file, its form told from its content unless the settings name it.

    Args:
        scratch: folder for a compressed Parquet file, unpacked.

    Raises:
        PlantDataError: it cannot be read, or its form is unclear.
    """
    head = next(parts_of(file), b"")
    if head.startswith(b"PAR1"):
        return _parquet(file, settings, scratch)
    text = text_file(file, settings.encoding)
    lines: list[str] = []
    for block in blocks(text):
        lines += block.lines.head(SAMPLE - len(lines)).to_list()
        if len(lines) >= SAMPLE:
            break
    first = next((line.strip() for line in lines if line.strip()), "")
    if settings.form in ("jsonl", "otel") or (settings.form is None and first[:1] in ("{", "[") and _is_json(text)):
        return _json(text, settings)
    if settings.form != "text":
        table = _table(text, lines, settings)
        if table is not None:
            return table
    form = log_form(lines) if settings.form in (None, "text") else None
    if form is None:
        raise PlantDataError(
            f"is of no form that is known: it starts with {first[:80]!r}", NEITHER, file=file.path, line=1
        )
    return OpenedFile(file, "text", "events", lambda: log_rows(text, form), [], [], text=text)


def _is_json(text: TextFile) -> bool:
    try:
        found, _ = next(records(text))
    except PlantDataError:
        return False
    return bool(found)


def _table(text: TextFile, lines: list[str], settings: IngestSettings) -> OpenedFile | None:
    layout = csv_layout(lines, settings, text.file.path)
    if layout is None:
        return None
    columns, names = layout.columns, list(layout.names)
    if settings.form is None and not columns.form.endswith("events") and _is_log(lines, columns.has_numbers):
        return None

    def chunks() -> Iterator[Chunk]:
        for frame, bad in csv_rows(text, layout):
            yield _standard(frame, columns, len(names)), bad

    return OpenedFile(
        text.file,
        columns.form,
        _kind(columns),
        chunks,
        names,
        list(layout.units),
        decimal=layout.decimal,
        by_asset="asset" in columns.roles,
        separator=layout.separator,
        text=text,
    )


def _is_log(lines: list[str], has_numbers: bool) -> bool:
    """Whether what looks like a table is a log with separators in its texts."""
    form = log_form(lines)
    return form is not None and (not has_numbers or form.name not in ("generic", "epoch"))


def _kind(columns: Columns) -> Literal["wide", "long", "events"]:
    return "wide" if columns.form.endswith("wide") else "long" if columns.form.endswith("long") else "events"


def _standard(frame: pl.DataFrame, columns: Columns, width: int) -> pl.DataFrame:
    """The columns of a table under the names that `OpenedFile` gives them."""
    if len(columns.time) == 2:
        parts = [pl.col(str(at)).cast(pl.String).str.strip_chars() for at in columns.time]
        stamp = pl.concat_str(parts, separator=" ")
    else:
        stamp = pl.col(str(columns.time[0]))
    chosen = [stamp.alias("stamp"), pl.col("line")]
    roles = {role: str(at) for role, at in columns.roles.items() if at >= 0 and str(at) in frame.columns}
    if "asset" in roles:
        chosen.append(pl.col(roles["asset"]).cast(pl.String).str.strip_chars().alias("asset"))
    kind = _kind(columns)
    if kind == "wide":
        known = {*columns.time, *columns.roles.values()}
        # fields that came up later in JSON are channels, too
        later = [at for at in range(width, frame.width - 1) if at not in known]
        chosen += [pl.col(str(at)) for at in (*columns.values, *later)]
    elif kind == "long":
        chosen.append(pl.col(roles["channel"]).cast(pl.String).str.strip_chars().alias("channel"))
        chosen.append(pl.col(roles["value"]).alias("value"))
        if "unit" in roles:
            chosen.append(pl.col(roles["unit"]).cast(pl.String).str.strip_chars().alias("unit"))
    else:
        for name in EVENTS:
            column = pl.col(roles[name]) if name in roles else pl.lit(None)
            chosen.append(column.cast(pl.String).alias(name))
    return frame.select(chosen)


def _json(text: TextFile, settings: IngestSettings) -> OpenedFile:
    found, _ = next(records(text), ([], []))
    if settings.form == "otel" or (found and is_otel(found[0][1])):
        return OpenedFile(text.file, "otel", "events", lambda: otel_rows(text), [], [], text=text)
    sample = [dict(flat(values)) for _, values in islice(found, SAMPLE)]
    names = list(dict.fromkeys(name for values in sample for name in values))
    samples = [[values[name] or "" for values in sample if name in values] for name in names]
    columns = columns_of(names, samples, settings, text.file.path)
    if columns is None:
        raise PlantDataError(
            f"has no field with a time: there are {', '.join(names[:20]) or 'none'}", WAYS, file=text.file.path
        )
    width = len(names)

    def chunks() -> Iterator[Chunk]:
        for frame, bad in flat_rows(text, names):
            yield _standard(frame, columns, width), bad

    by_asset = "asset" in columns.roles
    return OpenedFile(text.file, "jsonl", _kind(columns), chunks, names, [None] * width, by_asset=by_asset, text=text)


def _parquet(file: SourceFile, settings: IngestSettings, scratch: Path) -> OpenedFile:
    path = file.path
    if file.compression is not None:  # it is read from its end
        path = str(scratch / "unpacked.parquet")
        with open(path, "wb") as out:
            for part in parts_of(file):
                out.write(part)
    names, samples = parquet_names(path)
    columns = columns_of(names, samples, settings, file.path, prefix="parquet")
    if columns is None:
        raise PlantDataError(f"has no column with a time: there are {', '.join(names[:20])}", WAYS, file=file.path)
    used = sorted({*columns.time, *columns.values, *(at for at in columns.roles.values() if at >= 0)})

    def chunks() -> Iterator[Chunk]:
        for frame, bad in parquet_rows(path, used):
            yield _standard(frame, columns, len(names)), bad

    units: list[str | None] = [None] * len(names)
    return OpenedFile(file, columns.form, _kind(columns), chunks, names, units, by_asset="asset" in columns.roles)
