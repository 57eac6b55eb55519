"""What a generated plant is like: size, period, how causes and failures are linked, and which data faults it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from .fault_kinds import magnitudes

DAY = 86_400  # seconds
SHORTEST_LAG, LONGEST_LAG = 600.0, 21.0 * DAY  # between which the seed draws the lag, in seconds
LAG_SHARE = 0.25  # of the record, at most, is the lag that the seed draws: causes need room before the first failure


class PlantSettingsError(ValueError):
    """A setting of a generated plant that cannot be used; the message says which, and what is allowed."""


@dataclass(frozen=True)
class PlantSettings:
    """Settings of a generated plant.

    Attributes:
        seed: the same seed and settings give the same bytes.
        start: local date at whose midnight the record starts.
        days: length of the record, of 24 hours each.
        zone: IANA name of the zone whose working hours and local time stamps the plant has.
        interval: seconds between two readings of a sensor; divides a day.
        channels: sensors of an asset.
        log_lines: of an asset a day, on average.
        null: the same causes and the same failures, but at times that have nothing to do with each other.
        pairs: causes with their failure, of each asset; None = one every two days, but 10 in the first ten, and 40 at
            most.
        lag: seconds from cause to failure; None = drawn by the seed, log-uniform from 10 minutes to 3 weeks or a
            quarter of the record.
        jitter: standard deviation of the single lags around it, as a share of it.
        faults: data faults that are injected, each once: names of `fault_kinds.FAULTS`, names with magnitudes, or
            "all".

    Raises:
        PlantSettingsError: a setting is impossible.
    """

    seed: int = 0
    assets: int = 2
    start: str = "2024-09-02"
    days: int = 60
    zone: str = "Europe/Berlin"
    interval: int = 60
    channels: int = 8
    log_lines: int = 800
    null: bool = False
    pairs: int | None = None
    lag: float | None = None
    jitter: float = 0.03
    faults: Mapping[str, float] | Sequence[str] | str = ()

    def __post_init__(self) -> None:
        for name, least, most in (
            ("seed", 0, 2**63 - 1),
            ("assets", 1, 500),
            ("days", 3, 3660),
            ("interval", 1, 3600),
            ("channels", 5, 200),
            ("log_lines", 20, 500_000),
        ):
            self._check_integer(name, least, most)
        if self.pairs is not None:
            self._check_integer("pairs", 1, 1000)
        if DAY % self.interval:
            self._refuse("interval", "a number of seconds that divides a day, e.g. 1, 10, 60 or 300")
        if not isinstance(self.null, bool):
            self._refuse("null", "true or false")
        self._check_number("jitter", 0.0, 0.2)
        if self.lag is not None:
            self._check_number("lag", 60.0, self.days * DAY / 2)
        self._check_period()
        try:
            object.__setattr__(self, "faults", magnitudes(self.faults, self.interval))
        except ValueError as error:
            self._refuse("faults", str(error))

    def _check_integer(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self._refuse(name, f"a whole number from {least} to {most}")

    def _check_number(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        # NaN fails the comparison
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            self._refuse(name, f"a number from {least:.10g} to {most:.10g}")

    def _check_period(self) -> None:
        try:
            first = date.fromisoformat(self.start)
        except (TypeError, ValueError):
            self._refuse("start", "a date like 2024-09-02")
        # log formats, and dates with two readings, need four digits and no calendar reform
        if not 1970 < first.year < 2200:
            self._refuse("start", "a date from 1971 to 2199")
        try:
            ZoneInfo(self.zone)
        except (TypeError, ValueError, OSError, ZoneInfoNotFoundError):
            self._refuse("zone", "an IANA name like Europe/Berlin, Asia/Tokyo or UTC")

    def _refuse(self, name: str, allowed: str) -> None:
        raise PlantSettingsError(f"a plant's {name} is {getattr(self, name)!r}: must be {allowed}")

    @property
    def magnitudes(self) -> dict[str, float]:
        """The data faults with a magnitude each."""
        return dict(self.faults)  # type: ignore[arg-type]

    @property
    def first_day(self) -> date:
        return date.fromisoformat(self.start)

    @property
    def begin(self) -> int:
        """Start of the record, seconds since 1970 in UTC."""
        return self.local_time(self.first_day, 0)

    @property
    def end(self) -> int:
        """End of the record, not included."""
        return self.begin + self.days * DAY

    @property
    def link_count(self) -> int:
        """Causes with their failure, of each asset."""
        return min(40, max(min(10, self.days), self.days // 2)) if self.pairs is None else self.pairs

    def local_time(self, day: date, minutes: float) -> int:
        """Seconds since 1970 of a local time of day, in minutes after midnight as clocks show them."""
        shown = datetime(day.year, day.month, day.day) + timedelta(minutes=minutes)
        return int(shown.replace(tzinfo=ZoneInfo(self.zone)).timestamp())

    def offset(self, second: int) -> int:
        """Seconds that local time is ahead of UTC."""
        shift = datetime.fromtimestamp(second, ZoneInfo(self.zone)).utcoffset()
        return 0 if shift is None else int(shift.total_seconds())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)
