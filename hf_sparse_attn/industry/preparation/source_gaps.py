"""Gaps that all channels of a file share are one gap of the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..findings import Finding, Severity

SAME = 1.5  # usual intervals within which gaps of two channels begin and end together


def gaps_by_source(findings: Sequence[Finding], channels: dict[str, int]) -> list[Finding]:
    """The same findings, with gaps that every channel of a file has at the same time as one, without channel.

    Args:
        findings: of one asset.
        channels: how many channels with numbers each file has, by its path.
    """
    kept = [finding for finding in findings if finding.kind != "gap" or finding.source is None]
    gaps = [finding for finding in findings if finding.kind == "gap" and finding.source is not None]
    for path in dict.fromkeys(finding.source for finding in gaps):
        mine = sorted((gap for gap in gaps if gap.source == path), key=lambda gap: str(gap.start))
        for together in _together(mine):
            whole = len({gap.channel for gap in together}) == channels.get(str(path), 0) > 1
            kept += [_merged(together)] if whole else together
    return kept


def _together(gaps: list[Finding]) -> list[list[Finding]]:
    groups: list[list[Finding]] = []
    for gap in gaps:
        if groups and _same(groups[-1][0], gap):
            groups[-1].append(gap)
        else:
            groups.append([gap])
    return groups


def _same(one: Finding, other: Finding) -> bool:
    usual = max(float((gap.values or {}).get("usual_seconds", 0.0)) for gap in (one, other))
    begins, ends = (
        abs(_seconds(first) - _seconds(second)) for first, second in ((one.start, other.start), (one.end, other.end))
    )
    return max(begins, ends) <= SAME * usual


def _seconds(text: str | None) -> float:
    return float(np.datetime64(str(text).removesuffix("Z"), "ns").astype(np.int64)) / 1e9


def _merged(gaps: list[Finding]) -> Finding:
    longest = max(gaps, key=lambda gap: float((gap.values or {})["seconds"]))
    lines = [gap.lines for gap in gaps if gap.lines is not None]
    worst: Severity = "warning" if any(gap.severity == "warning" for gap in gaps) else "information"
    return replace(
        longest,
        channel=None,
        severity=worst,
        lines=(min(first for first, _ in lines), max(last for _, last in lines)) if lines else None,
        count=sum(gap.count for gap in gaps),
        values={**(longest.values or {}), "channels": len(gaps)},
    )
