"""Time stamps of tables: how they are written is told from all of them, and what can be read in two ways is refused.

Numbers (epoch seconds to nanoseconds, Excel days, counters) are in the same order in any unit, so it is not asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ...data.sources import SourceError

if TYPE_CHECKING:
    import pandas as pd

FIX = (
    "set series.time_format, such as '%d.%m.%Y %H:%M:%S' (strftime), or leave series.time out if the rows are in order"
)
ZONE = r"(?:\s*(?P<zone>Z|UTC|GMT|[+-]\d{2}(?::?\d{2})?))?"
SECONDS = r"(?::(?P<second>\d{2})(?:[.,](?P<fraction>\d{1,9}))?)?"
CLOCK = rf"(?:[T ,:]\s*(?P<hour>\d{{1,2}})(?::(?P<minute>\d{{2}}){SECONDS})?(?:\s*(?P<half>[AP])\.?M\.?)?)?"
YEAR_FIRST = r"(?P<year>\d{4})(?P<mark>[-/.])(?P<month>\d{1,2})(?:(?P=mark)(?P<day>\d{1,2}))?"
YEAR_LAST = r"(?P<one>\d{1,2})(?P<other_mark>[-/.])(?P<two>\d{1,2})(?P=other_mark)(?P<last>\d{4})"
STAMP = rf"(?:{YEAR_FIRST}|{YEAR_LAST}){CLOCK}{ZONE}"

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAY = re.compile(r"(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*,?\s+", re.IGNORECASE)
NAME = rf"(?P<name>{'|'.join(MONTHS)})[a-z]*\.?"
NAMED = (
    # 5 Jan 2024 10:00
    re.compile(rf"(?P<day>\d{{1,2}})[ /-]+{NAME}[ ,/-]+(?P<year>\d{{4}})(?P<rest>\D.*)?", re.IGNORECASE),
    # Jan 5, 2024 10:00
    re.compile(rf"{NAME}\s+(?P<day>\d{{1,2}}),?\s+(?P<year>\d{{4}})(?P<rest>\D.*)?", re.IGNORECASE),
    # Jan  5 10:00:00 2024
    re.compile(rf"{NAME}\s+(?P<day>\d{{1,2}})(?P<rest> [\d:.]+)\s+(?P<year>\d{{4}})", re.IGNORECASE),
)
COMPACT = re.compile(r"(\d{4})-?(\d{2})-?(\d{2})T(\d{2})(\d{2})(\d{2})?((?:[.,]\d+)?)(.*)")
WEEK = re.compile(r"(\d{4}-?W\d{2}(?:-?\d)?)(\D.*)?")


class TimeColumn:
    """The time stamps of several tables, which are told together.

    Args:
        name: of the column.
        columns: (file, values) of each table.
        form: how the stamps are written, for ``strftime``; None = told from the stamps.
    """

    def __init__(self, name: str, columns: Sequence[tuple[str, pd.Series]], form: str | None) -> None:
        self.name, self.columns, self.form = name, columns, form

    def stamps(self) -> list[Any]:
        """Array of what the rows of each table are sorted by: numbers, or times in UTC, the same for all tables.

        Raises:
            SourceError: a stamp is missing, is none, can be read in two ways, or is written in another way than others.
        """
        # as one column: how stamps are written is told from all tables together
        times, ends = self._all(), np.cumsum([len(values) for _, values in self.columns])
        return [times.iloc[end - len(values) : end].array for end, (_, values) in zip(ends, self.columns, strict=True)]

    def _all(self) -> pd.Series:
        import pandas as pd

        if self.form is None and all(values.dtype.kind in "iuf" for _, values in self.columns):
            return self._numbers(pd.concat([values for _, values in self.columns], ignore_index=True))
        texts = pd.concat([_texts(values) for _, values in self.columns], ignore_index=True)
        if (lacking := texts.isna() | (texts == "")).any():
            self._refuse(lacking, "is empty", "fill it, or leave the row out")
        if self.form is not None:
            return self._formatted(texts)
        numbers = pd.to_numeric(texts, errors="coerce")
        if numbers.isna().any() and texts.str.fullmatch(r"[+-]?\d+(,\d+)?").all():  # a comma before the fraction
            numbers = pd.to_numeric(texts.str.replace(",", "."))
        if numbers.notna().all():
            # 0930 may be a time, and 01.2024 a month: as numbers they sort in another order
            if (padded := texts.str.fullmatch(r"0\d.*")).any() or texts.str.fullmatch(
                r"\d\d?[.,](18|19|20|21)\d\d"
            ).all():
                self._refuse(padded | ~padded.any(), "may be a date or a time, or a number")
            return self._numbers(numbers)
        # most are numbers: the others are mistakes, not times
        if numbers.notna().mean() > 0.5:
            self._refuse(numbers.isna(), "is no number, as most others are", "correct it, or leave the row out")
        return self._times(texts)

    def _formatted(self, texts: pd.Series) -> pd.Series:
        import pandas as pd

        try:
            times = pd.to_datetime(texts, format=self.form, utc=True, errors="coerce")
        except (ValueError, TypeError) as error:
            raise SourceError(
                f"series.time_format {self.form!r} is no format of time stamps: {error}; {FIX}"
            ) from error
        if times.isna().any():
            self._refuse(times.isna(), f"is not written as series.time_format {self.form!r} says", "correct either")
        return times

    def _numbers(self, numbers: pd.Series) -> pd.Series:
        finite = np.isfinite(numbers.to_numpy(np.float64, na_value=np.nan))
        if not finite.all():
            self._refuse(~finite, "is no time stamp")
        values = numbers.to_numpy(np.float64)
        # 1012024: the last four digits of all may be years
        last_digits = values % 10000
        if ((values >= 1e6) & (values < 1e8) & (last_digits >= 1800) & (last_digits < 2200)).all():
            self._refuse(finite, "may be a date with the year last")
        ordered = np.sort(values)
        if len(ordered) and ordered[0] >= 1e4:
            # seconds, milli-, micro- and nanoseconds lie a factor of a thousand apart: no gap in a table is as large
            jumps = ordered[1:] / ordered[:-1]
            if len(jumps) and jumps.max() > 500:
                after = ordered[1:][jumps.argmax()]
                self._refuse(values >= after, f"is in another unit than {ordered[0]:.15g}", "write all in one")
        return numbers

    def _times(self, texts: pd.Series) -> pd.Series:
        import pandas as pd

        # one pattern for all, as names of months were replaced by numbers
        parts = texts.map(_spelled).astype(object).str.extract(rf"^(?:{STAMP})$", flags=re.IGNORECASE)
        year_last = parts["last"].notna()
        if (unknown := ~year_last & parts["year"].isna()).any():
            self._refuse(unknown, "is no time stamp")
        if year_last.any():
            if not year_last.all():
                self._refuse(
                    year_last, f"is written in another way than {texts[~year_last].iloc[0]!r}", "write all in one"
                )
            day, month = ("one", "two") if self._day_first(texts, parts) else ("two", "one")
            parts = parts.assign(year=parts["last"], month=parts[month], day=parts[day])
        zoned = parts["zone"].notna()
        if zoned.any() and not zoned.all():
            self._refuse(~zoned, "has no offset from UTC, while others have one", "write all with it")
        # ISO 8601 in UTC: a month without a day is its first, a day without a time its midnight
        dates = parts["year"] + "-" + parts["month"].str.zfill(2) + "-" + parts["day"].fillna("1").str.zfill(2)
        clock = self._hours(parts) + ":" + parts["minute"].fillna("00") + ":" + parts["second"].fillna("00")
        zone = parts["zone"].fillna("Z").str.upper().replace({"UTC": "Z", "GMT": "Z"})
        times = pd.to_datetime(
            dates + "T" + clock + "." + parts["fraction"].fillna("0") + zone,
            format="ISO8601",
            utc=True,
            errors="coerce",
        )
        if times.isna().any():
            self._refuse(times.isna(), "is no time stamp")
        return times

    def _day_first(self, texts: pd.Series, parts: pd.DataFrame) -> bool:
        # a number above 12 is a day; one such stamp tells how all are written
        one, two = parts["one"].astype(int), parts["two"].astype(int)
        if (one > 12).any() and (two > 12).any():
            self._refuse(
                two > 12, f"has the month first, and {texts[one > 12].iloc[0]!r} the day", "write all in one way"
            )
        if not (one > 12).any() and not (two > 12).any() and (one != two).any():
            self._refuse(one != two, "may have the day or the month first: no stamp tells which")
        return bool((one > 12).any())

    def _hours(self, parts: pd.DataFrame) -> pd.Series:
        half, hours = parts["half"].str.upper(), parts["hour"].fillna("0").astype(int)
        if half.notna().any():
            if (wrong := parts["hour"].notna() & (half.isna() | (hours < 1) | (hours > 12))).any():
                self._refuse(wrong, "is no time before or after noon, while others are")
            # 12 AM is 0, 12 PM is 12
            hours = (hours % 12 + 12 * (half == "P")).where(parts["hour"].notna(), 0)
        return hours.astype(str).str.zfill(2)

    def _refuse(self, wrong: Any, what: str, fix: str = FIX) -> NoReturn:
        at = int(np.flatnonzero(np.asarray(wrong))[0])
        table = 0
        while at >= len(self.columns[table][1]):
            at, table = at - len(self.columns[table][1]), table + 1
        file, values = self.columns[table]
        value = values.iloc[at]
        held = repr(value) if isinstance(value, str) else str(value)
        raise SourceError(f"{file}, row {at}: column {self.name!r} holds {held}, which {what}: {fix}")


def _texts(values: pd.Series) -> pd.Series:
    """Texts without white space around them; times as ISO 8601 writes them."""

    def text(value: Any) -> str:
        return value.isoformat() if hasattr(value, "isoformat") else str(value).strip()

    return values.astype(object).map(text, na_action="ignore").astype(object)


def _spelled(text: str) -> str:
    """A stamp with the name of its month, or in the short forms of ISO 8601, as year-month-day and time."""
    if week := WEEK.fullmatch(text):
        try:
            return date.fromisoformat(week[1]).isoformat() + (week[2] or "")
        except ValueError:
            return text
    if compact := COMPACT.fullmatch(text):
        year, month, day, hour, minute, second, fraction, rest = compact.groups()
        return f"{year}-{month}-{day}T{hour}:{minute}:{second or '00'}{fraction}{rest}"
    # digits only: no name of a month
    if text[:1].isdigit() and not any(c.isalpha() for c in text[:8]):
        return text
    text = WEEKDAY.sub("", text)
    for form in NAMED:
        if named := form.fullmatch(text):
            return f"{named['year']}-{MONTHS.index(named['name'].lower()) + 1}-{named['day']}{named['rest'] or ''}"
    return text
