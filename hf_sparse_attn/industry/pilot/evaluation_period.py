"""The steps that detectors are judged on, of all assets together, and the measures of one detector."""

# Shapes: n steps of evaluation of all assets, T steps of one asset, B blocks, R draws, F faults.

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .alarm_metrics import alarm_steps, budget_threshold, check_scores, match_events
from .block_bootstrap import interval, ratio
from .detection_curves import BlockCurves, average_precision, segments
from .timeline import DAY, Array, Timeline

Bounds = dict[str, float | None]  # value, low, high, undefined


class Judging(Protocol):
    """What of the settings the measures depend on, in seconds."""

    @property
    def alarms_a_day(self) -> float: ...
    @property
    def cool_down(self) -> float: ...
    @property
    def ahead(self) -> float: ...
    @property
    def tolerance(self) -> float: ...


@dataclass(frozen=True)
class Measures:
    """Measures of one detector with intervals.

    Attributes:
        average_precision: area under precision and recall of steps.
        vus_pr: volume under that surface.
        event_f1: at the alarm budget, one alarm matched to one fault; others within its window count neither way.
        event_recall: share of faults with an alarm at the budget.
        lead_hours: median time from the first alarm of a fault to its start; negative: after it.
        alarms_a_day: at the threshold that keeps the budget in training: what a plant would see.
        alarms: raised at the budget.
        found: faults with an alarm.
        faults: in the evaluation.
    """

    average_precision: Bounds
    vus_pr: Bounds
    event_f1: Bounds
    event_recall: Bounds
    lead_hours: Bounds
    alarms_a_day: Bounds
    alarms: int
    found: int
    faults: int


