"""Log lines of an asset, chunk by chunk in time: background by state, bursts, daily jobs, and what was planted."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import cache

import numpy as np
import numpy.typing as npt

from ...system.extras import needs_extra
from .causal_links import PlannedLine
from .message_catalogue import SLOTS, WORDS, numbers_of, templates
from .operating_schedule import STATES, Schedule
from .plant_settings import DAY, PlantSettings
from .random_streams import stream

with needs_extra("industry", "generated plants"):
    import polars as pl

MINUTE = 60
ACTIVITY = (0.25, 2.0, 1.4, 1.2)  # lines a minute of each state, against the others
FREQUENT, SELDOM = 1.0, 0.04  # weight of a template in the state that it belongs to, and in others
REPEATED, COPIES = 0.06, 3  # share of lines that a device says again at once, how often at most
LATEST = 59_000  # milliseconds of a minute after which no line starts: its copies are of the same minute
JOB_TIME = 360.0  # local minutes after midnight of the daily backup
BURST_EVERY = 1.5  # days between two bursts of one template


class LogStream:
    """Lines of an asset by time. Every draw has a stream of its own, so that chunks of any size give the same lines."""

    def __init__(self, settings: PlantSettings, asset: str, schedule: Schedule, planned: Sequence[PlannedLine]) -> None:
        self.schedule = schedule
        self._counts, self._moments, self._choices, self._parameters, self._copies = (
            stream(settings.seed, "lines", asset, part) for part in ("count", "time", "template", "parameter", "copy")
        )
        minutes = schedule.states[schedule.at(np.arange(settings.begin, settings.end, MINUTE))]
        activity = np.array(ACTIVITY)
        # copies come on top of what is drawn
        mean = activity[minutes].mean() * (1 + REPEATED * (1 + COPIES) / 2) * DAY / MINUTE
        self._rates = activity * settings.log_lines / mean
        self._cumulative = _weights(settings, asset).cumsum(axis=1)
        lines = [*planned, *_state_changes(schedule), *_jobs(settings, asset), *_bursts(settings, asset)]
        lines.sort(key=lambda line: line.time)
        self._planned = {
            "time": np.array([line.time for line in lines], dtype=np.int64),
            "template": np.array([line.template for line in lines], dtype=np.int64),
            "event": np.array([line.event for line in lines], dtype=np.int64),
            "parameters": np.array([line.parameters for line in lines]).reshape(-1, SLOTS),
        }

    def chunk(self, begin: int, end: int) -> pl.DataFrame:
        """Lines from ``begin`` to ``end`` (seconds, whole minutes), which follows on the chunk before.

        Columns: ``time`` (milliseconds), ``template`` (number), ``event`` (see `PlannedLine`), ``text``; by time.
        """
        background = self._background(begin, end)
        first, last = np.searchsorted(self._planned["time"], [begin * 1000, end * 1000])
        parts = [(background[name], values[first:last]) for name, values in self._planned.items()]
        time, template, event, parameters = (np.concatenate(part) for part in parts)
        order = np.argsort(time, kind="stable")
        frame = pl.DataFrame({"time": time[order], "template": template[order], "event": event[order]})
        return frame.with_columns(_texts(template[order], parameters[order]))

    def _background(self, begin: int, end: int) -> dict[str, npt.NDArray[np.generic]]:
        minutes = np.arange(begin, end, MINUTE)
        states = self.schedule.states[self.schedule.at(minutes)]
        counts = self._counts.poisson(self._rates[states])
        starts, states = np.repeat(minutes * 1000, counts), np.repeat(states, counts)
        moments = np.floor(self._moments.random(len(starts)) * LATEST).astype(np.int64)
        choice = self._choices.random(len(starts))
        template = np.empty(len(starts), dtype=np.int64)
        for state in range(len(STATES)):
            inside = states == state
            cumulative = self._cumulative[state]
            template[inside] = np.searchsorted(cumulative[:-1], choice[inside] * cumulative[-1], side="right")
        copies = self._copies.random(len(starts)) / REPEATED
        repeats = np.where(copies < 1, 1 + np.ceil(copies * COPIES).astype(np.int64), 1)
        each = np.repeat(np.arange(len(starts)), repeats)
        # 0 for the line itself, 1, 2, … for its copies, 15 ms apart
        number = np.arange(len(each)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        return {
            "time": (starts + moments)[each] + 15 * number,
            "template": template[each],
            "event": np.zeros(len(each), dtype=np.int64),
            "parameters": self._parameters.random((len(starts), SLOTS))[each],
        }


def _weights(settings: PlantSettings, asset: str) -> npt.NDArray[np.float64]:
    """Weights of the background templates by state, (states, templates): Zipf's law over a random order."""
    background = [template for template in templates() if template.role is None]
    ranks = stream(settings.seed, "weights", asset).permutation(len(background))
    weights = np.empty((len(STATES), len(background)))
    for number, template in enumerate(background):
        rarity = {"INFO": 1.0, "WARNING": 0.15, "ERROR": 0.03}[template.level]
        for state in range(len(STATES)):
            fits = template.frequent is None or template.frequent == state
            weights[state, number] = (FREQUENT if fits else SELDOM) * rarity / (ranks[number] + 3)
    return weights


