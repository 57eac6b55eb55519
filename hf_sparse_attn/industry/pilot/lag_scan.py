"""Which candidate comes before the effects, and how long before: all candidates × all lags, family-wise."""

# Shapes: N effects, E edges of lags, W windows of lags, P shuffles.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...system.extras import needs_extra
from .cause_candidates import JointRecord
from .timeline import Array

with needs_extra("industry", "a pilot"):
    from scipy.stats import binom

RATIO = 1.07  # of neighbouring edges
SPANS = (2, 4, 8)  # edges that a window covers: 14, 31 and 72 %
SHUFFLES = 499
CALENDAR_SHUFFLES = 50  # that say how often a candidate meets an effect by the hours and weekdays of both
PRIOR = 5.0  # shuffles that the plain coverage counts for, beside these
STOP = 20  # shuffles at least as good as the data, after which more change nothing (Besag & Clifford 1991)
BATCH = 2_000_000  # lookups at a time


@dataclass(frozen=True)
class LagLink:
    """A candidate that precedes the effects at one lag more often than its rate explains.

    ``lag``, ``low``, ``high``: median and 10 and 90 % quantile in seconds; ``hits`` of ``effects`` have it before them,
    ``expected`` by its rate alone; ``p`` is family-wise, by shuffled blocks.
    """

    source: str
    lag: float
    low: float
    high: float
    hits: int
    effects: int
    expected: float
    statistic: float
    p: float


@dataclass(frozen=True)
class Scan:
    """``anywhere``: the strongest link at any lag; ``far``: beyond the near context; ``critical``: statistic that a far
    link needs for ``level``; ``shuffles`` that were made.
    """

    anywhere: LagLink | None
    far: LagLink | None
    critical: float
    shuffles: int


class LagWindows:
    """Windows [edges[i], edges[i + span]) of lags in steps, in order of ``SPANS``."""

    def __init__(self, most_lag: int) -> None:
        count = int(np.log(most_lag) / np.log(RATIO)) + 1
        self.edges = np.unique(np.round(RATIO ** np.arange(count + 1)).astype(np.int64))
        self.edges = self.edges[self.edges <= most_lag]
        self.first = np.concatenate([self.edges[:-span] for span in SPANS])
        self.last = np.concatenate([self.edges[span:] for span in SPANS])

    def hits(self, causes: Array, effects: Array) -> Array:
        """How many of ``effects`` [P, N] have a cause in each window before them, int64 [P, W]."""
        at = np.searchsorted(causes, effects[..., None] - self.edges, side="right")
        return np.concatenate([(at[..., :-span] > at[..., span:]).sum(1) for span in SPANS], -1)

    def coverages(self, record: JointRecord) -> dict[str, Array]:
        """`coverage` of every candidate."""
        return {name: self.coverage(record, causes) for name, causes in record.causes.items()}

    def coverage(self, record: JointRecord, causes: Array) -> Array:
        """Share of the record's steps that have a cause in each window before them, float64 [W]."""
        end = record.spans[np.searchsorted(record.spans[:, 0], causes, side="right") - 1, 1]
        apart = np.append(np.diff(causes), record.length)
        reach = np.minimum((self.last - self.first)[:, None], apart)
        covered: Array = np.clip(end - causes - self.first[:, None], 0, reach).sum(1)
        return covered / record.steps


# statistic = −log10 P(X ≥ hits), X binomial with N effects and the coverage. It only ranks: p comes from the largest
# statistic over all candidates and windows when blocks are shuffled (Westfall & Young 1993)
def evidence(hits: Array, coverage: Array, effects: int) -> Array:
    """The statistic of ``hits`` of ``effects``, float64 of their shape."""
    with np.errstate(divide="ignore"):
        tail = binom.logsf(hits - 1, effects, np.clip(coverage, 1e-12, 1))
    statistic: Array = -np.maximum(tail, -1e4) / np.log(10)
    return statistic


def strongest(
    record: JointRecord, windows: LagWindows, coverages: dict[str, Array], effects: Array
) -> dict[str, tuple[Array, Array]]:
    """For every candidate (statistic [W], hits [W]) with ``effects`` [N]."""
    hits = {name: windows.hits(causes, effects[None])[0] for name, causes in record.causes.items()}
    return {name: (evidence(h, coverages[name], len(effects)), h) for name, h in hits.items()}


