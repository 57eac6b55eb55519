"""Data faults put into readings while they stream by: values that are changed, rows that go, come twice or late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...system.extras import needs_extra
from .fault_plan import DataFault
from .machine_channels import CONVERSIONS, Sensor
from .random_streams import stream
from .sensor_signals import Floats, Times

with needs_extra("industry", "generated plants"):
    import polars as pl

FLATTER = 50.0  # a flat sensor's movement is divided by this
TIME, COPY = "_time", "_copy"  # columns that are not written: true milliseconds; the row is a copy of the one above
NO_NUMBERS = (None, "n/a", "Bad", "-")  # what stands in fields without a number; None = nothing
UNREADABLE = "0000-00-00 00:00:00"


def changed_values(fault: DataFault, sensor: Sensor, times: Times, values: Floats) -> Floats:
    """The values of a sensor that is stuck, flat, saturated or in another unit from a time on."""
    inside = fault.covers(times)
    if not inside.any():
        return values
    if fault.reference is None:
        fault.reference = float(values[inside][0])
    if fault.kind == "stuck_sensor":
        changed = np.full_like(values, fault.reference)
    elif fault.kind == "saturated_sensor":
        changed = np.full_like(values, sensor.high)
    elif fault.kind == "flat_sensor":
        changed = fault.reference + (values - fault.reference) / FLATTER
    else:
        _, factor, summand = CONVERSIONS[sensor.unit]
        changed = values * factor + summand
    return np.where(inside, np.round(changed, sensor.decimals) + 0.0, values)


class RowFaults:
    """Faults of the rows of one file. Rows come chunk by chunk and leave in the order in which the file has them."""

    def __init__(self, seed: int, faults: Sequence[DataFault]) -> None:
        self.faults = faults
        self._random = {id(fault): stream(seed, "rows", fault.file, fault.kind) for fault in faults}
        self._held: dict[int, pl.DataFrame] = {}

    def of_kind(self, *kinds: str) -> list[DataFault]:
        return [fault for fault in self.faults if fault.kind in kinds]

    def passed(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The rows of a chunk without those of gaps, late blocks where they end up, and copies behind their rows."""
        for fault in self.of_kind("gap"):
            gone = fault.covers(rows[TIME].to_numpy())
            fault.lines.count += int(gone.sum())
            rows = rows.filter(~gone)
        for fault in self.of_kind("backward_jump"):
            rows = self._late(fault, rows)
        copies = np.zeros(len(rows), dtype=bool)
        for fault in self.of_kind("duplicates"):
            twice = self._random[id(fault)].random(len(rows)) < fault.magnitude
            each = np.repeat(np.arange(len(rows)), 1 + twice)
            rows, copies = rows[each], np.diff(each, prepend=-1) == 0
        return rows.with_columns(pl.Series(COPY, copies))

    def _late(self, fault: DataFault, rows: pl.DataFrame) -> pl.DataFrame:
        late = fault.covers(rows[TIME].to_numpy())
        held = [self._held.pop(id(fault), rows[:0]), rows.filter(late)]
        rows = rows.filter(~late)
        release = fault.end + (fault.end - fault.start)
        before = rows.filter(pl.col(TIME) < release)
        # as long as nothing follows, more of the block may come
        if len(before) == len(rows):
            self._held[id(fault)] = pl.concat(held)
            return rows
        return pl.concat([before, *held, rows.filter(pl.col(TIME) >= release)])

    def stamps(self, times: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """What the clock of the source shows at these true times."""
        stamps = times.copy()
        for fault in self.of_kind("clock_offset"):
            stamps += round(1000 * fault.magnitude)
        for fault in self.of_kind("equal_stamps"):
            stamps[fault.covers(times)] = fault.start
        return stamps

    def without_numbers(self, fault: DataFault, values: pl.Series) -> tuple[pl.Series, npt.NDArray[np.bool_]]:
        """A column as text in which some fields are empty or a word; which."""
        draws = self._random[id(fault)].random(len(values)) / fault.magnitude
        chosen = draws < 1
        words = pl.Series(NO_NUMBERS).gather((np.where(chosen, draws, 0) * len(NO_NUMBERS)).astype(np.int64))
        return words.zip_with(pl.Series(chosen), values.cast(pl.String)), chosen

    def rows_at(self, times: npt.NDArray[np.int64], *kinds: str) -> list[int]:
        """Places of the rows that faults of these kinds cover."""
        return [row for fault in self.of_kind(*kinds) for row in np.flatnonzero(fault.covers(times)).tolist()]

    def see(self, rows: pl.DataFrame, lines: npt.NDArray[np.int64], local: npt.NDArray[np.bool_]) -> None:
        """Note where in the file the faults stand, of rows that come next at ``lines``."""
        times = rows[TIME].to_numpy()
        for fault in self.faults:
            if fault.kind == "gap":
                _see_gap(fault, times, lines)
            elif fault.kind == "duplicates":
                copies = rows[COPY].to_numpy()
                fault.see(lines[copies], times[copies])
            elif fault.kind == "dst_fold":
                twice = fault.covers(times) & local
                fault.see(lines[twice], times[twice])
            elif fault.kind != "no_number":  # seen where they are drawn
                fault.see(lines[fault.covers(times)], times[fault.covers(times)])


def _see_gap(fault: DataFault, times: npt.NDArray[np.int64], lines: npt.NDArray[np.int64]) -> None:
    """A gap stands between two lines: the last before it, the first behind it."""
    before, behind = np.flatnonzero(times < fault.start), np.flatnonzero(times >= fault.end)
    if len(before):
        fault.lines.first, fault.seen.first = int(lines[before[-1]]), int(times[before[-1]])
    if len(behind) and fault.lines.last is None:
        fault.lines.last, fault.seen.last = int(lines[behind[0]]), int(times[behind[0]])


def unreadable(stamps: pl.Series, rows: Sequence[int]) -> pl.Series:
    """Time stamps as text, some of them replaced by what is no time."""
    return stamps.scatter(list(rows), UNREADABLE) if rows else stamps


def epochs(fault: DataFault | None, times: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Numeric stamps: milliseconds, from the fault on seconds."""
    return times if fault is None else np.where(fault.covers(times), times // 1000, times)
