"""The data faults that can be asked for, with their magnitudes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MONTH = 30 * 86_400  # seconds
READINGS = 4  # that a stretch of a sensor's record holds at least


class Magnitude(NamedTuple):
    """How large a data fault is unless it is said, what is allowed, and what the number is.

    ``of``: "seconds" of the record, which hold `READINGS` readings at least; "count", a whole number; "share"; "offset"
    in seconds, either way but not 0; "one", which is all there can be.
    """

    of: str
    default: float
    least: float
    most: float
    means: str


FAULTS: dict[str, Magnitude] = {
    "duplicates": Magnitude("share", 0.05, 1e-4, 0.5, "share of rows that are followed by their copy"),
    "clock_offset": Magnitude("offset", 37, -86_400, 86_400, "seconds that the clock of one source is ahead"),
    "gap": Magnitude("seconds", 10_800, 1, MONTH, "seconds without rows"),
    "stuck_sensor": Magnitude("seconds", 21_600, 1, MONTH, "seconds of one value"),
    "flat_sensor": Magnitude("seconds", 43_200, 1, MONTH, "seconds with a fiftieth of the sensor's movement"),
    "saturated_sensor": Magnitude("seconds", 14_400, 1, MONTH, "seconds on the upper limit of the range"),
    "unit_change": Magnitude("share", 0.5, 0.05, 0.95, "share of the record before °C become °F, or bar kPa"),
    "zone_change": Magnitude(
        "share", 0.5, 0.05, 0.95, "share of the record before local times become UTC or UTC local"
    ),
    "epoch_unit_change": Magnitude("share", 0.5, 0.05, 0.95, "share of the record before milliseconds become seconds"),
    "day_first_dates": Magnitude("one", 1, 1, 1, "one file has dates as 13/09/2024"),
    "time_ambiguous": Magnitude("one", 1, 1, 1, "one file has such dates of the first twelve days of a month only"),
    "equal_stamps": Magnitude("count", 8, 2, 80, "rows in a row, of 80, with one time stamp"),
    "backward_jump": Magnitude("seconds", 1_200, 1, MONTH, "seconds of rows that are written too late, as one block"),
    "bad_line": Magnitude("count", 1, 1, 100, "lines that are cut off"),
    "time_unreadable": Magnitude("count", 1, 1, 100, "lines whose time stamp is 0000-00-00 00:00:00"),
    "no_number": Magnitude("share", 0.01, 1e-4, 0.5, "share of a channel's fields that are empty or a word"),
    "empty_channel": Magnitude("one", 1, 1, 1, "one channel has no number at all"),
}


def magnitudes(asked: Any, interval: int) -> dict[str, float]:
    """The data faults that are asked for, with a magnitude each, in the order of `FAULTS`.

    Args:
        asked: "all", names, or names with a magnitude or None.
        interval: seconds between two readings.

    Raises:
        ValueError: what is allowed instead, as the end of a sentence.
    """
    if isinstance(asked, str) and asked == "all":
        asked = list(FAULTS)
    if isinstance(asked, str) or not isinstance(asked, Mapping | Sequence):
        raise ValueError("all, a list like [gap, duplicates], or magnitudes like {gap: 3600}")
    values = dict(asked) if isinstance(asked, Mapping) else [(kind, None) for kind in asked]
    chosen = {}
    for kind, value in values.items() if isinstance(values, dict) else values:
        if not isinstance(kind, str) or kind not in FAULTS:
            raise ValueError(f"of {', '.join(FAULTS)}; {kind!r} is none (dst_fold arises by zone and period)")
        chosen[kind] = _magnitude(kind, value, interval)
    return {kind: chosen[kind] for kind in FAULTS if kind in chosen}


def _magnitude(kind: str, value: Any, interval: int) -> float:
    known = FAULTS[kind]
    least = max(known.least, READINGS * interval) if known.of == "seconds" else known.least
    if value is None:
        return float(max(known.default, least))
    number = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= known.most
    if not number or (known.of == "offset" and value == 0) or (known.of == "count" and value != int(value)):
        kind_of = {"count": "a whole number", "offset": "a number other than 0"}.get(known.of, "a number")
        raise ValueError(f"with {kind} {kind_of} from {least:.10g} to {known.most:.10g} ({known.means})")
    return float(value)
