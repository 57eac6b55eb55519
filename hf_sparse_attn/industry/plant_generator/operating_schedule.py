"""Operating states of a machine: shifts, weeks, breaks and maintenance, with campaigns of different load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
import numpy.typing as npt

from .plant_settings import PlantSettings
from .random_streams import stream

STATES = ("idle", "start-up", "load", "maintenance")
IDLE, START_UP, LOAD, MAINTENANCE = range(len(STATES))
LEVEL = (0.02, 0.45, 0.75, 0.08)  # share of the full load in a state; campaigns have levels of their own
SATURDAY, SUNDAY, WEDNESDAY = 5, 6, 2

Step = tuple[float, int]  # local minutes after midnight, state from there on


@dataclass(frozen=True)
class Schedule:
    """Stretches of one state and one level of load; ``starts`` are seconds since 1970, the last ends with the
    record.
    """

    starts: npt.NDArray[np.int64]
    states: npt.NDArray[np.int64]
    levels: npt.NDArray[np.float64]
    end: int

    def at(self, seconds: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Numbers of the stretches that hold these times."""
        return np.maximum(np.searchsorted(self.starts, seconds, side="right") - 1, 0)

    def state(self, second: float) -> int:
        """The state at one time."""
        return int(self.states[self.at(np.array([int(second)]))[0]])

    def share_of_load(self, begin: float, end: float) -> float:
        """Share of a stretch of time that is spent under load."""
        inside = self.states[self.at(np.linspace(begin, end, 24, endpoint=False).astype(np.int64))]
        return float((inside == LOAD).mean())

    def changes(self) -> list[tuple[int, int, int]]:
        """(start, end, state) of every stretch of one state."""
        first = np.flatnonzero(np.diff(self.states, prepend=-1))
        ends = [*self.starts[first[1:]].tolist(), self.end]
        return list(zip(self.starts[first].tolist(), ends, self.states[first].tolist(), strict=True))


def schedule_of(settings: PlantSettings, asset: str) -> Schedule:
    """The states of one asset over the record."""
    random = stream(settings.seed, "schedule", asset)
    steps: list[tuple[int, int]] = [(settings.begin, IDLE)]
    # one day more: a record of 24-hour days ends an hour into the next where clocks were set back
    for number in range(settings.days + 1):
        day = settings.first_day + timedelta(days=number)
        steps += [(settings.local_time(day, minutes), state) for minutes, state in _day(day, random)]
    stretches = [
        part
        for (begin, state), (end, _) in zip(steps, [*steps[1:], (settings.end, IDLE)], strict=True)
        for part in _campaigns(begin, min(end, settings.end), state, random)
    ]
    starts, states, levels = zip(*stretches, strict=True)
    return Schedule(np.array(starts), np.array(states), np.array(levels), settings.end)


def _day(day: date, random: np.random.Generator) -> Iterator[Step]:
    """Steps of one day: two shifts on weekdays, on some Saturdays one, on Sundays none."""
    # drawn on every day, so that one day's pattern moves no other's
    begin, warm, pause, stop, service, works = random.uniform(0, 1, 6)
    if day.weekday() == SUNDAY or (day.weekday() == SATURDAY and works < 0.5):
        return
    start = 310 + 20 * begin
    yield start, START_UP
    yield start + 30 + 15 * warm, LOAD
    if day.weekday() == SATURDAY:
        yield 760 + 40 * stop, IDLE
        return
    # the shifts change at about a quarter to two
    yield 820 + 10 * pause, IDLE
    if day.weekday() == WEDNESDAY and day.isocalendar().week % 2:
        yield 845, MAINTENANCE
        yield 960 + 60 * service, START_UP
        yield 1045, LOAD
    else:
        yield 840 + 15 * service, LOAD
    yield 1300 + 30 * stop, IDLE


def _campaigns(begin: int, end: int, state: int, random: np.random.Generator) -> Iterator[tuple[int, int, float]]:
    """A stretch of load split into campaigns of one to three hours, each with its level; others whole."""
    while begin < end:
        length, level = random.uniform(3600, 10_800), random.uniform(-0.2, 0.2)
        if state != LOAD:
            yield begin, state, LEVEL[state]
            return
        yield begin, state, LEVEL[LOAD] + level
        begin += int(length)
