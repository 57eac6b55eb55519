"""Clocks of the files of an asset: which are one clock, which is the reference, and how far the others are off."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...system.extras import needs_extra
from ..dataset import Source
from ..findings import Finding
from .channel_series import Ints
from .clock_offsets import LEAST_EVENTS, ClockOffset, ClockSignal, estimate_offset

with needs_extra("industry", "clocks of sources"):
    import polars as pl

MOST_SIGNALS = 12  # of one clock: channels with the most readings, kinds of lines with the most lines
MOST_LINES = 1_000_000  # of logs, of which kinds of lines are counted
OVERLAP = 0.1  # of the shorter of two files of a rotation, at most
# seconds, and steps of the grid, of logs: below, clocks agree as far as can be told
LEAST_OFFSET, OFFSET_STEPS, LINE_STEPS = 2.0, 0.4, 2.0


@dataclass(frozen=True)
class SourceSpan:
    """How much a file tells of an asset: readings, lines of logs, first and last time in nanoseconds."""

    source: int
    path: str
    readings: int
    events: int
    start: int
    end: int


@dataclass(frozen=True)
class SourceClock:
    """What was found about one clock: the numbers of its files, those of the reference, and the offset if certain."""

    asset: str
    sources: tuple[int, ...]
    reference: tuple[int, ...]
    offset: ClockOffset | None

    @property
    def is_off(self) -> bool:
        """Whether it is off by more than can be told from agreement."""
        offset = self.offset
        if offset is None:
            return False
        steps = LINE_STEPS if offset.by_lines else OFFSET_STEPS
        return abs(offset.seconds) > max(LEAST_OFFSET, steps * offset.step)


def compare_clocks(asset: str, folder: Path, spans: Sequence[SourceSpan], most: float) -> list[SourceClock]:
    """Every clock of an asset against the reference, which is that of the files with the most readings.

    Args:
        folder: of the asset, with ``readings.parquet`` and ``events.parquet``.
        most: seconds, the largest offset that is sought.
    """
    clocks = _clocks(spans)
    if len(clocks) < 2:
        return []
    reference, *others = sorted(clocks, key=lambda clock: (-sum(span.readings for span in clock), clock[0].source))
    signals = _signals(folder, reference)
    numbers = tuple(sorted(span.source for span in reference))
    return [
        SourceClock(
            asset,
            tuple(sorted(span.source for span in clock)),
            numbers,
            estimate_offset(signals, _signals(folder, clock), most),
        )
        for clock in others
    ]


def clock_findings(clocks: Sequence[SourceClock], sources: Sequence[Source], corrected: bool) -> list[Finding]:
    """One finding for every clock that is off, or that could not be compared; none for those that agree."""
    findings = []
    for clock in clocks:
        files = {"files": len(clock.sources), "reference": sources[clock.reference[0]].path}
        path = sources[clock.sources[0]].path
        if clock.offset is None:
            findings.append(Finding("clock_unverified", "information", clock.asset, path, values=files))
        elif clock.is_off:
            found = clock.offset
            values = {"offset_s": round(found.seconds, 1), "z": round(found.z, 1), "pairs": found.pairs, **files}
            values["corrected"] = corrected
            if found.before is not None:
                values["before_s"] = round(found.before, 1)
            findings.append(Finding("clock_offset", "warning", clock.asset, path, values=values))
    return findings


def _clocks(spans: Sequence[SourceSpan]) -> list[list[SourceSpan]]:
    """Files of one clock together: parts of a rotation, of which each begins about where the one before ends."""
    clocks: list[list[SourceSpan]] = []
    for span in sorted(spans, key=lambda span: (span.start, span.source)):
        for clock in clocks:
            last = clock[-1]
            shorter = min(last.end - last.start, span.end - span.start)
            if _rotation(last.path) == _rotation(span.path) and last.end - span.start <= OVERLAP * shorter:
                clock.append(span)
                break
        else:
            clocks.append([span])
    return clocks


def _rotation(path: str) -> str:
    """Path of a file without its numbers: files that a logger wrote one after the other share it."""
    return re.sub(r"\d+", "#", path)


def _signals(folder: Path, clock: Sequence[SourceSpan]) -> list[ClockSignal]:
    signals = []
    if numbers := [span.source for span in clock if span.readings]:
        signals += _sensors(folder / "readings.parquet", numbers)
    if numbers := [span.source for span in clock if span.events]:
        signals += _lines(folder / "events.parquet", numbers)
    return signals


def _sensors(path: Path, numbers: list[int]) -> list[ClockSignal]:
    """The channels with the most readings."""
    rows = pl.scan_parquet(path).filter(pl.col("source").is_in(numbers) & pl.col("value").is_finite())
    counts = (
        rows.group_by("channel").len().collect(engine="streaming").sort(["len", "channel"], descending=[True, False])
    )
    signals = []
    for channel, _ in counts.head(MOST_SIGNALS).iter_rows():
        frame = rows.filter(pl.col("channel") == channel).select("time", "value").collect(engine="streaming")
        times, order = _in_order(frame["time"].to_physical().to_numpy())
        signals.append(ClockSignal(str(channel), times, frame["value"].to_numpy()[order]))
    return signals


def _lines(path: Path, numbers: list[int]) -> list[ClockSignal]:
    """All lines, and each of the most frequent kinds of lines: those that differ in numbers only are one kind."""
    rows = pl.scan_parquet(path).filter(pl.col("source").is_in(numbers)).tail(MOST_LINES)
    kind = pl.coalesce("template", pl.col("text").str.replace_all(r"\d+", "#"), pl.lit(""))
    frame = rows.select("time", kind=kind).collect()
    counts = frame.group_by("kind").len().filter(pl.col("len") >= LEAST_EVENTS)
    kinds = counts.sort(["len", "kind"], descending=[True, False]).head(MOST_SIGNALS)["kind"]
    signals = [ClockSignal("*", _in_order(frame["time"].to_physical().to_numpy())[0], None)]
    for name in kinds:
        times = frame.filter(pl.col("kind") == name)["time"].to_physical().to_numpy()
        signals.append(ClockSignal(str(name), _in_order(times)[0], None))
    return signals


def _in_order(times: Ints) -> tuple[Ints, Ints]:
    order = np.argsort(times, kind="stable")
    return times[order], order