class Evaluation:
    """Labels, blocks and draws that all detectors share.

    Args:
        timelines: the assets.
        settings: the budget and the tolerances.
        blocks: int64 [n], block of every step of evaluation, one asset after the other.
        weights: int64 [R, B], how often each block is drawn.
    """

    def __init__(self, timelines: list[Timeline], settings: Judging, blocks: Array, weights: Array) -> None:
        self.timelines, self.settings, self.weights = timelines, settings, weights
        self.windows = [_labelled_windows(t, settings.ahead) for t in timelines]
        self.labels = np.concatenate(
            [_marks(w, len(t))[t.test_from :] for t, w in zip(timelines, self.windows, strict=True)]
        )
        self.blocks = _with_whole_faults(blocks, self.labels)
        self.faults = sum(int((w[:, 1] > t.test_from).sum()) for t, w in zip(timelines, self.windows, strict=True))
        self.days = sum((len(t) - t.test_from) * t.step / DAY for t in timelines)
        lengths = np.concatenate([w[:, 1] - w[:, 0] for w in self.windows])
        # the paper's buffer is a typical anomaly; a tenth of the record at most
        self.most_width = min(int(np.median(lengths)), len(self.labels) // 10) if len(lengths) else 0

    def scaled(self, scores: list[Array]) -> list[Array]:
        """Scores [T] of every asset in units of their spread in training, so that assets can stand in one ranking."""
        if len(scores) == 1:
            return scores
        scaled = []
        for part, timeline in zip(scores, self.timelines, strict=True):
            train = part[: timeline.train_steps]
            center = np.median(train)
            spread = 1.4826 * np.median(np.abs(train - center)) or train.std() or 1.0
            scaled.append((part - center) / spread)
        return scaled

    def curves(self, scores: list[Array]) -> BlockCurves:
        """Precision and recall of scores [T] of every asset over the evaluation."""
        parts = [s[t.test_from :] for s, t in zip(scores, self.timelines, strict=True)]
        return BlockCurves(np.concatenate(parts), self.labels, self.blocks)

    def measure(self, scores: list[Array]) -> Measures:
        """All measures of scores [T] of every asset. Raises PlantDataError unless they are finite."""
        for part, timeline in zip(scores, self.timelines, strict=True):
            check_scores(part, len(timeline), f"scores of asset {timeline.asset!r}")
        curves, events = self.curves(scores), _Events(self, scores)
        precision = interval(curves.average_precision, self.weights)
        # the value is exact, the interval over a grid of thresholds
        precision["value"] = average_precision(curves.scores, self.labels) if self.labels.any() else None
        return Measures(
            average_precision=precision,
            vus_pr=interval(lambda w: curves.volume(w, self.most_width), self.weights),
            event_f1=interval(
                lambda w: ratio(2.0 * (w @ events.hits), w @ (events.hits + events.false + events.faults)), self.weights
            ),
            event_recall=interval(lambda w: ratio(w @ events.found, w @ events.faults), self.weights),
            lead_hours=interval(events.median_lead, self.weights),
            alarms_a_day=interval(lambda w: ratio(w @ events.trained_alarms, w @ events.days), self.weights),
            alarms=events.raised,
            found=int(events.found.sum()),
            faults=self.faults,
        )


class _Events:
    """Alarms and faults by block, float64 [B] each: ``hits`` alarms matched, ``false`` in no window, ``found`` faults
    with an alarm, ``trained_alarms`` at the threshold of training, ``days`` of record.
    """

    def __init__(self, shared: Evaluation, scores: list[Array]) -> None:
        self.blocks = shared.weights.shape[1]
        self.raised = 0
        self.hits, self.false, self.faults, self.found, self.trained_alarms, self.days = np.zeros((6, self.blocks))
        self.leads, self.lead_blocks, offset = np.zeros(0), np.zeros(0, np.int64), 0
        for part, timeline, windows in zip(scores, shared.timelines, shared.windows, strict=True):
            own = shared.blocks[offset : offset + len(timeline) - timeline.test_from]
            offset += len(own)
            self._add(part, timeline, windows, own, shared.settings)

    def _add(self, scores: Array, timeline: Timeline, windows: Array, blocks: Array, settings: Judging) -> None:
        cool, tolerance = timeline.steps_in(settings.cool_down), round(settings.tolerance * 1e9 / timeline.step)
        days = timeline.step / DAY
        train, test = scores[: timeline.train_steps], scores[timeline.test_from :]
        budget = [max(1, int(settings.alarms_a_day * len(part) * days)) for part in (train, test)]
        alarms = alarm_steps(test, budget_threshold(test, budget[1], cool), cool)
        trained = alarm_steps(test, budget_threshold(train, budget[0], cool), cool)
        faults = windows[windows[:, 1] > timeline.test_from] - timeline.test_from
        matching = match_events(alarms, faults, tolerance, tolerance)
        places = blocks[np.clip(faults[:, 0], 0, None)]
        for counts, where in (
            (self.hits, blocks[alarms[matching.alarm_hits]]),
            (self.false, blocks[alarms[matching.false_alarms]]),
            (self.faults, places),
            (self.found, places[matching.fault_hits]),
            (self.trained_alarms, blocks[trained]),
        ):
            np.add.at(counts, where, 1)
        np.add.at(self.days, blocks, days)
        self.raised += len(alarms)
        # leads count from the start of the fault itself, not of its labelled window
        known = ~np.isnan(matching.leads)
        ahead = round(settings.ahead * 1e9 / timeline.step)
        self.leads = np.append(self.leads, (matching.leads[known] + ahead) * days * 24)
        self.lead_blocks = np.append(self.lead_blocks, places[known])

    def median_lead(self, weights: Array) -> Array:
        """Median lead in hours for weights [R, B], NaN where no fault was met."""
        repeats = weights[:, self.lead_blocks].astype(np.int64)
        return np.array([np.median(np.repeat(self.leads, r)) if r.any() else np.nan for r in repeats])


def _with_whole_faults(blocks: Array, labels: Array) -> Array:
    """The same blocks, but a labelled window belongs to the one it starts in: no draw holds half a fault."""
    whole = blocks.copy()
    for first, last in zip(*segments(labels), strict=True):
        whole[first:last] = whole[first]
    return whole


def _labelled_windows(timeline: Timeline, ahead: float) -> Array:
    """First and last step (excluded) of every fault with ``ahead`` seconds before it, int64 [F, 2]."""
    windows = timeline.fault_steps()
    windows = windows[windows[:, 1] > windows[:, 0]]
    windows[:, 0] = np.maximum(windows[:, 0] - round(ahead * 1e9 / timeline.step), 0)
    return windows


def _marks(windows: Array, steps: int) -> Array:
    marks = np.zeros(steps + 1, np.int64)
    np.add.at(marks, windows[:, 0], 1)
    np.add.at(marks, windows[:, 1], -1)
    return np.cumsum(marks[:-1]) > 0
