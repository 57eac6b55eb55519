"""Possible causes as points in time: rare events, bursts of frequent ones, shifts of a sensor; several assets as one
record whose blocks of time can be shuffled.
"""

# Shapes: T steps, C channels, B blocks, A assets.

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..errors import PlantDataError
from .baseline_detectors.detector_base import HOUR, StateScaler, filled_z, sample_rows, trailing_sum
from .timeline import DAY, Array, Timeline

BUSY = 0.01  # share of steps with an event of a kind from which on its bursts stand for it
LEAST_CAUSES = 3  # below that a coincidence of lags says nothing
MOST_SHIFTS = 200  # of one channel, width and direction, the largest
SHIFT_SIGMAS = 3.0  # of a shift's statistic
SHIFT_WIDTHS = (HOUR, 6 * HOUR)  # seconds over which a shift is averaged
GROUP = 8  # blocks among which blocks are shuffled, at least
LEAST_BLOCKS = 16
MOST_EFFECTS = 400  # a draw of more than that: the scan's time grows with their number


def event_causes(timeline: Timeline) -> dict[str, Array]:
    """Steps of every kind of event, by its name; of frequent kinds the steps in which a burst starts."""
    causes = {}
    for kind, counts in zip(timeline.templates, timeline.counts.T, strict=True):
        steps = np.flatnonzero(counts)
        if len(steps) > BUSY * len(timeline):
            hourly = trailing_sum(counts, timeline.steps_in(HOUR))
            above = hourly > np.quantile(hourly, 1 - BUSY / 10)
            causes[f"burst of {kind}"] = np.flatnonzero(above & ~np.append(False, above[:-1]))
        else:
            causes[kind] = steps
    return causes


# s(t) = mean z over the last w steps − mean z over the 3 w steps before them, in units of its median absolute deviation
def shift_causes(timeline: Timeline) -> dict[str, Array]:
    """First steps of level shifts of every channel, up and down, by name.

    z is scaled by operating state, and its median by hour of the day is taken out.
    """
    z, causes = StateScaler().fit(timeline).z(timeline), {}
    hours = timeline.times % DAY // (DAY // 24)
    for name, column in zip(timeline.channels, z.T, strict=True):
        level = np.clip(filled_z(column), -8, 8)
        level = (
            level - np.array([np.median(level[hours == h]) if (hours == h).any() else 0.0 for h in range(24)])[hours]
        )
        for seconds in SHIFT_WIDTHS:
            width = timeline.steps_in(seconds)
            if 8 * width > len(level):
                continue
            last, longer = trailing_sum(level, width), trailing_sum(level, 4 * width)
            shift = last / width - (longer - last) / (3 * width)
            shift[: 4 * width] = 0
            shift /= 1.4826 * np.median(np.abs(shift)) or 1.0
            for word, signed in (("rises", shift), ("falls", -shift)):
                # a window that is full of the shift began ``width`` steps ago
                causes[f"{name} {word} ({seconds / HOUR:g} h)"] = _peaks(signed, width) - width + 1
    return causes


def _peaks(statistic: Array, apart: int) -> Array:
    """Steps of the largest values above the limit, at least ``apart`` steps from each other."""
    above = np.flatnonzero(statistic > SHIFT_SIGMAS)
    # one candidate of every run: the largest
    runs = np.split(above, np.flatnonzero(np.diff(above) > apart) + 1) if len(above) else []
    tops = np.array([run[np.argmax(statistic[run])] for run in runs], np.int64)
    return np.sort(tops[np.argsort(-statistic[tops], kind="stable")][:MOST_SHIFTS])


@dataclass(frozen=True, eq=False)
class JointRecord:
    """Assets laid end to end, further apart than any lag that is looked at.

    Attributes:
        length: steps, the gaps included.
        spans: int64 [A, 2], first and last step (excluded) of every asset.
        effects: steps in which what is to be explained happens, sorted; a draw of 400 where there are more.
        causes: steps of every candidate by name, sorted.
        blocks: int64 [B], first steps of the blocks; they end at the end of their asset, what remains is its head.
        groups: int64 [B], blocks of one group may be exchanged: neighbours in time, of one operating state.
        block: steps of a block.
        step_seconds: length of a step.
    """

    length: int
    spans: Array
    effects: Array
    causes: dict[str, Array]
    blocks: Array
    groups: Array
    block: int
    step_seconds: float

    @property
    def steps(self) -> int:
        """Steps of the assets, without the gaps."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    def block_of(self, steps: Array) -> Array:
        """Number of the block of every step, −1 in an asset's head or a gap."""
        at = np.searchsorted(self.blocks, steps, side="right") - 1
        return np.where((at >= 0) & (steps < self.blocks[at] + self.block), at, -1)

    def shuffled(self, rng: np.random.Generator) -> Array:
        """For every block the block whose place it takes, int64 [B]."""
        order = np.arange(len(self.blocks))
        for group in np.unique(self.groups):
            members = np.flatnonzero(self.groups == group)
            order[members] = rng.permutation(members)
        return order

    def moved(self, steps: Array, order: Array) -> Array:
        """Where ``steps`` lie when every block takes the place that ``order`` gives it; heads stay."""
        at = self.block_of(steps)
        return np.where(at >= 0, steps - self.blocks[at] + self.blocks[order[at]], steps)


