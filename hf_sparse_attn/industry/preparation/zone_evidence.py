"""What is noticed about the clock of one file while it is read, and the findings that this makes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from ...system.extras import needs_extra
from ..findings import Finding, Severity
from .local_times import HOUR, folding_zones, summer_time_zones
from .stamp_shapes import ABBREVIATIONS
from .time_order import Jump, TimeOrder

with needs_extra("industry", "data of plants"):
    import polars as pl

NAMED = 20  # findings of one kind of a file; more are counted in one
SECOND = 10**9
SLACK = 0.02  # of a step: what a clock that was set to another zone may differ from whole hours
Change = tuple[int, int, int, Any, Any]  # line, time before, time, what was, what is


def iso(ns: int | None) -> str | None:
    """ISO 8601 in UTC of ns since 1970."""
    if ns is None:
        return None
    text = datetime.fromtimestamp(ns // SECOND, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    fraction = f".{ns % SECOND:09d}".rstrip("0") if ns % SECOND else ""
    return f"{text}{fraction}Z"


@dataclass
class _Stretch:
    """Rows of one kind that stand near each other."""

    count: int
    first: int
    last: int
    start: int
    end: int

    def add(self, other: _Stretch) -> None:
        self.count += other.count
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)
        self.start, self.end = min(self.start, other.start), max(self.end, other.end)


class ZoneEvidence:
    """Collects what the stamps of one file show.

    Args:
        source: path of the file.
        asset: its machine; None = of several.
        zone: what the user said; None = nothing, local times are read as UTC.
    """

    def __init__(self, source: str, asset: str | None, zone: str | None) -> None:
        self.about = Finding("dst_fold", "information", asset=asset, source=source)
        self.zone = zone
        self.local = False  # whether a stamp had no offset
        self._folds: dict[int, _Stretch] = {}
        self._resolved: set[int] = set()
        self._missing: dict[int, _Stretch] = {}
        self._changes: dict[str, list[Change]] = {"offset": [], "unit": []}
        self._above: dict[str, tuple[Any, int]] = {}
        self.repeated: list[tuple[int, int]] = []  # times (ns) that a clock showed twice, as it was set back

    def add(self, rows: pl.DataFrame) -> None:
        """Take rows in order: line, ns (UTC), local (ns), offset, unit, ambiguous, second, missing."""
        if rows.is_empty():
            return
        self.local = self.local or rows["offset"].null_count() > 0
        ambiguous = rows.filter("ambiguous")
        _collect(self._folds, ambiguous)
        if ambiguous["second"].any():
            self._resolved |= {*(ambiguous.filter("second")["local"] // HOUR).to_list()}
        _collect(self._missing, rows.filter("missing"))
        for name in ("offset", "unit"):
            self._notice(name, rows)

    def _notice(self, name: str, rows: pl.DataFrame) -> None:
        before, above = self._above.get(name, (rows[name][0], int(rows["ns"][0])))
        now = rows[name].fill_null("")
        if now.null_count() == 0 and before == now[0] and now.n_unique() == 1:
            self._above[name] = (now[-1], int(rows["ns"][-1]))
            return
        was = now.shift(1, fill_value=before or "")
        times = rows["ns"].shift(1, fill_value=above)
        changed = (was != now).arg_true()
        for at in changed.head(max(0, 1000 - len(self._changes[name]))):
            self._changes[name].append((int(rows["line"][at]), int(times[at]), int(rows["ns"][at]), was[at], now[at]))
        self._above[name] = (now[-1], int(rows["ns"][-1]))

    # -- findings -----------------------------------------------------------------------------------------------

    def findings(self, order: TimeOrder, duplicates: set[int]) -> list[Finding]:
        """What was found, and the rows that run backwards; ``duplicates`` are lines of rows that occur twice."""
        jumps = self._jumps(order, duplicates)
        changed = min((each.lines[0] for each in jumps if each.kind == "zone_change" and each.lines), default=None)
        found = [
            self._fold(hour, stretch)
            for hour, stretch in sorted(self._folds.items())
            # a clock that was set to another zone before has no such hour
            if changed is None or hour in self._resolved or stretch.first < changed
        ]
        found += [
            self._of("dst_gap", "warning", stretch, values={"zone": self.zone})
            for _, stretch in sorted(self._missing.items())
        ]
        for change in self._changes["offset"]:
            found += self._offset_change(change)
        for line, before, time, was, now in self._changes["unit"]:
            values = {"from": was or "dates", "to": now or "dates"}
            stretch = _Stretch(1, line, line, before, time)
            found.append(self._of("epoch_unit_change", "warning", stretch, values=values))
        return [*_limited(found), *_limited(jumps)]

    def _of(self, kind: str, severity: Any, rows: _Stretch, values: dict[str, Any] | None = None) -> Finding:
        return replace(
            self.about,
            kind=kind,
            severity=severity,
            start=iso(rows.start),
            end=iso(rows.end),
            lines=(rows.first, rows.last),
            count=rows.count,
            values=values,
        )

    def _fold(self, hour: int, rows: _Stretch) -> Finding:
        resolved = hour in self._resolved
        return self._of(
            "dst_fold",
            "information" if resolved else "warning",
            rows,
            {"zone": self.zone, "resolved_by_order": resolved},
        )

    def _offset_change(self, change: Change) -> list[Finding]:
        line, before, time, was, now = change
        if was and now:
            one, two = _offset(was), _offset(now)
            # the same offset under another name, or summer time that begins or ends where some zone has it
            if one == two or summer_time_zones(before, one, time, two):
                return []
        values = {"from": was or "none", "to": now or "none"}
        return [self._of("zone_change", "warning", _Stretch(1, line, line, before, time), values)]

    def _jumps(self, order: TimeOrder, duplicates: set[int]) -> list[Finding]:
        found: list[Finding] = []
        for (before, time), jumps in _grouped(order.jumps).items():
            lines = [jump.line for jump in jumps]
            rows = _Stretch(len(jumps), min(lines), max(lines), time, before)
            kind, severity, values = self._cause(jumps[0], order, duplicates)
            found.append(self._of(kind, severity, rows, values))
            if kind != "backward_jump":
                self.repeated.append((time, before))
        if order.backward > len(order.jumps):
            left = order.backward - len(order.jumps)
            found.append(replace(self.about, kind="backward_jump", severity="warning", count=left))
        return found

    def _cause(self, jump: Jump, order: TimeOrder, duplicates: set[int]) -> tuple[str, Any, dict[str, Any]]:
        """(kind, severity, values): summer time that ended, another zone, or neither."""
        back = jump.before - jump.time
        values: dict[str, Any] = {"back_s": back / SECOND}
        # a clock that was set back lost ``back`` and the step that passed meanwhile
        lost = back + jump.usual
        hours = round(lost / HOUR)
        exact = 1 <= hours <= 26 and abs(lost - hours * HOUR) <= max(SECOND, SLACK * jump.usual)
        if not exact or jump.line in duplicates or jump.usual >= HOUR or order.returns(jump):
            return "backward_jump", "warning" if back >= SECOND else "information", values
        zones = folding_zones(jump.time) if hours == 1 and self.zone is None and self.local else []
        if zones:
            return "dst_fold", "warning", {**values, "zone": None, "zones": zones[:5], "resolved_by_order": False}
        return "zone_change", "warning", {**values, "hours": -hours}


def _collect(stretches: dict[int, _Stretch], rows: pl.DataFrame) -> None:
    if rows.is_empty():
        return
    for hour, group in rows.group_by(pl.col("local") // HOUR, maintain_order=True):
        lines, times = group["line"], group["ns"]
        stretch = _Stretch(group.height, *map(int, (lines.min(), lines.max(), times.min(), times.max())))  # type: ignore[arg-type]
        key = int(hour[0])
        if key in stretches:
            stretches[key].add(stretch)
        else:
            stretches[key] = stretch


def _grouped(jumps: list[Jump]) -> dict[tuple[int, int], list[Jump]]:
    """Jumps of several channels at one time are one."""
    groups: dict[tuple[int, int], list[Jump]] = {}
    for jump in jumps:
        groups.setdefault((jump.before, jump.time), []).append(jump)
    return groups


def _limited(findings: list[Finding]) -> list[Finding]:
    """At most `NAMED` of each kind, the others of the kind as one."""
    kept: list[Finding] = []
    for kind in dict.fromkeys(each.kind for each in findings):
        same = [each for each in findings if each.kind == kind]
        kept += same[:NAMED]
        if rest := same[NAMED:]:
            lines = [line for each in rest for line in each.lines or ()]
            worst: Severity = "warning" if any(each.severity == "warning" for each in rest) else "information"
            kept.append(
                replace(
                    rest[0],
                    severity=worst,
                    start=min(each.start or "" for each in rest) or None,
                    end=max(each.end or "" for each in rest) or None,
                    lines=(min(lines), max(lines)) if lines else None,
                    count=sum(each.count for each in rest),
                    values={"further": len(rest)},
                )
            )
    return kept


def _offset(text: str) -> timedelta:
    plain = ABBREVIATIONS.get(text.upper(), "+0000" if text.upper() == "Z" else text).replace(":", "")
    match = re.fullmatch(r"([+-])(\d{2})(\d{2})?", plain)
    if match is None:
        return timedelta(0)
    size = timedelta(hours=int(match[2]), minutes=int(match[3] or 0))
    return -size if match[1] == "-" else size
