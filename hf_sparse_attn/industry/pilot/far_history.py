"""Does history beyond the near context say anything about what is to come on these assets?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import PlantDataError
from .cause_candidates import JointRecord, joint_record
from .context_gain import ContextGain, context_gains
from .lag_scan import LagLink, LagWindows, evidence, scan
from .timeline import Timeline

LONGEST_LAG = 1 / 4  # of a record: a lag has to fit several times for a coincidence to show


@dataclass(frozen=True)
class FarHistory:
    """Result of `far_history`. Times in seconds.

    Attributes:
        effects: how many faults (or events of the target) were to be explained.
        near: the near context.
        longest: the longest lag that was looked at.
        block: length of the blocks that were shuffled.
        candidates: possible causes that were looked at.
        shuffles: of the scan.
        anywhere, far: strongest link at any lag, and beyond the near context; None without candidates.
        gains: of the cheap model, by multiple of the near context.
        detectable: smallest share of effects with a cause in the far history that this record would have shown, for a
            cause as rare as the effects at the middle of the far lags; None if none would.
    """

    effects: int
    near: float
    longest: float
    block: float
    candidates: int
    shuffles: int
    anywhere: LagLink | None
    far: LagLink | None
    gains: tuple[ContextGain, ...]
    detectable: float | None


def far_history(
    timelines: list[Timeline],
    *,
    near_seconds: float = 6 * 3600.0,
    multiples: tuple[float, ...] = (4, 16, 64),
    target: str | None = None,
    level: float = 0.01,
    seed: int = 0,
) -> FarHistory:
    """Scan all candidates at all lags, and measure what a cheap model gains from contexts beyond the near one.

    Multiples beyond a quarter of the shortest record are cut to it.

    Raises:
        PlantDataError: the near context is not shorter than a quarter of the shortest record, or timelines differ.
    """
    near, reached = _contexts(timelines, near_seconds, multiples)
    longest = round(near * reached[-1])
    record = joint_record(timelines, longest, target)
    found = scan(record, longest, near, level=level, seed=seed)
    gains = context_gains(record, near, reached, seed=seed) if len(record.effects) and record.causes else []
    return FarHistory(
        effects=len(record.effects),
        near=near * record.step_seconds,
        longest=longest * record.step_seconds,
        block=record.block * record.step_seconds,
        candidates=len(record.causes),
        shuffles=found.shuffles,
        anywhere=found.anywhere,
        far=found.far,
        gains=tuple(gains),
        detectable=_detectable(record, near, longest, found.critical),
    )


def _contexts(
    timelines: list[Timeline], near_seconds: float, multiples: tuple[float, ...]
) -> tuple[int, tuple[float, ...]]:
    """(Steps of the near context, multiples of it that the record reaches)."""
    if not timelines:
        raise PlantDataError("no timeline was given", ["build one with timeline_from_dataset or timeline_from_csv"])
    if not multiples or not all(multiple > 1 for multiple in multiples):
        raise PlantDataError(
            f"multiples of the near context: {multiples}", ["name at least one, all above 1", "leave them out"]
        )
    near, quarter = timelines[0].steps_in(near_seconds), int(min(map(len, timelines)) * LONGEST_LAG)
    if near >= quarter:
        raise PlantDataError(
            f"the near context of {near} steps is no shorter than a quarter of the record, {quarter} steps",
            ["take a shorter near context", "take a longer record", "leave short assets out"],
        )
    return near, tuple(sorted({min(multiple, quarter / near) for multiple in multiples}))


def _detectable(record: JointRecord, near: int, longest: int, critical: float) -> float | None:
    effects = len(record.effects)
    if not effects or not np.isfinite(critical):
        return None
    windows = LagWindows(longest)
    # the narrow window nearest to the geometric middle of the far lags
    middle = int(np.abs(np.log(windows.first / np.sqrt(near * longest))).argmin())
    covered = effects * (windows.last[middle] - windows.first[middle]) / record.steps
    enough = np.flatnonzero(evidence(np.arange(effects + 1), np.array(covered), effects) > critical)
    return float(enough[0] / effects) if len(enough) else None
