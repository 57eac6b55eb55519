"""Chunks with times -> rows of READINGS and EVENTS, with the channels that they are of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ...system.extras import needs_extra
from ..dataset import EVENTS, READINGS, TIME
from ..errors import PlantDataError
from ..findings import Quality
from .csv_fields import BadLine
from .number_fields import numbers
from .opened_file import OpenedFile

with needs_extra("industry", "data of plants"):
    import polars as pl

MOST_CHANNELS = 65_535
EXAMPLES = 3
Rows = tuple[str, pl.DataFrame]  # asset, rows of the schema


@dataclass
class PartChannel:
    """A channel of one file."""

    asset: str
    name: str
    column: int | None
    unit: str | None
    readings: int = 0
    empty: int = 0  # fields of a wide table in which nothing stands
    no_number: int = 0
    no_number_lines: tuple[int, int] | None = None
    examples: list[str] = field(default_factory=list)
    units: dict[str, int] = field(default_factory=dict)  # as a long table names them: first line

    def note(self, lines: pl.Series, fields: pl.Series, wrong: pl.Series) -> None:
        """Count the fields that hold no number."""
        if not wrong.any():
            return
        places = lines.filter(wrong)
        first, last = int(places.min()), int(places.max())  # type: ignore[arg-type]
        before = self.no_number_lines or (first, last)
        self.no_number_lines = min(before[0], first), max(before[1], last)
        self.no_number += len(places)
        for text in fields.filter(wrong).cast(pl.String).fill_null("").head(EXAMPLES * 10).to_list():
            if text not in self.examples and len(self.examples) < EXAMPLES:
                self.examples.append(text[:40])


class RowTables:
    """Turns the chunks of one file into rows; numbers its channels as they come up.

    Args:
        opened: the file.
        asset: of rows that name none.
    """

    def __init__(self, opened: OpenedFile, asset: str) -> None:
        self.opened, self.asset = opened, asset
        self.channels: list[PartChannel] = []
        self._numbers: dict[tuple[str, str], int] = {}

    def channel(self, asset: str, name: str, column: int | None = None, unit: str | None = None) -> int:
        """Number of a channel in this file. Raises PlantDataError beyond 65,535 of them."""
        key = (asset, name)
        if key not in self._numbers:
            if len(self.channels) >= MOST_CHANNELS:
                raise PlantDataError(
                    f"has more than {MOST_CHANNELS} channels, the last one {name!r}",
                    ["name the column of the tag: --column channel=NAME", "split the file", "leave it out"],
                    file=self.opened.file.path,
                )
            self._numbers[key] = len(self.channels)
            self.channels.append(PartChannel(asset, name, column, unit or None))
        return self._numbers[key]

    def streams(self, chunk: pl.DataFrame) -> pl.Series:
        """What each row's order in time is compared within: its channel, else its asset."""
        if self.opened.kind == "long":
            return chunk["number"]
        if "asset" not in chunk.columns:
            return pl.Series("stream", [0], dtype=pl.UInt32).new_from_index(0, chunk.height)
        return chunk["asset"].fill_null(self.asset)

    def numbered(self, chunk: pl.DataFrame) -> tuple[pl.DataFrame, list[BadLine]]:
        """A long chunk with the ``number`` of the channel of each row; rows that name none are bad lines."""
        if self.opened.kind != "long":
            return chunk, []
        nameless = chunk["channel"].is_null() | (chunk["channel"] == "")
        bad = [BadLine(line, "no name of a channel") for line in chunk["line"].filter(nameless).to_list()]
        chunk = chunk.filter(~nameless) if bad else chunk
        asset = pl.col("asset").fill_null(self.asset) if "asset" in chunk.columns else pl.lit(self.asset)
        chunk = chunk.with_columns(asset=asset)
        unit = pl.col("unit").drop_nulls() if "unit" in chunk.columns else pl.lit(None, dtype=pl.String)
        pairs = chunk.group_by("asset", "channel", maintain_order=True).agg(unit.first().alias("unit"))
        ids = [self.channel(name, tag, unit=text) for name, tag, text in pairs.iter_rows()]
        self._note_units(chunk)
        known = pairs.with_columns(number=pl.Series(ids, dtype=pl.UInt16))
        if pairs["asset"].n_unique() > 1:
            joined = chunk.join(known.drop("unit"), on=["asset", "channel"], how="left", maintain_order="left")
            return joined, bad
        number = pl.col("channel").replace_strict(known["channel"], known["number"], return_dtype=pl.UInt16)
        return chunk.with_columns(number=number), bad

    def _note_units(self, chunk: pl.DataFrame) -> None:
        if "unit" not in chunk.columns:
            return
        pairs = (
            chunk.filter(pl.col("unit").fill_null("") != "").group_by("asset", "channel", "unit").agg(pl.min("line"))
        )
        for asset, name, unit, line in pairs.sort("line").iter_rows():
            self.channels[self._numbers[asset, name]].units.setdefault(unit, line)

    def rows(self, chunk: pl.DataFrame) -> Iterator[Rows]:
        """The rows of a chunk with ``ns`` and ``quality``, by asset."""
        if self.opened.kind == "long":
            yield from _by_asset(self._long(chunk), self.asset)
            return
        for asset, rows in _by_asset(chunk, self.asset):
            yield asset, (self._wide(asset, rows) if self.opened.kind == "wide" else _events(rows))

    def _long(self, chunk: pl.DataFrame) -> pl.DataFrame:
        values, wrong = numbers(chunk["value"], self.opened.decimal)
        # a row without a value says that there was none
        wrong = wrong | values.is_null()
        if wrong.any():
            for number, rows in chunk.with_columns(wrong=wrong).filter("wrong").group_by("number", maintain_order=True):
                self.channels[int(number[0])].note(rows["line"], rows["value"], rows["wrong"])
        for number, count in chunk["number"].value_counts().iter_rows():
            self.channels[number].readings += count
        chunk = chunk.with_columns(
            time=pl.col("ns").cast(TIME),
            channel=pl.col("number"),
            value=values,
            quality=pl.col("quality") | wrong.cast(pl.UInt16) * Quality.NO_NUMBER.value,
            source=pl.lit(0, dtype=pl.UInt16),
        )
        return chunk.select(*READINGS.names(), "asset")

    def _wide(self, asset: str, chunk: pl.DataFrame) -> pl.DataFrame:
        """Readings row by row, those of a row in the order of its columns."""
        columns = [name for name in chunk.columns if name.isdigit()]
        rows, width = chunk.height, len(columns)
        values, wrongs = np.full((rows, width), np.nan), np.zeros((rows, width), dtype=bool)
        ids = np.zeros(width, dtype=np.uint16)
        units = self.opened.units
        for at, name in enumerate(columns):
            column = int(name)
            title = self.opened.names[column].strip() or f"column {column + 1}"
            ids[at] = self.channel(asset, title, column, units[column] if column < len(units) else None)
            number, wrong = numbers(chunk[name], self.opened.decimal)
            values[:, at], wrongs[:, at] = number.fill_null(float("nan")).to_numpy(), wrong.to_numpy()
            channel = self.channels[ids[at]]
            channel.note(chunk["line"], chunk[name], wrong)
            channel.readings += len(number) - number.null_count() + int(wrong.sum())
            channel.empty += number.null_count() - int(wrong.sum())
        kept = (~np.isnan(values) | wrongs).reshape(-1)
        quality = np.repeat(chunk["quality"].to_numpy(), width) | (
            wrongs.reshape(-1).astype(np.uint16) * np.uint16(Quality.NO_NUMBER.value)
        )
        frame = pl.DataFrame(
            {
                "time": np.repeat(chunk["ns"].to_numpy(), width)[kept],
                "channel": np.tile(ids, rows)[kept],
                "value": values.reshape(-1)[kept],
                "quality": quality[kept],
                "source": np.zeros(int(kept.sum()), dtype=np.uint16),
                "line": np.repeat(chunk["line"].to_numpy(), width)[kept],
            }
        )
        return frame.with_columns(pl.col("value").fill_nan(None), pl.col("time").cast(TIME)).cast(READINGS)


def _by_asset(frame: pl.DataFrame, asset: str) -> Iterator[Rows]:
    if "asset" not in frame.columns:
        yield asset, frame
        return
    names = pl.col("asset").fill_null(asset).replace("", asset)
    for name, rows in frame.with_columns(names).group_by("asset", maintain_order=True):
        yield str(name[0]), rows.drop("asset")


def _events(chunk: pl.DataFrame) -> pl.DataFrame:
    return chunk.with_columns(
        time=pl.col("ns").cast(TIME), text=pl.col("text").fill_null(""), source=pl.lit(0, dtype=pl.UInt16)
    ).select(pl.col(name).cast(kind) for name, kind in EVENTS.items())
