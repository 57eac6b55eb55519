"""Causes, the failures that they lead to after a lag, and what only looks like them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from .machine_channels import OIL, PRESSURE, VIBRATION
from .message_catalogue import numbers_of, templates
from .operating_schedule import IDLE, LOAD, Schedule
from .plant_settings import DAY, LAG_SHARE, LONGEST_LAG, SHORTEST_LAG, PlantSettings, PlantSettingsError
from .plant_truth import PlantedEvent, iso
from .random_streams import stream
from .sensor_signals import Excursion

SLOT = 10_800  # seconds; in each of them starts one failure at most
NEAR_SHARE, DISTRACTOR_SHARE = 1 / 3, 1 / 3  # failures with a near precursor, and hot spells, for one far failure
HIGHEST = 2.5  # standard deviations of a lag's jitter, at most
RULES = ("valve", "seal", "both", "pressure dip")
RULE_SHARES = (0.5, 0.2, 0.15, 0.15)

Start = TypeVar("Start", int, tuple[int, int])


@dataclass(frozen=True)
class PlannedLine:
    """A log line with a time (milliseconds) of its own; ``event`` counts from 1 in `Plan.events`, 0 = none."""

    time: int
    template: int
    event: int
    parameters: tuple[float, float, float]


@dataclass
class Plan:
    """What is planted into one asset, and the log lines and deviations of sensors that show it."""

    asset: str
    events: list[PlantedEvent] = field(default_factory=list)
    lines: list[PlannedLine] = field(default_factory=list)
    excursions: list[Excursion] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)  # of each event, milliseconds

    def add(self, role: str, kind: str, start: int, excursion: Excursion | None = None) -> PlantedEvent:
        """A new event, the last of `events`."""
        end, channel = (start, None) if excursion is None else (excursion.end, excursion.channel)
        if excursion is not None:
            self.excursions.append(excursion)
        name = f"{self.asset}/{role}/{len(self.events) + 1}"
        self.events.append(PlantedEvent(name, self.asset, kind, iso(start), iso(end), channel))
        self.spans.append((start, end))
        return self.events[-1]

    def say(self, role: str, time: int, random: np.random.Generator) -> None:
        """A log line of the last event; of a role's templates any."""
        numbers = numbers_of(role)
        number = numbers[int(random.integers(len(numbers)))]
        first, second, third = random.random(3).tolist()
        self.lines.append(PlannedLine(time, number, len(self.events), (first, second, third)))
        event, text = self.events[-1], templates()[number].masked
        if text not in event.templates:
            event.templates.append(text)


def lag_of(settings: PlantSettings) -> float:
    """The plant's lag in seconds: as it is set, or log-uniform by the seed."""
    if settings.lag is not None:
        return float(settings.lag)
    longest = min(LONGEST_LAG, LAG_SHARE * settings.days * DAY)
    return float(SHORTEST_LAG * (longest / SHORTEST_LAG) ** stream(settings.seed, "lag").random())


def plan_of(settings: PlantSettings, asset: str, schedule: Schedule) -> Plan:
    """What is planted into an asset.

    The causes are planted the lag before far failures. Of a null plant these are failures that do not happen: those
    that do are drawn again in the same way, so that both kinds of plants have causes and failures of one distribution.

    Raises:
        PlantSettingsError: the record is too short for that many.
    """
    plan, lag = Plan(asset), lag_of(settings)
    slots = _Slots(settings, asset, schedule)
    _near_failures(plan, settings, slots)
    for start in slots.draw(max(1, round(DISTRACTOR_SHARE * settings.link_count)), "hot"):
        random = stream(settings.seed, "hot", asset, start)
        plan.add("distractor", "hot spell", start, _overheating(start, random))
    slots.reserve()
    pairs = slots.linked(lag, "linked")
    causes = [_cause(plan, time, lag, stream(settings.seed, "cause", asset, at)) for at, (time, _) in enumerate(pairs)]
    starts = [failure for _, failure in (slots.linked(lag, "drawn again") if settings.null else pairs)]
    for number, start in enumerate(starts):
        failure = _far_failure(plan, start, stream(settings.seed, "far", asset, number))
        if not settings.null:
            _link(plan, causes[number], failure)
    _look_alikes(plan, settings)
    return plan


def _near_failures(plan: Plan, settings: PlantSettings, slots: _Slots) -> None:
    """Drives that trip after a precursor; of a null plant the precursors have times of their own."""
    count = max(1, round(NEAR_SHARE * settings.link_count))
    # drawn in any case, so that both kinds of plants keep the same slots free
    announced, again = slots.draw(count, "announced"), slots.draw(count, "drawn again near")
    slots.reserve()
    for number, (expected, start) in enumerate(zip(announced, again if settings.null else announced, strict=True)):
        random = stream(settings.seed, "near", plan.asset, number)
        cause = _precursor(plan, expected, random)
        failure = _trip(plan, start, random)
        if not settings.null:
            _link(plan, [cause], failure)


