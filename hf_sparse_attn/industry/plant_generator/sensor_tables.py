"""Tables of readings as plants export them: a historian's wide table, and the long form of a process data system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ...system.extras import needs_extra
from .fault_injection import COPY, TIME, RowFaults, changed_values, unreadable
from .fault_plan import DataFault, Lines
from .machine_channels import Sensor
from .plant_settings import PlantSettings
from .raw_files import TextFile
from .sensor_signals import Floats, Times

with needs_extra("industry", "generated plants"):
    import polars as pl

GOOD, UNCERTAIN, UNCERTAIN_EVERY = "Good", "Uncertain", 997  # rows; a number that no rhythm of the plant shares


@dataclass
class Span:
    """Readings of a sensor that show an event, from ``start`` to ``end`` (milliseconds, included)."""

    event: int
    channel: str
    start: int
    end: int
    lines: Lines = field(default_factory=Lines)

    def see(self, times: npt.NDArray[np.int64], lines: npt.NDArray[np.int64]) -> None:
        self.lines.see(lines[(times >= self.start) & (times <= self.end)])


def time_texts(times: npt.NDArray[np.int64], stamp: str, zone: str) -> pl.Series:
    """Milliseconds since 1970 as text in a time zone."""
    moments = pl.Series(times).cast(pl.Datetime("ms", "UTC"))
    return moments.dt.convert_time_zone(zone).dt.to_string(stamp)


class ReadingsTable:
    """What the wide and the long table share: faults of rows, stamps, and where things stand."""

    def __init__(
        self,
        settings: PlantSettings,
        out: TextFile,
        sensors: Sequence[Sensor],
        faults: Sequence[DataFault],
        spans: Sequence[Span],
    ) -> None:
        self.settings, self.out, self.sensors, self.spans = settings, out, sensors, spans
        self.rows = RowFaults(settings.seed, faults)

    def _local(self, times: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which rows have local time stamps."""
        local = np.full(len(times), self.out.file.local)
        for fault in self.rows.of_kind("zone_change"):
            local ^= fault.covers(times)
        return local

    def _stamps(self, times: npt.NDArray[np.int64], local: npt.NDArray[np.bool_]) -> pl.Series:
        shown, file = self.rows.stamps(times), self.out.file
        texts = time_texts(shown, file.stamp, self.settings.zone if local.any() else "UTC")
        if local.any() and not local.all():
            texts = texts.zip_with(pl.Series(local), time_texts(shown, file.stamp, "UTC"))
        return unreadable(texts, self.rows.rows_at(times, "time_unreadable"))


class WideTable(ReadingsTable):
    """A CSV file with a column for each sensor."""

    @staticmethod
    def header(sensors: Sequence[Sensor], faults: Sequence[DataFault]) -> list[str]:
        """Names of the columns, with units."""
        spare = [fault.channel or "" for fault in faults if fault.kind == "empty_channel"]
        return ["timestamp", *(f"{sensor.name} [{sensor.unit}]" for sensor in sensors), *spare]

    def write(self, times: Times, values: dict[str, Floats]) -> None:
        """Append the readings of a chunk."""
        columns = dict(values)
        for sensor in self.sensors:
            for fault in self.rows.of_kind("stuck_sensor", "flat_sensor", "saturated_sensor", "unit_change"):
                if fault.channel == sensor.name:
                    columns[sensor.name] = changed_values(fault, sensor, times, columns[sensor.name])
        rows = self.rows.passed(pl.DataFrame({TIME: times, **columns}))
        moments, lines = rows[TIME].to_numpy(), self.out.numbers(len(rows))
        local = self._local(moments)
        self.rows.see(rows, lines, local)
        for span in self.spans:
            span.see(moments, lines)
        frame = pl.DataFrame({"timestamp": self._stamps(moments, local)})
        frame = frame.with_columns(self._fields(rows[sensor.name], lines, moments) for sensor in self.sensors)
        for fault in self.rows.of_kind("empty_channel"):
            frame = frame.with_columns(pl.lit(None, pl.String).alias(fault.channel or ""))
        self.out.append(frame, self.rows.rows_at(moments, "bad_line"))

    def _fields(self, values: pl.Series, lines: npt.NDArray[np.int64], times: npt.NDArray[np.int64]) -> pl.Series:
        for fault in self.rows.of_kind("no_number"):
            if fault.channel == values.name:
                texts, chosen = self.rows.without_numbers(fault, values)
                fault.see(lines[chosen], times[chosen])
                return texts.alias(values.name)
        return values


class LongTable(ReadingsTable):
    """A CSV or Parquet file with a row for each reading: time, tag, value, quality."""

    HEADER = ("time", "tag", "value", "quality")

    def write(self, times: Times, tags: npt.NDArray[np.int64], values: Floats) -> None:
        """Append the readings of a chunk; ``tags`` are numbers of sensors."""
        rows = self.rows.passed(pl.DataFrame({TIME: times, "tag": tags, "value": values}))
        moments, lines = rows[TIME].to_numpy(), self.out.numbers(len(rows))
        number = rows["tag"].to_numpy()
        self.rows.see(rows, lines, np.full(len(rows), False))
        for span in self.spans:
            mine = np.array([sensor.name == span.channel for sensor in self.sensors])[number]
            span.see(moments[mine], lines[mine])
        # a copy has the quality of its row
        first = np.cumsum(~rows[COPY].to_numpy()) + self._written
        self._written = int(first[-1])
        stamps = self._stamps(moments, self._local(moments)) if self.out.file.stamp else self._moments(moments)
        quality = np.where(first % UNCERTAIN_EVERY == 0, UNCERTAIN, GOOD)
        names = pl.Series([sensor.tag for sensor in self.sensors]).gather(number)
        columns = (stamps, names, rows["value"], pl.Series(quality))
        self.out.append(pl.DataFrame(dict(zip(self.HEADER, columns, strict=True))))

    _written = 0

    def _moments(self, times: npt.NDArray[np.int64]) -> pl.Series:
        return pl.Series(self.rows.stamps(times)).cast(pl.Datetime("ms", "UTC")).cast(pl.Datetime("ns", "UTC"))