def _state_changes(schedule: Schedule) -> list[PlannedLine]:
    (number,) = numbers_of("state")
    return [
        # the middle of the share of a word: it is the word
        PlannedLine(start * 1000 + 120, number, 0, ((state + 0.5) / len(STATES), 0.0, 0.0))
        for start, _, state in schedule.changes()
    ]


def _jobs(settings: PlantSettings, asset: str) -> list[PlannedLine]:
    """The daily backup, some seconds after its time."""
    random = stream(settings.seed, "jobs", asset)
    lines = []
    for day in range(settings.days + 1):
        time = settings.local_time(settings.first_day + timedelta(days=day), JOB_TIME) * 1000
        wait, long = int(random.uniform(200, 4000)), int(random.uniform(20_000, 90_000))
        job, files, node, ms = random.random(4).tolist()
        for role, moment, first, second in (
            ("job begins", time + wait, job, 0.0),
            ("job counts", time + wait + long - 900, files, node),
            ("job ends", time + wait + long, job, ms),
        ):
            (number,) = numbers_of(role)
            if moment < settings.end * 1000:
                lines.append(PlannedLine(moment, number, 0, (first, second, 0.0)))
    return lines


def _bursts(settings: PlantSettings, asset: str) -> list[PlannedLine]:
    """Some minutes in which one background template comes again and again, with the same parameters or new ones."""
    random = stream(settings.seed, "bursts", asset)
    background = [number for number, template in enumerate(templates()) if template.role is None]
    lines = []
    for start in random.uniform(settings.begin, settings.end, round(settings.days / BURST_EVERY)).tolist():
        number = background[int(random.integers(len(background)))]
        same, parameters = random.random() < 0.5, random.random(SLOTS)
        for wait in np.cumsum(random.exponential(4.0, int(random.integers(8, 40)))).tolist():
            first, second, third = (parameters if same else random.random(SLOTS)).tolist()
            if start + wait < settings.end:
                lines.append(PlannedLine(int(1000 * (start + wait)), number, 0, (first, second, third)))
    return lines


@cache
def _lookup() -> tuple[pl.Series, npt.NDArray[np.int64], npt.NDArray[np.int64], list[pl.Series]]:
    """All words in one row; first word and number of words by (template, slot); pieces of the templates by place."""
    begin, words = {}, [""]
    for kind, texts in WORDS.items():
        begin[kind] = len(words)
        words += texts
    first = np.zeros((len(templates()), SLOTS), dtype=np.int64)
    count = np.ones((len(templates()), SLOTS), dtype=np.int64)
    for number, template in enumerate(templates()):
        for slot, kind in enumerate(template.parameters):
            first[number, slot], count[number, slot] = begin[kind], len(WORDS[kind])
    pieces = [pl.Series([template.pieces[at] for template in templates()]) for at in range(SLOTS + 1)]
    return pl.Series(words), first, count, pieces


def _texts(template: npt.NDArray[np.int64], parameters: npt.NDArray[np.float64]) -> pl.Series:
    """The lines' texts, without a loop over lines: pieces and words by number."""
    words, first, count, pieces = _lookup()
    chosen = first[template] + (parameters * count[template]).astype(np.int64)
    columns = [pieces[0].gather(template)]
    for slot in range(SLOTS):
        columns += [words.gather(chosen[:, slot]), pieces[slot + 1].gather(template)]
    frame = pl.DataFrame({str(at): column for at, column in enumerate(columns)})
    return frame.select(pl.concat_str(pl.all()).alias("text"))["text"]