def block_steps(timelines: list[Timeline]) -> int:
    """Steps of a block: a day, a week or four weeks, the first that exceeds the autocorrelation of the daily number of
    events and leaves at least 16 blocks; a sixteenth of a record of less than 16 days.
    """
    step, total = timelines[0].step, sum(map(len, timelines))
    memory = max(_memory_days(t) for t in timelines)
    fitting = [days for days in (1, 7, 28) if total * step >= LEAST_BLOCKS * days * DAY]
    if not fitting:
        return max(1, total // LEAST_BLOCKS)
    longer = [days for days in fitting if days >= memory]
    # a week holds what repeats weekly: taken where the record is long
    days = max(longer[0], 7) if longer and total * step >= 24 * 7 * DAY else (longer or fitting[-1:])[0]
    return max(1, round(days * DAY / step))


def _memory_days(timeline: Timeline) -> int:
    """First lag in days at which the daily number of events no longer correlates with itself (1.96 / √n)."""
    size = max(1, round(DAY / timeline.step))
    days = len(timeline) // size
    activity = timeline.counts[: days * size].sum(1, dtype=np.int64).reshape(days, size).sum(1).astype(np.float64)
    activity -= activity.mean() if days else 0
    variance = float(activity @ activity)
    if days < 4 or not variance:
        return 1
    limit = 1.96 / np.sqrt(days)
    return next((k for k in range(1, days) if activity[k:] @ activity[:-k] / variance < limit), days)


def joint_record(timelines: list[Timeline], most_lag: int, target: str | None = None) -> JointRecord:
    """Lay timelines end to end, ``most_lag`` steps apart.

    ``target``: None for the starts of faults, else a kind of event.

    Raises:
        PlantDataError: the timelines have different steps, or no timeline knows the kind of event.
    """
    _check_alike(timelines, target)
    block, offset, group = block_steps(timelines), 0, 0
    causes: dict[str, list[Array]] = {}
    spans, effects, blocks, groups = [], [], [], []
    for timeline in timelines:
        steps = timeline.onsets() if target is None else _kind_steps(timeline, target)
        effects.append(steps + offset)
        for name, own in {**event_causes(timeline), **shift_causes(timeline)}.items():
            causes.setdefault(name, []).append(own + offset)
        firsts = np.arange(len(timeline) - block, -1, -block)[::-1]
        numbers = group + _block_groups(timeline, firsts, block)
        group = int(numbers.max(initial=group)) + 1
        blocks.append(firsts + offset)
        groups.append(numbers)
        spans.append([offset, offset + len(timeline)])
        offset += len(timeline) + most_lag
    joined = {name: np.concatenate(parts) for name, parts in causes.items()}
    return JointRecord(
        length=offset - most_lag,
        spans=np.array(spans, np.int64),
        effects=_at_most(np.concatenate(effects)),
        causes={name: steps for name, steps in joined.items() if len(steps) >= LEAST_CAUSES and name != target},
        blocks=np.concatenate(blocks),
        groups=np.concatenate(groups),
        block=block,
        step_seconds=timelines[0].step / 1e9,
    )


def _check_alike(timelines: list[Timeline], target: str | None) -> None:
    if len({t.step for t in timelines}) != 1:
        raise PlantDataError(
            f"timelines of different steps: {sorted({t.step / 1e9 for t in timelines})} s",
            ["build them with the same step_seconds", "run the pilot once for each step", "leave assets out"],
        )
    if target is not None and not any(target in t.templates for t in timelines):
        raise PlantDataError(
            f"no asset has events of kind {target!r}",
            [f"name one of {', '.join(timelines[0].templates[:5])}, …", "leave the target out to use the faults"],
        )


def _at_most(effects: Array) -> Array:
    return effects[sample_rows(len(effects), MOST_EFFECTS, 0)]


def _kind_steps(timeline: Timeline, kind: str) -> Array:
    if kind not in timeline.templates:
        return np.zeros(0, np.int64)
    return np.flatnonzero(timeline.counts[:, timeline.templates.index(kind)])


def _block_groups(timeline: Timeline, firsts: Array, block: int) -> Array:
    """Group of every block: at least 8 neighbours with the same prevailing state; states with fewer blocks together."""
    states = np.array([np.bincount(timeline.states[f : f + block]).argmax() for f in firsts], np.int64)
    number, groups = 0, np.zeros(len(firsts), np.int64)
    common = [s for s in np.unique(states) if (states == s).sum() >= GROUP]
    for members in [*(np.flatnonzero(states == s) for s in common), np.flatnonzero(~np.isin(states, common))]:
        parts = max(1, len(members) // GROUP)
        for first, last in pairwise(np.linspace(0, len(members), parts + 1).round().astype(int)):
            groups[members[first:last]] = number
            number += 1
    return groups
