"""Detectors on log events: a template that is new or rare, counts outside the usual subspace, unlikely sequences."""

# Shapes: T steps, K kinds of events, E events in order.

from __future__ import annotations

import numpy as np

from ..timeline import Array, Timeline
from .detector_base import HOUR, EventDetector, trailing_sum

CHUNK = 65_536  # steps whose features are held at a time
REPEATS = 3  # of one kind in one step that a sequence holds


class NewTemplate(EventDetector):
    """Rarity of the rarest event of a step: −log of its share of the training's events, most for one never seen."""

    name = "new template"

    def fit(self, train: Timeline) -> NewTemplate:
        totals = train.counts.sum(0, dtype=np.int64)
        self.rarity = -np.log((totals + 1) / (totals.sum() + len(totals)))
        return self

    def scores(self, timeline: Timeline) -> Array:
        rarest: Array = np.where(timeline.counts > 0, self.rarity, 0.0).max(1)
        return rarest


# SPE = |(I − P Pᵀ) y|², P the components that hold 95 % of the variance of y = scaled log counts of a trailing hour, at
# most half of them: independent kinds would leave no rest. Xu, Huang, Fox, Patterson, Jordan, SOSP 2009
class EventCountPca(EventDetector):
    """Squared distance of the trailing hour's event counts from the subspace of training."""

    name = "event-count PCA"

    def fit(self, train: Timeline) -> EventCountPca:
        rows = self._log_counts(train)
        self.center, spread = rows.mean(0), rows.std(0)
        # a kind that training never saw weighs as the rarest that it saw
        self.spread = np.where(spread > 0, spread, spread[spread > 0].min(initial=1.0))
        scaled = (rows - self.center) / self.spread
        variances, vectors = np.linalg.eigh(scaled.T @ scaled)
        shares = np.cumsum(variances[::-1]) / max(variances.sum(), 1e-12)
        kept = min(int(np.searchsorted(shares, 0.95)) + 1, len(shares) // 2)
        self.components = vectors[:, ::-1][:, :kept]
        return self

    def scores(self, timeline: Timeline) -> Array:
        rows, scores = self._log_counts(timeline), np.empty(len(timeline))
        for at in range(0, len(rows), CHUNK):
            scaled = (rows[at : at + CHUNK] - self.center) / self.spread
            rest = scaled - scaled @ self.components @ self.components.T
            scores[at : at + CHUNK] = (rest**2).sum(1)
        return scores

    def _log_counts(self, timeline: Timeline) -> Array:
        return np.log1p(trailing_sum(timeline.counts, timeline.steps_in(HOUR)))


# p(c | a b) = .6 n(abc)/n(ab) + .3 n(bc)/n(b) + .1 (n(c) + 1)/(E + K): interpolation, Jelinek & Mercer 1980
class EventNgram(EventDetector):
    """Largest surprise (−log p) of a step's events under a trigram model of training.

    Within a step events stand by the number of their kind, as their order is not known; at most 3 of one kind count.
    """

    name = "n-gram of events"

    def fit(self, train: Timeline) -> EventNgram:
        _, kinds = _sequence(train)
        self.kinds = len(train.templates) + 1  # one more for the start
        self.tables = [np.unique(code, return_counts=True) for code in self._codes(kinds)]
        self.contexts = [np.unique(code, return_counts=True) for code in self._codes(kinds, contexts=True)]
        self.events = len(kinds)
        return self

    def scores(self, timeline: Timeline) -> Array:
        steps, kinds = _sequence(timeline)
        one, two, three = (_count(t, c) for t, c in zip(self.tables, self._codes(kinds), strict=True))
        by_two, by_three = (_count(t, c) for t, c in zip(self.contexts, self._codes(kinds, contexts=True), strict=True))
        likely = 0.1 * (one + 1) / (self.events + self.kinds)
        likely += 0.3 * two / np.maximum(by_two, 1) + 0.6 * three / np.maximum(by_three, 1)
        scores = np.zeros(len(timeline))
        np.maximum.at(scores, steps, -np.log(likely))
        return scores

    def _codes(self, kinds: Array, contexts: bool = False) -> list[Array]:
        """A number for every event's unigram, bigram and trigram, or for the contexts of the last two."""
        start = self.kinds - 1
        before = np.concatenate([[start], kinds[:-1]]) if len(kinds) else kinds
        earlier = np.concatenate([[start], before[:-1]]) if len(kinds) else kinds
        if contexts:
            return [before, earlier * self.kinds + before]
        return [kinds, before * self.kinds + kinds, (earlier * self.kinds + before) * self.kinds + kinds]


def _sequence(timeline: Timeline) -> tuple[Array, Array]:
    """(Step, kind) of every event, int64 [E] each."""
    steps, kinds = np.nonzero(timeline.counts)
    repeats = np.minimum(timeline.counts[steps, kinds], REPEATS)
    return np.repeat(steps, repeats), np.repeat(kinds, repeats)


def _count(table: tuple[Array, Array], codes: Array) -> Array:
    """How often training held each of ``codes``."""
    known, counts = table
    at = np.searchsorted(known, codes).clip(0, len(known) - 1)
    return np.where(known[at] == codes, counts[at], 0)
