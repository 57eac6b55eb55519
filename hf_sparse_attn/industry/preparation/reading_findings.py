"""What was noticed about the lines and channels of one file -> findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from ...system.extras import needs_extra
from ..findings import Finding, Quality, Severity
from .clock_times import StampReader
from .csv_fields import BadLine
from .row_tables import PartChannel
from .zone_evidence import iso

with needs_extra("industry", "data of plants"):
    import polars as pl

NAMED = 20  # bad lines with a finding each; more are counted in one
KINDS: tuple[Literal["bad_line", "time_unreadable"], ...] = ("bad_line", "time_unreadable")


def bad_lines(about: Finding, bad: Sequence[BadLine], count: int) -> list[Finding]:
    """Lines that could not be read; ``count`` of them in all, ``bad`` those that were kept."""
    about = replace(about, severity="warning")
    found: list[Finding] = []
    for kind in KINDS:
        same = sorted((each for each in bad if each.kind == kind), key=lambda each: each.line)
        for each in same[:NAMED]:
            found.append(replace(about, kind=kind, lines=(each.line, each.line), values={"found": each.found}))
        if rest := same[NAMED:]:
            lines = rest[0].line, rest[-1].line
            found.append(replace(about, kind=kind, lines=lines, count=len(rest), values={"found": rest[0].found}))
    if count > len(bad):
        found.append(replace(about, kind="bad_line", count=count - len(bad)))
    return found


def order_of_dates(about: Finding, stamps: StampReader) -> list[Finding]:
    """That dates have the day first, which others may read in another way."""
    shapes = [shape for shape in stamps.shapes if shape.orders]
    orders = {*(stamps.orders or {}).values()} or ({"dmy"} if stamps.settings.day_first else set())
    if not shapes or "dmy" not in orders:
        return []
    told = "by the user" if stamps.settings.day_first is not None else "by stamps with a day above 12"
    return [replace(about, kind="day_first_dates", values={"told": told, "format": shapes[0].of_order("dmy")})]


def repeated(about: Finding, flags: pl.DataFrame, kind: str, rows: int) -> list[Finding]:
    """Rows that occur twice, and rows of one channel with one time stamp; counted in rows of the file."""
    found: list[Finding] = []
    wanted: tuple[tuple[str, Quality], ...] = (
        ("duplicates", Quality.DUPLICATE),
        ("equal_stamps", Quality.EQUAL_STAMP),
    )
    for name, flag in wanted:
        some = flags.filter(pl.col("flag") == flag.value)
        if some.is_empty():
            continue
        count = some.height if kind == "events" else some["line"].n_unique()
        # many logs write whole seconds: lines that say the same within one are no fault of the data
        whole = kind == "events" and bool((some["time"] % 10**9 == 0).all())
        severity: Severity = "information" if whole else "warning"
        values: dict[str, Any] = {"share": count / rows}
        if name == "equal_stamps":
            values["stamps"] = some["time"].n_unique()
        found.append(_placed(replace(about, kind=name, severity=severity, count=count, values=values), some))
    return found


def _placed(finding: Finding, rows: pl.DataFrame) -> Finding:
    lines, times = rows["line"], rows["time"]
    first, last = int(lines.min()), int(lines.max())  # type: ignore[arg-type]
    start, end = iso(int(times.min())), iso(int(times.max()))  # type: ignore[arg-type]
    return replace(finding, lines=(first, last), start=start, end=end)


def channel_findings(about: Finding, channels: Sequence[PartChannel]) -> list[Finding]:
    """Fields that hold no number, and units that are not the same throughout."""
    about = replace(about, severity="warning")
    found: list[Finding] = []
    for channel in channels:
        here = replace(about, asset=channel.asset, channel=channel.name)
        if channel.no_number:
            values: dict[str, Any] = {"examples": channel.examples}
            count, lines = channel.no_number, channel.no_number_lines
            found.append(replace(here, kind="no_number", lines=lines, count=count, values=values))
        if len(channel.units) > 1:
            (first, _), (second, line) = list(channel.units.items())[:2]
            values = {"from": first, "to": second}
            found.append(replace(here, kind="unit_change", lines=(line, line), values=values))
    return found
