"""What a cheap model gains on held-out time from context beyond the near one, and from the same context shuffled."""

# Shapes: T steps of the joint record, B blocks and one for the rest, m features, 2^m patterns of them, N effects.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...system.extras import needs_extra
from .block_bootstrap import drawn_weights, interval, ratio
from .cause_candidates import JointRecord
from .lag_scan import LagWindows, strongest
from .timeline import Array

with needs_extra("industry", "the pilot's cheap model"):
    from sklearn.linear_model import PoissonRegressor

FOLDS = 5  # stretches of time with equally many effects
MOST_LINKS = 3  # features of each of the two contexts
SHUFFLES = 19
RIDGE = 0.1  # of the coefficients, in effects
PRIOR = 2.0  # effects at a constant rate, added in training: a link that never failed there may fail later

Feature = tuple[str, int, int]  # candidate, first and last lag in steps, the last excluded


@dataclass(frozen=True)
class ContextGain:
    """Gain in bits an effect on held-out time, with an interval over blocks of time.

    ``multiple`` 1: over a constant rate; else over the near context. ``shuffled``: mean gain with far blocks shuffled;
    ``p``: share of shuffles that gain as much, the data itself counted in; both None where nothing was gained.
    """

    multiple: float
    gain: float
    low: float
    high: float
    shuffled: float | None = None
    p: float | None = None


class _Record:
    """A joint record with what all folds share: block and fold of every step."""

    def __init__(self, record: JointRecord, windows: LagWindows) -> None:
        self.record, self.windows, self.coverages = record, windows, windows.coverages(record)
        steps = np.arange(record.length)
        # block 0: heads of assets, shorter than a block
        self.block = record.block_of(steps) + 1
        self.blocks = len(record.blocks) + 1
        self.inside = np.zeros(record.length, bool)
        for first, last in record.spans:
            self.inside[first:last] = True
        effects = np.bincount(self.block[record.effects], minlength=self.blocks)
        before = np.cumsum(effects) - effects
        self.fold_of_block = np.minimum(before * FOLDS // max(len(record.effects), 1), FOLDS - 1)
        self.fold = self.fold_of_block[self.block]

    def strongest(self, effects: Array) -> dict[str, tuple[Array, Array]]:
        """`lag_scan.strongest` of some of the effects."""
        return strongest(self.record, self.windows, self.coverages, effects)

    def select(self, found: dict[str, tuple[Array, Array]], first: int, last: int) -> list[Feature]:
        """The strongest links with lags in [first, last) that pass a Bonferroni limit of 5 %."""
        allowed = (self.windows.first >= first) & (self.windows.last <= last)
        if not allowed.any() or not found:
            return []
        limit = np.log10(len(found) * allowed.sum() / 0.05)
        ranked = sorted(
            (
                (float(statistic[w]), name, int(w))
                for name, (statistic, _) in found.items()
                for w in np.flatnonzero(allowed & (statistic > limit))
            ),
            reverse=True,
        )
        chosen: list[Feature] = []
        for _, name, w in ranked:
            feature = (name, int(self.windows.first[w]), int(self.windows.last[w]))
            if len(chosen) < MOST_LINKS and not any(_overlap(feature, other) for other in chosen):
                chosen.append(feature)
        return chosen

    def present(self, feature: Feature) -> Array:
        """Bool [T]: a step has the candidate in the window of lags before it."""
        name, first, last = feature
        marks = np.zeros(self.record.length + 1, np.int64)
        for shift, sign in ((first, 1), (last, -1)):
            np.add.at(marks, np.minimum(self.record.causes[name] + shift, self.record.length), sign)
        return np.cumsum(marks[:-1]) > 0


def _overlap(a: Feature, b: Feature) -> bool:
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]


# λ(t) = exp(β₀ + Σ β_k x_k(t)), x_k(t) = 1 if candidate k lies in its window of lags before step t; ridge on β_k.
# Gain of a block = Σ_effects log2(λ / λ') − Σ_steps (λ − λ') / ln 2: log-likelihood of a Poisson process, in bits
def _rates(counts: Array, effects: Array, features: int) -> Array:
    """Rate of an effect a step for every pattern, from steps [2^m] and effects [2^m] of training."""
    effects = effects + PRIOR * counts / counts.sum()
    overall = effects.sum() / counts.sum()
    if not features:
        return np.full(len(counts), overall)
    bits = (np.arange(len(counts))[:, None] >> np.arange(features)) & 1
    seen = counts > 0
    # relative to the overall rate: the solver's tolerance knows no rates of 1e-5
    expected = counts[seen] * overall
    model = PoissonRegressor(alpha=RIDGE / effects.sum(), solver="newton-cholesky", tol=1e-8)
    model.fit(bits[seen], effects[seen] / expected, sample_weight=expected)
    rates: Array = overall * model.predict(bits)
    return rates


