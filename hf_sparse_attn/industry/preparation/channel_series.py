"""One sensor's readings by time, and how a stretch of them becomes a finding with file, lines and times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dataset import Source
from ..findings import Finding, Severity

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Flags = npt.NDArray[np.uint16]  # bits of `Quality`
SECOND = 1_000_000_000  # nanoseconds


def iso_utc(nanoseconds: int) -> str:
    """ISO 8601 in UTC of nanoseconds since 1970, a fraction only where there is one: 2024-03-01T00:00:00Z."""
    text = str(np.datetime64(int(nanoseconds), "ns"))
    whole, _, fraction = text.partition(".")
    fraction = fraction.rstrip("0")
    return f"{whole}.{fraction}Z" if fraction else f"{whole}Z"


@dataclass(frozen=True)
class ChannelSeries:
    """Readings of one channel that hold a number, rows of equal time as they stood. All arrays have shape (n,).

    Attributes:
        asset, name: the machine and the sensor.
        number: place of the sensor in `Manifest.channels`.
        times: nanoseconds since 1970 in UTC, ascending.
        values: finite numbers.
        rows: place of each reading in the asset's ``readings.parquet``.
        sources, lines: file (number in `Manifest.sources`) and line of each reading.
    """

    asset: str
    name: str
    number: int
    times: Ints
    values: Floats
    rows: Ints
    sources: npt.NDArray[np.uint16]
    lines: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.times)

    def seconds(self, stretch: slice) -> float:
        """From the first to the last reading of a stretch."""
        return float(self.times[stretch][-1] - self.times[stretch][0]) / SECOND

    def finding(
        self,
        kind: str,
        severity: Severity,
        stretch: slice,
        sources: Sequence[Source],
        *,
        count: int | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> Finding:
        """A finding about the readings of ``stretch``; it names lines where they are all of one file."""
        files = np.unique(self.sources[stretch])
        lines = self.lines[stretch]
        one = len(files) == 1
        return Finding(
            kind,
            severity,
            asset=self.asset,
            source=sources[int(files[0])].path if one else None,
            channel=self.name,
            start=iso_utc(self.times[stretch][0]),
            end=iso_utc(self.times[stretch][-1]),
            lines=(int(lines.min()), int(lines.max())) if one else None,
            count=len(lines) if count is None else count,
            values=values,
        )


def true_stretches(mask: Bools) -> list[slice]:
    """The runs of True in ``mask`` (n,), in order."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [slice(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def quantum(values: Floats) -> float:
    """Resolution of the values (n,): what nearly all distances between neighbouring values are multiples of; 0.0
    where there is none, as in numbers that were never rounded.
    """
    sample = values if len(values) <= 50_000 else values[:: len(values) // 50_000]
    steps = np.diff(np.unique(sample))
    if len(steps) == 0:
        return 0.0
    # below this a step is the rounding of binary numbers, not of the sensor
    steps = steps[steps > 1e-9 * max(1.0, float(np.abs(sample).max()))]
    if len(steps) < 3:
        return float(steps.min()) if len(steps) else 0.0
    step = float(np.quantile(steps, 0.05))
    multiples = steps / step
    return step if np.mean(np.abs(multiples - np.round(multiples)) < 0.02) > 0.95 else 0.0