class _Slots:
    """Times under load that are free for a failure."""

    def __init__(self, settings: PlantSettings, asset: str, schedule: Schedule) -> None:
        self.settings, self.asset, self.schedule = settings, asset, schedule
        self.free = list(range(settings.begin + SLOT, settings.end - SLOT, SLOT))
        self._drawn: set[int] = set()

    def draw(self, count: int, name: str) -> list[int]:
        """Starts (milliseconds) of ``count`` failures in free slots, which stay free until `reserve`."""
        random = stream(self.settings.seed, name, self.asset)
        starts: list[int] = []
        for slot in random.permutation(np.array(self.free, dtype=np.int64)).tolist():
            start = slot + int(random.uniform(0, 3600))
            if len(starts) < count and self._loaded(start):
                starts.append(start * 1000)
                self._drawn.add(slot)
        return sorted(self._enough(starts, count))

    def reserve(self) -> None:
        """The slots that were drawn are free no more."""
        self.free = [slot for slot in self.free if slot not in self._drawn]

    def linked(self, lag: float, name: str) -> list[tuple[int, int]]:
        """(time of the cause, start of the failure) of every pair, milliseconds; the machine is not idle at the cause
        unless too few such times are free.
        """
        random, count = stream(self.settings.seed, name, self.asset), self.settings.link_count
        working: list[tuple[int, int]] = []
        idle: list[tuple[int, int]] = []
        for slot in random.permutation(np.array(self.free, dtype=np.int64)).tolist():
            start = int(1000 * (slot + random.uniform(0, 3600)))
            deviation = float(np.clip(random.standard_normal(), -HIGHEST, HIGHEST)) * self.settings.jitter
            cause = start - round(1000 * lag * (1 + deviation))
            if cause / 1000 > self.settings.begin + 3600 and self._loaded(start // 1000):
                (idle if self.schedule.state(cause / 1000) == IDLE else working).append((cause, start))
        pairs = [*working, *idle][:count]
        return sorted(self._enough(pairs, count), key=lambda pair: pair[1])

    def _loaded(self, start: int) -> bool:
        return self.schedule.state(start) == LOAD and self.schedule.share_of_load(start, start + 3600) > 0.8

    def _enough(self, found: list[Start], count: int) -> list[Start]:
        if len(found) < count:
            raise PlantSettingsError(
                f"a record of {self.settings.days} days has room for {len(found)} of {count} failures: give more days, "
                "fewer pairs, or a shorter lag"
            )
        return found


def _overheating(start: int, random: np.random.Generator) -> Excursion:
    hold, amount = int(random.uniform(900, 2400)), random.uniform(10, 16)
    return Excursion(OIL, start, 600_000, hold * 1000, 1_200_000, float(amount))


def _far_failure(plan: Plan, start: int, random: np.random.Generator) -> PlantedEvent:
    """The oil gets hot, and a burst of errors follows within 20 minutes; nothing near announces it."""
    failure = plan.add("failure", "overheating", start, _overheating(start, random))
    plan.say("overheating", start, random)
    for wait in np.minimum(random.exponential(240, int(random.integers(20, 60))), 1200).tolist():
        plan.say("overheating", start + 200 + int(1000 * wait), random)
    return failure


def _precursor(plan: Plan, expected: int, random: np.random.Generator) -> PlantedEvent:
    """A bearing gets louder for the 20 to 40 minutes before ``expected``, with warnings."""
    ahead = int(random.uniform(1200, 2400)) * 1000
    noise = Excursion(VIBRATION, expected - ahead, ahead, 300_000, 600_000, float(random.uniform(0.8, 1.6)))
    cause = plan.add("cause", "bearing noise", expected - ahead, noise)
    for part in sorted(random.uniform(0.2, 0.95, int(random.integers(4, 9))).tolist()):
        plan.say("warning", expected - ahead + int(part * ahead), random)
    return cause


def _trip(plan: Plan, start: int, random: np.random.Generator) -> PlantedEvent:
    """A drive trips: a burst of errors within minutes."""
    failure = plan.add("failure", "trip", start)
    plan.say("trip", start, random)
    for wait in np.minimum(random.exponential(60, int(random.integers(12, 25))), 600).tolist():
        plan.say("trip", start + 100 + int(1000 * wait), random)
    last = max(line.time for line in plan.lines if line.event == len(plan.events))
    failure.end, plan.spans[-1] = iso(last), (start, last)
    return failure


def _cause(plan: Plan, time: int, lag: float, random: np.random.Generator) -> list[PlantedEvent]:
    """The events that stand for one cause: one, or two of which each would do."""
    rule = RULES[int(random.choice(len(RULES), p=RULE_SHARES))]
    if rule == "pressure dip":
        hold, amount = int(random.uniform(1200, 2400)), random.uniform(0.3, 0.5)
        return [plan.add("cause", rule, time, Excursion(PRESSURE, time, 120_000, hold * 1000, 120_000, -amount))]
    causes = []
    # the second is within the jitter of the lag, too
    later = int(1000 * random.uniform(0.2, 1.0) * min(0.05 * lag, 6 * 3600))
    for kind, moment in (("valve", time), ("seal", time + later * (rule == "both"))):
        if rule in (kind, "both"):
            causes.append(plan.add("cause", kind, moment))
            plan.say(kind, moment, random)
    return causes


def _look_alikes(plan: Plan, settings: PlantSettings) -> None:
    """Lines that differ from causes in the part or batch, at any time, as many as there are pairs."""
    random = stream(settings.seed, "look-alikes", plan.asset)
    for time in np.sort(random.uniform(settings.begin, settings.end, settings.link_count)).tolist():
        kind = "valve look-alike" if random.random() < 0.7 else "seal look-alike"
        plan.add("distractor", kind, int(1000 * time))
        plan.say(kind, int(1000 * time), random)


def _link(plan: Plan, causes: list[PlantedEvent], failure: PlantedEvent) -> None:
    starts = {event.id: span[0] for event, span in zip(plan.events, plan.spans, strict=True)}
    for cause in causes:
        failure.causes.append(cause.id)
        cause.failure, cause.lag_s = failure.id, (starts[failure.id] - starts[cause.id]) / 1000