def _block_scores(shared: _Record, columns: list[Array], fold: int) -> tuple[Array, Array]:
    """(Σ log2 λ over effects, Σ λ over steps) of every block of ``fold``, float64 [B] each, 0 elsewhere."""
    code = sum(
        (column.astype(np.int64) << n for n, column in enumerate(columns)), np.zeros(shared.record.length, np.int64)
    )
    size = 1 << len(columns)
    place = shared.block * size + code
    steps = np.bincount(place[shared.inside], minlength=shared.blocks * size).reshape(-1, size)
    effects = np.bincount(place[shared.record.effects], minlength=shared.blocks * size).reshape(-1, size)
    held = shared.fold_of_block == fold
    rates = _rates(steps[~held].sum(0), effects[~held].sum(0), len(columns))
    logs = np.where(held, (effects * np.log2(np.maximum(rates, 1e-12))).sum(1), 0)
    return logs, np.where(held, (steps * rates).sum(1), 0)


class _Fold:
    """A held-out stretch of time: the effects outside of it, and the model of the near context fitted there."""

    def __init__(self, shared: _Record, number: int, near: int) -> None:
        self.shared, self.number = shared, number
        self.effects = shared.record.effects[shared.fold[shared.record.effects] != number]
        links = shared.select(shared.strongest(self.effects), 1, near) if len(self.effects) else []
        self.near = [shared.present(feature) for feature in links]
        self.near_scores = _block_scores(shared, self.near, number)

    def gain_over(self, base: tuple[Array, Array], columns: list[Array]) -> Array:
        """Gain in bits of the model with ``columns`` over one with the scores ``base``, by block, float64 [B]."""
        logs, mass = _block_scores(self.shared, columns, self.number)
        gain: Array = logs - base[0] - (mass - base[1]) / np.log(2)
        return gain

    def gains(self, near: int, contexts: list[int], order: Array | None) -> Array:
        """Gain of each context over the near one by block, float64 [contexts, B]; with ``order`` far history is that of
        other blocks.
        """
        record, shared = self.shared.record, self.shared
        gains = np.zeros((len(contexts), shared.blocks))
        if not len(self.effects):
            return gains
        found = shared.strongest(self.effects if order is None else record.moved(self.effects, order))
        where = slice(None) if order is None else record.moved(np.arange(record.length), order)
        chosen: list[Feature] = []
        for n, most in enumerate(contexts):
            far, before = shared.select(found, near, most), chosen
            if far == before and n:
                gains[n] = gains[n - 1]
            elif far:
                gains[n] = self.gain_over(self.near_scores, self.near + [shared.present(f)[where] for f in far])
            chosen = far
        return gains


def context_gains(
    record: JointRecord, near: int, multiples: tuple[float, ...], *, level: float = 0.95, seed: int = 0
) -> list[ContextGain]:
    """Gains of the contexts ``near`` × 1 and × each of ``multiples``, on five held-out stretches of time.

    Links are chosen and fitted on the other four. Intervals are at ``level`` for all multiples together (Bonferroni).
    """
    shared = _Record(record, LagWindows(round(near * max(multiples))))
    folds = [_Fold(shared, number, near) for number in range(FOLDS)]
    contexts = [round(near * multiple) for multiple in multiples]
    rng, counts = np.random.default_rng(seed), np.bincount(shared.block[record.effects], minlength=shared.blocks)
    weights = drawn_weights(shared.blocks, seed)
    by_block = sum((f.gains(near, contexts, None) for f in folds), np.zeros((len(contexts), shared.blocks)))
    shuffled = np.zeros((0, len(contexts)))
    if (by_block.sum(1) > 0).any():
        orders = [record.shuffled(rng) for _ in range(SHUFFLES)]
        totals = [[f.gains(near, contexts, order).sum(1) for f in folds] for order in orders]
        shuffled = np.sum(totals, 1) / len(record.effects)
    constant = sum((f.gain_over(_block_scores(shared, [], f.number), f.near) for f in folds), np.zeros(shared.blocks))
    level = 1 - (1 - level) / len(multiples)
    gains = [_interval(1.0, constant, counts, weights, level, None)]
    for n, multiple in enumerate(multiples):
        gains.append(
            _interval(multiple, by_block[n], counts, weights, level, shuffled[:, n] if len(shuffled) else None)
        )
    return gains


def _interval(
    multiple: float, by_block: Array, counts: Array, weights: Array, level: float, shuffled: Array | None
) -> ContextGain:
    """From gains and numbers of effects by block [B], with gains an effect of every shuffle."""
    bounds = interval(lambda w: ratio(w @ by_block, (w @ counts).astype(np.float64)), weights, level)
    gain, low, high = (float(bounds[name] or 0.0) for name in ("value", "low", "high"))
    if shuffled is None or gain <= 0:
        return ContextGain(multiple, gain, low, high)
    p = (1 + int((shuffled >= gain).sum())) / (1 + len(shuffled))
    return ContextGain(multiple, gain, low, high, float(shuffled.mean()), p)
