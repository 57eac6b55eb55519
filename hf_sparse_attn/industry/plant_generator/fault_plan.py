"""Which file of which asset has which data fault, when, and where in the file it was found to stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..findings import Finding
from .causal_links import Plan
from .fault_kinds import FAULTS
from .machine_channels import CONVERSIONS, OIL, POWER, PRESSURE, Sensor
from .operating_schedule import Schedule
from .plant_settings import DAY, PlantSettings, PlantSettingsError
from .plant_truth import iso
from .random_streams import stream

HOUR = 3_600_000  # milliseconds
CLEAN_SHARE = 0.2  # of the record, at its start, without faults that have a time
DISTANCE = 2 * HOUR  # between two faults of one file
MARGIN = HOUR // 2  # between a fault and what was planted
TRIES = 2000
NEEDS_LOAD = ("stuck_sensor", "flat_sensor", "saturated_sensor")  # of a machine at rest nobody could tell
AT_SHARE = ("unit_change", "zone_change", "epoch_unit_change")  # from a share of the record to its end
WHOLE_FILE = ("duplicates", "clock_offset", "day_first_dates", "time_ambiguous", "no_number", "empty_channel")
NO_ACTION = ("dst_fold", "day_first_dates")  # can be read without loss
NEVER_FAULTY = (POWER, OIL, "speed")  # compares clocks, shows failures, saturates by itself


class RawFile(NamedTuple):
    """A raw file: its path from the plant's folder, its form as `dataset.Source` has it, and how it says times."""

    path: str
    form: str
    local: bool  # local time without an offset
    stamp: str = ""  # format of its times, for `polars` to write


@dataclass
class Lines:
    """First and last line of something in a file, from 1, and how many lines it is."""

    first: int | None = None
    last: int | None = None
    count: int = 0

    def see(self, lines: npt.NDArray[np.int64]) -> None:
        """Lines of it that were just written."""
        if len(lines):
            self.first = int(lines.min()) if self.first is None else min(self.first, int(lines.min()))
            self.last = int(lines.max()) if self.last is None else max(self.last, int(lines.max()))
            self.count += len(lines)

    @property
    def pair(self) -> tuple[int, int] | None:
        return None if self.first is None or self.last is None else (self.first, self.last)