def scan(record: JointRecord, most_lag: int, near: int, *, level: float = 0.01, seed: int = 0) -> Scan:
    """Scan all candidates and lags from 1 to ``most_lag`` steps; far is from ``near`` steps on."""
    windows = LagWindows(most_lag)
    far = windows.first >= near
    coverages = windows.coverages(record)
    if not coverages or not len(record.effects):
        return Scan(None, None, float("inf"), 0)
    coverages = by_calendar(record, windows, coverages, record.effects, seed)
    found = strongest(record, windows, coverages, record.effects)
    best = _best(found, np.ones_like(far)), _best(found, far)
    nulls = _null_maxima(record, windows, coverages, far, [statistic for *_, statistic in best], seed)
    links = [
        _link(
            record, windows, coverages[at[0]], found[at[0]][1], at, p=(1 + int((null >= at[2]).sum())) / (1 + len(null))
        )
        for at, null in zip(best, nulls, strict=True)
    ]
    return Scan(links[0], links[1] if far.any() else None, float(np.quantile(nulls[1], 1 - level)), len(nulls[0]))


# Machines fail while they run, and start and stop by the clock: a candidate with that rhythm meets most effects at some
# lag, and against its plain coverage it would hide a rare one. The shuffles are drawn as those of the null,
# so that data and shuffles stay exchangeable.
def by_calendar(
    record: JointRecord, windows: LagWindows, coverages: dict[str, Array], effects: Array, seed: int
) -> dict[str, Array]:
    """Share of shuffled ``effects`` [N] that have a cause in each window before them, float64 [W] by candidate."""
    # other draws than those of the null
    rng = np.random.default_rng([seed, 1])
    moved = np.stack([record.moved(effects, record.shuffled(rng)) for _ in range(CALENDAR_SHUFFLES)])
    shares = {}
    for name, causes in record.causes.items():
        met = windows.hits(causes, moved).sum(0) / len(effects)
        shares[name] = (met + PRIOR * coverages[name]) / (CALENDAR_SHUFFLES + PRIOR)
    return shares


def _best(found: dict[str, tuple[Array, Array]], allowed: Array) -> tuple[str, int, float]:
    """(Candidate, window, statistic) of the largest statistic in the allowed windows."""
    tops = {name: np.where(allowed, statistic, -1.0) for name, (statistic, *_) in found.items()}
    name = max(tops, key=lambda n: tops[n].max())
    return name, int(tops[name].argmax()), float(tops[name].max())


def _null_maxima(
    record: JointRecord,
    windows: LagWindows,
    coverages: dict[str, Array],
    far: Array,
    observed: list[float],
    seed: int,
) -> tuple[Array, Array]:
    """Largest statistics at any lag and beyond the near context, float64 [P] each, with shuffled effects."""
    rng, size = np.random.default_rng(seed), len(record.effects)
    batch = max(1, BATCH // (size * len(windows.edges)))
    counts = np.arange(size + 1)
    tables = {n: evidence(counts, c[:, None], size).astype(np.float32) for n, c in coverages.items()}
    column, maxima = np.arange(len(far)), np.zeros((0, 2))
    while len(maxima) < SHUFFLES:
        count = min(batch, SHUFFLES - len(maxima), 50)
        moved = np.stack([record.moved(record.effects, record.shuffled(rng)) for _ in range(count)])
        top = np.zeros((count, 2))
        for name, causes in record.causes.items():
            statistic = tables[name][column, windows.hits(causes, moved)]
            top[:, 0] = np.maximum(top[:, 0], statistic.max(1))
            top[:, 1] = np.maximum(top[:, 1], np.where(far, statistic, 0).max(1))
        maxima = np.concatenate([maxima, top])
        if ((maxima >= observed).sum(0) >= STOP).all():
            break
    return maxima[:, 0], maxima[:, 1]


def _link(
    record: JointRecord, windows: LagWindows, coverage: Array, hits: Array, best: tuple[str, int, float], p: float
) -> LagLink:
    name, window, statistic = best
    causes, effects = record.causes[name], record.effects
    # lags that straddle the window's edge belong to the same link
    low, high = windows.first[window] / RATIO, windows.last[window] * RATIO
    ends = np.searchsorted(causes, effects[:, None] - np.array([high, low]), side="right")
    inside = np.concatenate([effect - causes[a:b] for effect, (a, b) in zip(effects, ends, strict=True)])
    quantiles = np.quantile(inside, [0.5, 0.1, 0.9]) if len(inside) else (windows.first[window],) * 3
    return LagLink(
        source=name,
        lag=float(quantiles[0]) * record.step_seconds,
        low=float(quantiles[1]) * record.step_seconds,
        high=float(quantiles[2]) * record.step_seconds,
        hits=int(hits[window]),
        effects=len(effects),
        expected=float(coverage[window]) * len(effects),
        statistic=statistic,
        p=p,
    )
