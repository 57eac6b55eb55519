"""One machine on a regular grid of time: sensors, counts of log events, operating states, faults and the split."""

# Shapes: T steps, C channels, K kinds of events (level and template), F faults.

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import PlantDataError

Array = np.ndarray[Any, np.dtype[Any]]
DAY = 86_400 * 10**9  # nanoseconds
NO_STATE = "(none)"  # name of the state of steps that no operating state covers


@dataclass(frozen=True, eq=False)
class Timeline:
    """What detectors see of one asset, and the faults that they are to find.

    Attributes:
        asset: name of the machine.
        times: int64 [T], start of each step in ns since 1970 (UTC); equally spaced.
        values: float64 [T, C], NaN where nothing was observed.
        channels: C names.
        counts: int32 [T, K], events of each kind in a step.
        templates: K names, level before template.
        faults: int64 [F, 2], start and end in ns, the end excluded; by time, without overlap.
        states: int32 [T], index into ``state_names``.
        train_steps: steps [0, train_steps) are for training.
        test_from: steps [test_from, T) are for evaluation; what lies between is the purge gap.
        notes: what was decided while the grid was made, one sentence each.

    Raises:
        PlantDataError: the parts do not fit together, or the grid is not regular.
    """

    asset: str
    times: Array
    values: Array
    channels: tuple[str, ...]
    counts: Array
    templates: tuple[str, ...]
    faults: Array
    states: Array
    state_names: tuple[str, ...]
    train_steps: int
    test_from: int
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        steps = len(self.times)
        expected = {
            "values": (steps, len(self.channels)),
            "counts": (steps, len(self.templates)),
            "states": (steps,),
            "faults": (len(self.faults), 2),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                self._refuse(f"{name} have shape {getattr(self, name).shape}, the rest asks for {shape}")
        if steps < 2 or len(np.unique(np.diff(self.times))) != 1 or self.times[1] <= self.times[0]:
            self._refuse(f"its {steps} times are no regular grid of at least 2 steps")
        if not 0 < self.train_steps <= self.test_from <= steps:
            self._refuse(f"training ends at step {self.train_steps}, evaluation starts at {self.test_from} of {steps}")
        edges = self.faults.ravel()
        if (np.diff(edges) < 0).any() or (self.faults[:, 0] >= self.faults[:, 1]).any():
            self._refuse("its faults overlap, are empty or do not stand by time")
        if len(self.states) and not 0 <= self.states.min() <= self.states.max() < len(self.state_names):
            self._refuse(
                f"its states are {self.states.min()} to {self.states.max()}, {len(self.state_names)} are named"
            )
        if np.isinf(self.values).any():
            step, channel = (int(at[0]) for at in np.nonzero(np.isinf(self.values)))
            self._refuse(f"channel {self.channels[channel]!r} is infinite in step {step}")

    def _refuse(self, found: str) -> None:
        raise PlantDataError(
            f"asset {self.asset!r}: {found}",
            [
                "build it with timeline_from_dataset or timeline_from_csv",
                "merge faults with merged_intervals",
                "leave the asset out",
            ],
        )

    def __len__(self) -> int:
        return len(self.times)

    @property
    def step(self) -> int:
        """Length of a step in ns."""
        return int(self.times[1] - self.times[0])

    @property
    def observed(self) -> Array:
        """Bool [T, C]: a number was read."""
        return ~np.isnan(self.values)

    @property
    def labels(self) -> Array:
        """Bool [T]: the step overlaps a fault."""
        marks = np.zeros(len(self) + 1, np.int64)
        first, last = self.fault_steps().T
        np.add.at(marks, first, 1)
        np.add.at(marks, last, -1)
        inside: Array = np.cumsum(marks[:-1]) > 0
        return inside

    def fault_steps(self) -> Array:
        """First and last step (excluded) that each fault overlaps, int64 [F, 2], cut to the record."""
        begin = int(self.times[0])
        first, last = (self.faults[:, 0] - begin) // self.step, -((begin - self.faults[:, 1]) // self.step)
        steps: Array = np.clip(np.stack([first, last], 1), 0, len(self))
        return steps

    def onsets(self) -> Array:
        """Steps in which a fault starts, int64; faults that start outside of the record have none."""
        steps = (self.faults[:, 0] - int(self.times[0])) // self.step
        return np.unique(steps[(steps >= 0) & (steps < len(self))])

    def steps_in(self, seconds: float) -> int:
        """Whole steps in a time span, at least one."""
        return max(1, round(seconds * 1e9 / self.step))

    def train(self) -> Timeline:
        """The training period alone."""
        end = self.train_steps
        inside = self.faults[self.faults[:, 0] < self.times[0] + end * self.step]
        cut = np.minimum(inside, self.times[0] + end * self.step)
        return replace(
            self,
            times=self.times[:end],
            values=self.values[:end],
            counts=self.counts[:end],
            states=self.states[:end],
            faults=cut,
            test_from=end,
        )


def merged_intervals(intervals: Array) -> Array:
    """Intervals int64 [n, 2] by start, those that overlap or touch as one."""
    merged: list[list[int]] = []
    for start, end in np.asarray(intervals, np.int64).reshape(-1, 2)[np.argsort(np.asarray(intervals)[:, 0])].tolist():
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return np.array(merged, np.int64).reshape(-1, 2)


def split_steps(steps: int, train_share: float, purge_steps: int) -> tuple[int, int]:
    """(Steps of training, first step of evaluation) by a share in (0, 1), with a gap of ``purge_steps``.

    Raises:
        PlantDataError: nothing is left to train on or to evaluate.
    """
    train = round(steps * train_share)
    if not 0 < train < train + purge_steps < steps and not (purge_steps == 0 and 0 < train < steps):
        raise PlantDataError(
            f"{steps} steps with a training share of {train_share} and a gap of {purge_steps} leave no evaluation",
            ["take a longer record", "shorten the gap", "give another training share"],
        )
    return train, train + purge_steps