@dataclass
class DataFault:
    """A data fault of one file between two times (milliseconds, the end not included)."""

    kind: str
    asset: str
    file: str
    start: int
    end: int
    magnitude: float = 0.0
    channel: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    lines: Lines = field(default_factory=Lines)
    reference: float | None = None  # the value at its start, of a sensor that stays there
    seen: Lines = field(default_factory=Lines)  # true times of its rows, in place of lines

    def covers(self, times: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these times lie in it."""
        return (times >= self.start) & (times < self.end)

    def see(self, lines: npt.NDArray[np.int64], times: npt.NDArray[np.int64]) -> None:
        """Rows of it that were just written."""
        self.lines.see(lines)
        self.seen.see(times)

    def finding(self) -> Finding | None:
        """As the truth has it; None if the file has no row there."""
        times = self.seen.pair
        if times is None:
            return None
        return Finding(
            self.kind,
            "information" if self.kind in NO_ACTION else "warning",
            asset=self.asset,
            source=self.file,
            channel=self.channel,
            start=iso(times[0]),
            end=iso(times[1]),
            lines=self.lines.pair,
            count=self.lines.count,
            values=self.values or None,
        )


class Faults:
    """The data faults of the plant: each kind once, shared out over the assets."""

    def __init__(self, settings: PlantSettings, assets: Sequence[str]) -> None:
        self.settings = settings
        first = int(stream(settings.seed, "faults").integers(len(assets)))
        kinds = list(settings.magnitudes)
        self._asset = {kind: assets[(first + at) % len(assets)] for at, kind in enumerate(kinds)}

    def kinds(self, asset: str) -> list[str]:
        """What this asset gets."""
        return [kind for kind, name in self._asset.items() if name == asset]

    def of(
        self, asset: str, files: dict[str, RawFile], sensors: Sequence[Sensor], schedule: Schedule, plan: Plan
    ) -> list[DataFault]:
        """The faults of an asset's files: ``wide``, ``long``, ``json`` and, with ambiguous dates, ``short``.

        Raises:
            PlantSettingsError: a fault has no room in the record.
        """
        chooser = _Chooser(self.settings, asset, sensors, schedule, plan)
        faults = []
        for kind in self.kinds(asset):
            where = {"duplicates": "long", "clock_offset": "long", "epoch_unit_change": "json"}.get(kind, "wide")
            file = files["short" if kind == "time_ambiguous" else where]
            faults += chooser.faults(kind, file, self.settings.magnitudes[kind])
        return faults


class _Chooser:
    """Finds times and channels for the faults of one asset."""

    def __init__(
        self, settings: PlantSettings, asset: str, sensors: Sequence[Sensor], schedule: Schedule, plan: Plan
    ) -> None:
        self.settings, self.asset, self.schedule = settings, asset, schedule
        self.begin, self.end = settings.begin * 1000, settings.end * 1000
        self.random = stream(settings.seed, "faults", asset)
        self.sensors = {sensor.name: sensor for sensor in sensors}
        self.planted = [(excursion.start, excursion.end, excursion.channel) for excursion in plan.excursions]
        # no fault of another kind in an hour that the clocks show twice, or where they change for good
        self.taken = [(start - 2 * HOUR, end + 2 * HOUR) for start, end in folds(settings)]
        shares = [settings.magnitudes[kind] for kind in AT_SHARE if kind in settings.magnitudes]
        self.taken += [(at - HOUR, at + HOUR) for at in (self._moment(share) for share in shares)]
        self.converted = (OIL, PRESSURE)[int(self.random.integers(2))]
        names = [name for name in self.sensors if name not in (*NEVER_FAULTY, self.converted)]
        self.channels: list[str] = [names[at] for at in self.random.permutation(len(names))]

    def faults(self, kind: str, file: RawFile, magnitude: float) -> list[DataFault]:
        """One fault of this kind, or as many as there are bad lines."""
        whole = DataFault(kind, self.asset, file.path, self.begin, self.end, magnitude)
        if kind in WHOLE_FILE:
            return [self._whole(whole)]
        if kind in AT_SHARE:
            return [self._from_a_moment(whole, file)]
        each = self.settings.interval * 1000
        length = {"bad_line": each, "time_unreadable": each, "equal_stamps": int(magnitude) * each}.get(kind)
        if length is None:
            length = int(magnitude * 1000)
        found = []
        for _ in range(int(magnitude) if kind in ("bad_line", "time_unreadable") else 1):
            channel = self._next_channel() if kind in NEEDS_LOAD else None
            # a block that comes too late has its place taken by as many rows
            start = self._window(kind, 2 * length if kind == "backward_jump" else length, channel)
            fault = DataFault(kind, self.asset, file.path, start, start + length, magnitude, channel)
            fault.values = self._numbers(fault)
            found.append(fault)
        return found

    def _whole(self, fault: DataFault) -> DataFault:
        if fault.kind == "no_number":
            fault.channel = self._next_channel()
        elif fault.kind == "empty_channel":
            fault.channel = "spare"
        elif fault.kind == "time_ambiguous":
            fault.start, fault.end = first_days(self.settings)
        name = {"duplicates": "share", "clock_offset": "offset_s", "no_number": "share"}.get(fault.kind)
        fault.values = {name: fault.magnitude} if name else {}
        return fault

    def _from_a_moment(self, fault: DataFault, file: RawFile) -> DataFault:
        fault.start = self._moment(fault.magnitude)
        if fault.kind == "unit_change":
            fault.channel = self.converted
            unit = self.sensors[fault.channel].unit
            fault.values = {"from": unit, "to": CONVERSIONS[unit][0]}
        elif fault.kind == "epoch_unit_change":
            fault.values = {"from": "ms", "to": "s"}
        else:
            offset = self.settings.offset(fault.start // 1000)
            if not offset:
                raise PlantSettingsError(
                    f"a plant's faults name zone_change, but {self.settings.zone} has no offset from UTC at "
                    f"{iso(fault.start)}: give another zone or moment"
                )
            zones = [self.settings.zone, "UTC"] if file.local else ["UTC", self.settings.zone]
            # positive where clocks jump back
            jump = offset if file.local else -offset
            fault.values = {"from": zones[0], "to": zones[1], "backward_s": float(jump)}
        return fault

    def _numbers(self, fault: DataFault) -> dict[str, Any]:
        seconds = (fault.end - fault.start) / 1000
        if fault.kind == "saturated_sensor" and fault.channel is not None:
            return {"seconds": seconds, "limit": self.sensors[fault.channel].high}
        if fault.kind == "equal_stamps":
            return {"equal": int(fault.magnitude), "of": 80}
        return {} if fault.kind in ("bad_line", "time_unreadable") else {"seconds": seconds}

    def _moment(self, share: float) -> int:
        """A whole reading at this share of the record."""
        each = self.settings.interval
        return 1000 * (self.settings.begin + int(share * self.settings.days * DAY) // each * each)

    def _next_channel(self) -> str:
        self.channels = [*self.channels[1:], self.channels[0]]
        return self.channels[-1]

    def _window(self, kind: str, length: int, channel: str | None) -> int:
        """Start of a stretch with nothing else in it, at a whole reading."""
        each = self.settings.interval * 1000
        first, last = self.begin + int(CLEAN_SHARE * (self.end - self.begin)), self.end - length - HOUR
        for _ in range(TRIES if last > first else 0):
            start = first + int(self.random.random() * (last - first)) // each * each
            end = start + length
            busy = [
                *((a - MARGIN, b + MARGIN) for a, b, name in self.planted if channel in (None, name)),
                *((a - DISTANCE, b + DISTANCE) for a, b in self.taken),
            ]
            if any(start < b and end > a for a, b in busy):
                continue
            # of a day or more some is load in any case
            if channel is None or length >= DAY * 1000 or self.schedule.share_of_load(start / 1000, end / 1000) > 0.6:
                self.taken.append((start, end))
                return start
        raise PlantSettingsError(
            f"a plant's faults name {kind}, and its record has no quiet stretch of {length / 1000:g} s left "
            f"for it: give more days, fewer pairs, or a smaller {kind} ({FAULTS[kind].means})"
        )


def folds(settings: PlantSettings) -> list[tuple[int, int]]:
    """Stretches of the record (milliseconds) whose local times occur twice, each with both of its passes."""
    found = []
    offset = settings.offset(settings.begin - DAY)
    for second in range(settings.begin - DAY, settings.end + DAY, 900):
        now = settings.offset(second)
        if now < offset:
            found.append((1000 * (second - offset + now), 1000 * (second + offset - now)))
        offset = now
    return found


def first_days(settings: PlantSettings) -> tuple[int, int]:
    """The longest stretch (milliseconds) of the record of days 1 to 12 of one month, which dates tell in two ways.

    Raises:
        PlantSettingsError: the record has less than three such days.
    """
    spans: dict[tuple[int, int], list[int]] = {}
    for number in range(settings.days):
        day = settings.first_day.fromordinal(settings.first_day.toordinal() + number)
        if day.day <= 12:
            spans.setdefault((day.year, day.month), []).append(day.toordinal())
    longest = max(spans.values(), key=len, default=[])
    if len(longest) < 3:
        raise PlantSettingsError(
            "a plant's faults name time_ambiguous, but its record has no three days of the first twelve of a month: "
            "give another start or more days"
        )
    first, last = (settings.first_day.fromordinal(day) for day in (longest[0], longest[-1] + 1))
    return 1000 * settings.local_time(first, 0), min(1000 * settings.local_time(last, 0), settings.end * 1000)
