"""Lines of the page on data health: when each sensor has data, and when it is faulty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..dataset import Manifest
from ..findings import Finding
from .asset_readings import count_rows

WIDTH = 1000.0  # of a line, in its own units
LEAST_WIDTH = 2.0  # so that a short stretch can be seen
MOST_CHANNELS = 40  # of one machine that are drawn
MOST_MARKS = 200  # of one line
FAULTS = ("stuck_sensor", "flat_sensor", "saturated_sensor")


@dataclass(frozen=True)
class Mark:
    """A stretch of a line: left end and width of `WIDTH`; ``kind``: gap, fault or unit."""

    left: float
    width: float
    kind: str


@dataclass(frozen=True)
class ChannelLine:
    """One sensor: where its data begin and end on the line, and marks on it."""

    name: str
    left: float
    width: float
    marks: tuple[Mark, ...]
    findings: int


@dataclass(frozen=True)
class AssetTimeline:
    """Lines of one machine from ``start`` to ``end`` (nanoseconds); ``further`` sensors are not drawn."""

    asset: str
    start: int
    end: int
    lines: tuple[ChannelLine, ...]
    further: int


def asset_timelines(folder: Path, manifest: Manifest, findings: Sequence[Finding]) -> list[AssetTimeline]:
    """A timeline for each machine with readings; sensors with the most findings first."""
    timelines = []
    for asset in manifest.assets:
        counts = [count for count in count_rows(folder / "assets" / asset / "readings.parquet") if count.numbers]
        if not counts:
            continue
        start, end = min(count.start for count in counts), max(count.end for count in counts)
        ends: dict[int, tuple[int, int]] = {}
        for count in counts:
            first, last = ends.get(count.channel, (count.start, count.end))
            ends[count.channel] = (min(first, count.start), max(last, count.end))
        mine = [finding for finding in findings if finding.asset == asset]
        amount = Counter(finding.channel for finding in mine)
        order = sorted(ends, key=lambda number: (-amount[manifest.channels[number].name], number))
        lines = []
        for number in order[:MOST_CHANNELS]:
            channel = manifest.channels[number]
            path = manifest.sources[channel.source].path
            about = [f for f in mine if f.channel == channel.name or (f.channel is None and f.source == path)]
            left, width = _placed(*ends[number], start, end)
            lines.append(ChannelLine(channel.name, left, width, _marks(about, start, end), amount[channel.name]))
        timelines.append(AssetTimeline(asset, start, end, tuple(lines), len(order) - len(lines)))
    return timelines


def _placed(first: int, last: int, start: int, end: int) -> tuple[float, float]:
    span = max(end - start, 1)
    left = WIDTH * min(max((first - start) / span, 0.0), 1.0)
    right = WIDTH * min(max((last - start) / span, 0.0), 1.0)
    width = max(right - left, LEAST_WIDTH)
    return round(min(left, WIDTH - width), 1), round(width, 1)


def _marks(findings: Sequence[Finding], start: int, end: int) -> tuple[Mark, ...]:
    """Marks in the order in which they are drawn, the longest `MOST_MARKS`: shorter ones would not be seen."""
    marks = []
    for finding in findings:
        kind = "gap" if finding.kind == "gap" else "fault" if finding.kind in FAULTS else "unit"
        if finding.start is None or finding.end is None or finding.kind not in ("gap", "unit_change", *FAULTS):
            continue
        first, last = (
            int(np.datetime64(time.removesuffix("Z"), "ns").astype(np.int64)) for time in (finding.start, finding.end)
        )
        marks.append(Mark(*_placed(first, last, start, end), kind))
    longest = sorted(marks, key=lambda mark: -mark.width)[:MOST_MARKS]
    return tuple(sorted(longest, key=lambda mark: (("unit", "fault", "gap").index(mark.kind), mark.left)))
