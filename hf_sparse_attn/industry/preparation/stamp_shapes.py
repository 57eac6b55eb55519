"""How a time stamp is written: text -> the format that reads all stamps of its shape.

Which of two numbers is the day cannot be told from one stamp: such a shape has several orders, and `DateOrder` of
``date_order.py`` chooses among them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
WEEKDAY = re.compile(r"^(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*\.?,?\s+", re.IGNORECASE)
ABBREVIATIONS = {  # RFC 2822, 4.3, and the zones of plants in Europe and Japan
    **{"EDT": "-0400", "EST": "-0500", "CDT": "-0500", "CST": "-0600", "MDT": "-0600", "MST": "-0700"},
    **{"PDT": "-0700", "PST": "-0800", "JST": "+0900", "WET": "+0000", "WEST": "+0100", "CET": "+0100"},
    **{"CEST": "+0200", "EET": "+0200", "EEST": "+0300", "UTC": "+0000", "GMT": "+0000"},
}
ZONE = rf"(?P<gap>\s*)(?P<zone>Z|[+-]\d{{2}}(?::?\d{{2}})?|{'|'.join(ABBREVIATIONS)})"
DATES = (
    r"(?P<year>\d{4})(?P<mark>[-/.])(?P<month>\d{1,2})(?P=mark)(?P<day>\d{1,2})",
    r"(?P<year>\d{4})年\s*(?P<month>\d{1,2})月\s*(?P<day>\d{1,2})日",
    r"(?P<one>\d{1,2})(?P<mark>[-/.])(?P<two>\d{1,2})(?P=mark)(?P<three>\d{4}|\d{2})",
    rf"(?P<day>\d{{1,2}})(?P<mark>[-/. ])(?P<name>{MONTH})(?P<mark2>,? |[-/.])(?P<year>\d{{4}}|\d{{2}})",
    rf"(?P<name>{MONTH})(?P<mark> +)(?P<day>\d{{1,2}})(?P<mark2>,? )(?P<year>\d{{4}})",
    rf"(?P<name>{MONTH})(?P<mark> +)(?P<day>\d{{1,2}})",
    r"(?P<compact>\d{8})",
)
CLOCKS = (
    r"(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2})(?P<fraction>[.,:]\d{1,9})?)?",
    r"(?P<hour>\d{1,2})\.(?P<minute>\d{2})\.(?P<second>\d{2})(?P<fraction>\.\d{1,9})?",
    r"(?P<hour>\d{1,2})時(?P<minute>\d{1,2})分(?:(?P<second>\d{1,2})秒)?",
    r"(?P<digits>\d{6})(?P<fraction>[.,]\d{1,9})?",
    r"(?P<digits>\d{4})",
    r"(?P<hour>\d{1,2})(?=\s*[ap]\.?m)",
)
HALF = r"(?P<halfgap>\s*)(?P<half>[ap]\.?m\.?)"
JOINT = r"(?P<joint>T|,? +|[-_:])"
LATE_YEAR = r"(?P<lategap> +)(?P<late>\d{4})"
MIDNIGHT = r"(^|[T ,_-])24([:.時])"


@dataclass(frozen=True)
class Shape:
    """How stamps of one kind are written.

    Attributes:
        format: of strftime, for polars; ``{0}{1}{2}`` stand for the parts of a date whose order is not known.
        replaced: (regular expression, text) that are replaced in the stamp first.
        orders: the orders in which the parts of the date can stand.
        zoned: whether it has an offset from UTC.
        has_date, has_clock, has_year: what it holds.
        midnight: it writes the end of a day as 24:00.
    """

    format: str
    replaced: tuple[tuple[str, str], ...] = ()
    orders: tuple[str, ...] = ()
    zoned: bool = False
    has_date: bool = True
    has_clock: bool = True
    has_year: bool = True
    midnight: bool = False

    def of_order(self, order: str) -> str:
        """The format with the parts of the date in that order, e.g. "dmy"."""
        year = "%y" if len(self.orders) == 3 else "%Y"
        parts = {"d": "%d", "m": "%m", "y": year}
        return self.format.format(*(parts[part] for part in order))


def shape_of(text: str) -> Shape | None:
    """The shape of a stamp; None if it is no stamp."""
    text = text.strip()
    weekday = WEEKDAY.match(text)
    rest = text[weekday.end() :] if weekday else text
    for pattern in _patterns():
        if match := pattern.fullmatch(rest):
            return _shape(match, ((rf"(?i){WEEKDAY.pattern}", ""),) if weekday else ())
    return None


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    flags = re.IGNORECASE
    ends = rf"(?:{HALF})?(?:{ZONE})?(?:{LATE_YEAR})?"
    both = [re.compile(f"{date}{JOINT}{clock}{ends}", flags) for date in DATES for clock in CLOCKS]
    dates = [re.compile(date, flags) for date in DATES]
    clocks = [re.compile(rf"{clock}(?:{HALF})?", flags) for clock in CLOCKS[:3]]
    return (*both, *dates, *clocks)


def _shape(match: re.Match[str], replaced: tuple[tuple[str, str], ...]) -> Shape | None:
    parts = {name: part for name, part in match.groupdict().items() if part is not None}
    years = {"year", "three", "compact", "late"} & parts.keys()
    if "late" in parts and len(years) > 1:
        return None
    date, clock, zone = _date(match, parts), _clock(match, parts), _zone(parts)
    return Shape(
        format="".join((date, parts.get("joint", ""), clock, zone, " %Y" if "late" in parts else "")),
        replaced=(*replaced, *_replaced(parts)),
        orders=() if "three" not in parts else ("dmy", "mdy") if len(parts["three"]) == 4 else ("dmy", "mdy", "ymd"),
        zoned=bool(zone),
        has_date=bool(date),
        has_clock=bool(clock),
        has_year=bool(years),
        midnight=parts.get("hour") == "24",
    )


def _date(match: re.Match[str], parts: dict[str, str]) -> str:
    mark, mark2 = parts.get("mark", ""), parts.get("mark2", "")
    if "compact" in parts:
        return "%Y%m%d"
    if "three" in parts:
        return f"{{0}}{mark}{{1}}{mark}{{2}}"
    if "name" in parts:
        year = "" if "year" not in parts else "%Y" if len(parts["year"]) == 4 else "%y"
        # %B reads short names, too, and a space any number of spaces
        first, second = ("%d", "%B") if match.start("day") < match.start("name") else ("%B", "%d")
        return f"{first}{mark[:1]}{second}{mark2}{year}"
    if "month" in parts:
        return f"%Y{mark}%m{mark}%d" if mark else "%Y年%m月%d日"
    return ""


def _clock(match: re.Match[str], parts: dict[str, str]) -> str:
    fraction = "%.f" if "fraction" in parts else ""
    if "digits" in parts:
        return ("%H%M%S" if len(parts["digits"]) == 6 else "%H%M") + fraction
    if "hour" not in parts:
        return ""
    mark = match.string[match.end("hour")] if "minute" in parts else ""
    end = {"時": "分", "": ""}.get(mark, mark)
    clock = ("%I" if "half" in parts else "%H") + (f"{mark}%M" if mark else "")
    if mark == "時":
        clock += end + ("%S秒" if "second" in parts else "")
    elif "second" in parts:
        clock += f"{end}%S{fraction}"
    return clock + (f"{parts['halfgap']}%p" if "half" in parts else "")


def _zone(parts: dict[str, str]) -> str:
    if "zone" not in parts:
        return ""
    return parts["gap"] + ("%z" if parts["zone"].upper() in ABBREVIATIONS else "%#z")


def _replaced(parts: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """What the format cannot say: commas before fractions, points in names, zones by name."""
    replaced: list[tuple[str, str]] = []
    if parts.get("fraction", ".")[0] in ",:":
        replaced.append((r"(\d{2})[,:](\d{1,9})(\D*|\s*[+-]\d{2}:?\d{2}|\s+\d{4})$", "${1}.${2}${3}"))
    if "name" in parts and (parts["name"].endswith(".") or parts["name"].lower().startswith("sept")):
        replaced.append((r"(?i)(sept(?:ember)?|[a-z]{3,9})\.", "${1}"))
        replaced.append((r"(?i)\bsept\b", "Sep"))
    if "." in parts.get("half", ""):
        replaced.append((r"(?i)([ap])\.m\.?", "${1}m"))
    if parts.get("hour") == "24":
        replaced.append((MIDNIGHT, "${1}00${2}"))
    zone = parts.get("zone", "").upper()
    if zone in ABBREVIATIONS:
        replaced.append((rf"(?i)\b{zone}\b", ABBREVIATIONS[zone]))
    return tuple(replaced)
