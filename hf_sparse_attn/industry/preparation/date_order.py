"""Whether the day or the month stands first, decided from all stamps of a file; what cannot be decided is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ...system.extras import needs_extra
from ..errors import PlantDataError

with needs_extra("industry", "data of plants"):
    import polars as pl

PARTS = r"^\D*?(?<one>\d{1,2})(?<mark>[-/.])(?<two>\d{1,2})[-/.](?<three>\d{4}|\d{2})(?:\D|$)"
AT = {"dmy": ("one", "two", "three"), "mdy": ("two", "one", "three"), "ymd": ("three", "two", "one")}
WAYS = [
    "say --day-first if 05/06/2024 is the fifth of June",
    "say --month-first if it is the sixth of May",
    "say how stamps are written with --time-format, such as '%d.%m.%Y %H:%M:%S'",
]
CLEAR = 10  # one order fits so many times better than the others that what is left are mistakes

Style = tuple[str, int]  # the mark between the parts, the digits of the year


@dataclass
class _Evidence:
    rows: int = 0
    differing: int = 0  # rows that the orders read as different dates
    against: dict[str, int] = field(default_factory=dict)
    example: dict[str, tuple[int, str]] = field(default_factory=dict)  # order: a line and stamp that it cannot read


class DateOrder:
    """Collects the stamps of one file, then says the order of each style of date.

    Args:
        file: named in errors.
        day_first: what the user says; None = told from the stamps.
        tolerance: share of stamps that may be mistakes.
    """

    def __init__(self, file: str, day_first: bool | None, tolerance: float) -> None:
        self.file, self.day_first, self.tolerance = file, day_first, tolerance
        self._evidence: dict[Style, _Evidence] = {}

    def add(self, texts: pl.Series, lines: pl.Series) -> None:
        """Take the stamps of some rows, and the lines that they stand in."""
        parts = texts.alias("text").str.extract_groups(PARTS).struct.unnest()
        numbers = parts.with_columns(
            pl.col("one", "two", "three").cast(pl.Int32), digits=pl.col("three").str.len_bytes(), line=lines, text=texts
        ).filter(pl.col("one").is_not_null())
        for key, rows in numbers.group_by("mark", "digits"):
            self._count((str(key[0]), int(key[1])), rows)

    def _count(self, style: Style, rows: pl.DataFrame) -> None:
        evidence = self._evidence.setdefault(style, _Evidence())
        evidence.rows += rows.height
        evidence.differing += int((rows["one"] != rows["two"]).sum())
        latest = datetime.now(UTC).year % 100 + 1
        for order in ("dmy", "mdy") if style[1] == 4 else ("dmy", "mdy", "ymd"):
            day, month, year = AT[order]
            wrong = ~pl.col(day).is_between(1, 31) | ~pl.col(month).is_between(1, 12)
            if style[1] == 2:  # nothing was recorded in the future; 70 to 99 are of the last century
                wrong |= pl.col(year).is_between(latest + 1, 69)
            failing = rows.filter(wrong)
            evidence.against[order] = evidence.against.get(order, 0) + failing.height
            if failing.height and order not in evidence.example:
                evidence.example[order] = (int(failing["line"][0]), str(failing["text"][0]))

    def orders(self) -> dict[Style, str]:
        """The order of each style.

        Raises:
            PlantDataError: no stamp tells it, or stamps contradict each other.
        """
        return {style: self._order(style, evidence) for style, evidence in self._evidence.items()}

    def _order(self, style: Style, evidence: _Evidence) -> str:
        if self.day_first is not None:
            return "dmy" if self.day_first else "mdy"
        ranked = sorted(evidence.against, key=lambda order: evidence.against[order])
        best, second = ranked[0], ranked[1]
        misfits, others = evidence.against[best], evidence.against[second]
        if misfits == others == 0:
            if not evidence.differing and style[1] == 4:
                return best
            raise PlantDataError(
                f"dates such as {self._sample(style)} can be read with the day or with the month first: none of "
                f"{evidence.rows} stamps tells which",
                WAYS,
                file=self.file,
            )
        if misfits and (misfits > self.tolerance * evidence.rows or others < CLEAR * misfits):
            (line, text), (other, stamp) = evidence.example[best], evidence.example[second]
            raise PlantDataError(
                f"holds dates of two orders: {stamp!r} (line {other}) and {text!r} (line {line})",
                [*WAYS[:2], "cut the file where the order changes, and prepare both parts"],
                file=self.file,
                line=max(line, other),
            )
        return best

    def _sample(self, style: Style) -> str:
        return f"01{style[0]}02{style[0]}{'2024' if style[1] == 4 else '24'}"

    def values(self) -> dict[str, Any]:
        """Numbers for the finding, by style."""
        return {f"rows_{style[0]}{style[1]}": evidence.rows for style, evidence in self._evidence.items()}
