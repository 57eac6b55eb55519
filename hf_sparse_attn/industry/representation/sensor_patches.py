"""Sensors on a regular grid: robustly scaled values, which of them were observed, and the readings behind each cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...system.extras import needs_extra
from ..dataset import PlantDataset
from ..errors import PlantDataError
from ..findings import Quality
from .provenance import LineRange, line_ranges
from .splitting import nanoseconds

with needs_extra("industry", "sensors as patches"):
    import polars as pl

LARGEST = 1 << 28  # cells of a grid, 17 bytes each
NANOSECONDS = 1_000_000_000


@dataclass(frozen=True)
class GridSettings:
    """How sensors are put on a grid.

    Attributes:
        step: seconds of a step; steps start at whole multiples of it since 1970 (UTC).
        reduce: the mean of a step's readings, or the last of them.
        leave_out: readings with any of these flags count as not observed.
        channels: names, in the order of the grid; empty: all of the asset.
    """

    step: float
    reduce: Literal["mean", "last"] = "mean"
    leave_out: Quality = Quality.DUPLICATE | Quality.OTHER_UNIT
    channels: tuple[str, ...] = ()


class SensorGrid:
    """The sensors of an asset, a row for each step and a column for each channel. Nothing is interpolated.

    Attributes:
        values: (x − center) / scale of each cell, float32 [steps, channels]; 0 where nothing was observed.
        observed: whether a cell has a reading, bool [steps, channels].
        since_last: seconds from a channel's last reading to the end of the step, float32 [steps, channels];
            infinite before its first one.
        start: first nanosecond of the grid since 1970 (UTC); ``step`` nanoseconds of a step.
        unscaled: channels that do not vary in the training period or have no reading at all; their scale is 1.
        left_out: readings that were not used: flagged, or without a finite number.

    Raises:
        PlantDataError: there is no such channel, a reading has no time, there is none of the training period to scale
            a channel by, or the grid would be too large.
    """

    def __init__(self, data: PlantDataset, asset: str, settings: GridSettings) -> None:
        self.data, self.asset, self.settings = data, asset, settings
        self.step = round(settings.step * NANOSECONDS)
        if self.step < 1:
            raise PlantDataError(
                f"a step of {settings.step} seconds", ["give seconds above 0, such as 60", "give 600 for ten minutes"]
            )
        self.numbers = self._channel_numbers()
        self.names = tuple(data.manifest.channels[number].name for number in self.numbers)
        self._refuse_without_time()
        used = self._used()
        self.left_out = self._of_channels(data.readings(asset, in_order=False)).select(pl.len()).collect().item() - (
            used.select(pl.len()).collect().item()
        )
        cells = self._cells(used)
        if not len(cells):
            self.start, shape = 0, (0, len(self.numbers))
        else:
            low, high = int(cells["at"].min()), int(cells["at"].max())  # type: ignore[arg-type]
            self.start, shape = low * self.step, (high - low + 1, len(self.numbers))
        self._check_size(shape)
        self._fill(cells, shape)

    def __len__(self) -> int:
        return len(self.values)

    def _channel_numbers(self) -> list[int]:
        channels = self.data.manifest.channels
        mine = {channel.name: number for number, channel in enumerate(channels) if channel.asset == self.asset}
        names = self.settings.channels or tuple(mine)
        for name in names:
            if name not in mine:
                raise PlantDataError(
                    f"asset {self.asset!r} has no channel {name!r}",
                    [f"name some of {', '.join(mine) or 'none: it has no sensors'}"],
                    file=self.data.folder,
                )
        return [mine[name] for name in names]

    def _refuse_without_time(self) -> None:
        rows = self._of_channels(self.data.readings(self.asset, in_order=False)).filter(pl.col("time").is_null())
        for source, line in rows.select("source", "line").head(1).collect().iter_rows():
            raise PlantDataError(
                "the reading has no time",
                ["prepare the data again", "leave the line out"],
                file=self.data.manifest.sources[source].path,
                line=line,
            )

    def _of_channels(self, readings: pl.LazyFrame) -> pl.LazyFrame:
        return readings.filter(pl.col("channel").is_in(self.numbers))

    def _used(self) -> pl.LazyFrame:
        """The readings of the grid's channels that count."""
        flagged = (pl.col("quality") & self.settings.leave_out.value) != 0
        number = pl.col("value").is_finite().fill_null(False)
        return self._of_channels(self.data.readings(self.asset, in_order=False)).filter(number & ~flagged)

    def _at(self) -> pl.Expr:
        """Number of a reading's step since 1970."""
        return pl.col("time").dt.epoch("ns").floordiv(self.step).alias("at")

    def _cells(self, used: pl.LazyFrame) -> pl.DataFrame:
        """(step, channel, value, time of the last reading) of each cell with readings."""
        last = pl.col("value").sort_by("time", maintain_order=True).last()
        value = pl.col("value").mean() if self.settings.reduce == "mean" else last
        last_time = pl.col("time").max().dt.epoch("ns").alias("last")
        return used.group_by(self._at(), "channel").agg(value, last_time).collect()

    def _check_size(self, shape: tuple[int, int]) -> None:
        if shape[0] * shape[1] > LARGEST:
            raise PlantDataError(
                f"steps of {self.settings.step:g} s from the first to the last reading of {self.asset!r} are "
                f"{shape[0]} × {shape[1]} cells",
                ["take a longer step", "look for a reading with a wrong year", "name fewer channels"],
                file=self.data.folder,
            )

    def _fill(self, cells: pl.DataFrame, shape: tuple[int, int]) -> None:
        column = {number: at for at, number in enumerate(self.numbers)}
        rows = cells["at"].to_numpy() - self.start // self.step
        columns = np.array([column[number] for number in cells["channel"]], np.int64)
        center, scale = self._scales()
        self.values, self.observed = np.zeros(shape, np.float32), np.zeros(shape, np.bool_)
        self.values[rows, columns] = (cells["value"].to_numpy() - center[columns]) / scale[columns]
        self.observed[rows, columns] = True
        lasts = np.full(shape, np.iinfo(np.int64).min)
        lasts[rows, columns] = cells["last"].to_numpy()
        lasts = np.maximum.accumulate(lasts, 0)
        ends = self.start + self.step * np.arange(1, shape[0] + 1)[:, None]
        # a channel before its first reading: no time, which must not overflow
        seen = lasts > np.iinfo(np.int64).min
        self.since_last = np.where(seen, (ends - np.where(seen, lasts, 0)) / NANOSECONDS, np.inf).astype(np.float32)

    def _scales(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Center and scale [channels] of the training period, as prepared or, where that is open, computed the same."""
        channels = [self.data.manifest.channels[number] for number in self.numbers]
        known = {n: (c.center, c.scale) for n, c in zip(self.numbers, channels, strict=True)}
        if open_ones := [n for n, pair in known.items() if None in pair]:
            known |= self._training_scales(open_ones)
        pairs = [known[number] for number in self.numbers]
        center, scale = (np.array([pair[i] for pair in pairs], np.float64) for i in (0, 1))
        # a scale of 0 would make every later change infinite
        varies = np.isfinite(scale) & (scale > 0)
        self.unscaled = tuple(name for name, fine in zip(self.names, varies, strict=True) if not fine)
        return center, np.where(varies, scale, 1.0)

    def _training_scales(self, numbers: list[int]) -> dict[int, tuple[float, float]]:
        frame = self._used().filter(pl.col("channel").is_in(numbers))
        split = self.data.manifest.split
        if split is not None:
            frame = frame.filter(pl.col("time").dt.epoch("ns") < nanoseconds(split.train_end))
        median = pl.col("value").median()
        spread = 1.4826 * (pl.col("value") - median).abs().median()
        rows = frame.group_by("channel").agg(median.alias("center"), spread.alias("scale")).collect().iter_rows()
        scales = {channel: (center, scale) for channel, center, scale in rows}
        late = self._used().filter(pl.col("channel").is_in(numbers)).select(pl.col("channel").unique()).collect()
        for number in numbers:
            if number in set(late["channel"]) - scales.keys():
                raise PlantDataError(
                    f"has no reading of the training period to scale channel "
                    f"{self.data.manifest.channels[number].name!r} of {self.asset!r} by",
                    ["name the other channels in GridSettings.channels", "end the training period later"],
                    file=self.data.folder,
                )
        # a channel without any reading has nothing to scale
        return {number: scales.get(number, (0.0, 0.0)) for number in numbers}

    def lines(self, first: int, last: int, channels: Sequence[str] = ()) -> tuple[LineRange, ...]:
        """The lines whose readings are in steps ``first`` to ``last`` (included) of ``channels`` (all)."""
        return line_ranges(self.data.manifest, self.rows(range(first, last + 1), channels))

    def rows(self, steps: Sequence[int], channels: Sequence[str] = ()) -> pl.DataFrame:
        """(source, line) of the readings in ``steps`` of ``channels`` (all)."""
        number = dict(zip(self.names, self.numbers, strict=True))
        mine = pl.col("channel").is_in([number[name] for name in channels or self.names])
        at = self._at() - self.start // self.step
        return self._used().filter(mine & at.is_in(list(steps))).select("source", "line").collect()

    def cells(self, source: int, line: int) -> list[tuple[int, int]]:
        """(step, column) of the cells that the readings of a line are in."""
        rows = self._used().filter((pl.col("source") == source) & (pl.col("line") == line))
        found = rows.select(self._at() - self.start // self.step, "channel").unique().sort("at", "channel").collect()
        return [(at, self.numbers.index(channel)) for at, channel in found.iter_rows()]

    def times(self, step: int) -> tuple[int, int]:
        """First nanosecond of a step since 1970, and the one behind its last."""
        return self.start + step * self.step, self.start + (step + 1) * self.step
