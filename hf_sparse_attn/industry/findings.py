"""What can be wrong with the data of a plant: flags of single rows, and findings with their place.

The generator of plants writes the faults that it plants as findings too, so that a check is scored against them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntFlag
from typing import Any, Literal

Severity = Literal["information", "warning", "unusable"]


class Quality(IntFlag):
    """Flags of one row, stored as 16 bits. 0: nothing is known against it."""

    DUPLICATE = 1  # equals an earlier row of the same file in every field
    BACKWARD = 2  # its time is before that of the row above it
    EQUAL_STAMP = 4  # shares its time stamp with other rows of its channel that hold other values
    AMBIGUOUS_TIME = 8  # local time that occurs twice, in autumn
    SHIFTED_CLOCK = 16  # its time was corrected by the clock offset of its source
    AFTER_GAP = 32  # the first row after a gap
    STUCK = 64  # one value for far longer than this channel ever holds it
    FLAT = 128  # moves far less than this channel does
    SATURATED = 256  # lies on the limit of the sensor's range
    OTHER_UNIT = 512  # lies in another unit than the rows before it
    NO_NUMBER = 1024  # the field held no number; the value is null


KINDS: dict[str, str] = {  # kind of a finding: what it says
    "bad_line": "a line that could not be read",
    "time_unreadable": "a time stamp that could not be read",
    "time_ambiguous": "time stamps that can be read in more than one way",
    "day_first_dates": "dates with the day before the month",
    "dst_fold": "an hour of local time that occurs twice",
    "dst_gap": "times that do not exist in the local time zone",
    "zone_change": "the time zone of a source changes",
    "epoch_unit_change": "the unit of numeric time stamps changes",
    "duplicates": "rows that occur twice",
    "backward_jump": "time stamps that run backwards",
    "equal_stamps": "several rows of one channel with one time stamp",
    "clock_offset": "the clock of a source is offset against the others",
    "clock_unverified": "the clock of a source could not be compared with the others",
    "gap": "a stretch without data",
    "stuck_sensor": "a sensor repeats one value",
    "flat_sensor": "a sensor moves far less than before",
    "saturated_sensor": "a sensor stays on the limit of its range",
    "unit_change": "a sensor changes its unit",
    "no_number": "fields that hold no number",
    "empty_channel": "a channel without any number",
    "short_record": "too little data for what is planned",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was found, or planted.

    Attributes:
        kind: one of `KINDS`.
        severity: "information" needs no action, "warning" does, "unusable" ends the work.
        asset: the machine; None = all.
        source: path of the file as it was given; None = no single one.
        channel: the sensor or the log's source; None = all.
        start, end: first and last time that it concerns, ISO 8601 in UTC; None = none is known.
        lines: first and last line (row) of ``source``, from 1, both included; None = not a stretch of lines.
        count: how many rows it concerns.
        values: the numbers behind it, by name, e.g. ``{"offset_s": 37.0, "z": 11.2}``.
    """

    kind: str
    severity: Severity
    asset: str | None = None
    source: str | None = None
    channel: str | None = None
    start: str | None = None
    end: str | None = None
    lines: tuple[int, int] | None = None
    count: int = 1
    values: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a finding of kind {self.kind!r}: kinds are {', '.join(KINDS)}")
        if self.lines is not None:  # JSON has lists
            object.__setattr__(self, "lines", tuple(self.lines))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; without the fields that are None."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Finding:
        """Inverse of `to_dict`. Raises ValueError for an unknown kind, TypeError for an unknown field."""
        return cls(**values)
