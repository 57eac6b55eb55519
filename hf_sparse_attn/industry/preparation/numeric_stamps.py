"""Numbers as times: the unit is told by the magnitude, which differs by a factor of a thousand for times of 1990-2100.

Windows FILETIME (LDAP): 100 ns since 1601 (MS-DTYP 2.3.3). Ticks of .NET: 100 ns since the year 1. Excel: days since
1899-12-30. Compact: the digits of a date (8) and its hour (10), minute (12), second (14) and millisecond (17).
"""

from __future__ import annotations

from dataclasses import dataclass

from ...system.extras import needs_extra
from ..errors import PlantDataError

with needs_extra("industry", "data of plants"):
    import polars as pl

FIRST, LAST = 631_152_000, 4_102_444_800  # seconds since 1970: 1990 and 2100
DAY = 86_400
FILETIME_1970, TICKS_1970 = 116_444_736_000_000_000, 621_355_968_000_000_000
EXCEL_1970 = 25_569
COMPACT = {8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S", 17: "%Y%m%d%H%M%S%3f"}


@dataclass(frozen=True)
class Unit:
    """A way to count time: (number - ``origin``) · ``ns`` nanoseconds since 1970, for numbers of first to last."""

    name: str
    ns: int
    origin: int
    first: int
    last: int


def _unit(name: str, ns: int, origin: int, per_second: float) -> Unit:
    return Unit(name, ns, origin, int(FIRST * per_second) + origin, int(LAST * per_second) + origin)


EPOCHS = (
    _unit("epoch-s", 10**9, 0, 1),
    _unit("epoch-ms", 10**6, 0, 10**3),
    _unit("epoch-us", 10**3, 0, 10**6),
    _unit("epoch-ns", 1, 0, 10**9),
    _unit("excel", DAY * 10**9, EXCEL_1970, 1 / DAY),
    _unit("filetime", 100, FILETIME_1970, 10**7),
    _unit("ticks", 100, TICKS_1970, 10**7),
)
BY_NAME = {unit.name: unit for unit in EPOCHS}


def split_numbers(texts: pl.Series) -> pl.DataFrame:
    """(whole: Int64, billionths: Int64) of numbers; null where a text is none. A comma may stand before the fraction.

    Floats would lose nanoseconds: they hold 16 digits, and such times have 19.
    """
    name = texts.name
    frame = texts.str.extract_groups(r"^\s*\+?(?<whole>\d{1,18}|\d{19})(?:[.,](?<part>\d+))?\s*$").struct.unnest()
    frame = frame.select(
        pl.col("whole").cast(pl.Int64, strict=False),
        pl.col("part").fill_null("").str.pad_end(9, "0").str.slice(0, 9).cast(pl.Int64).alias("billionths"),
    )
    other = frame["whole"].is_null() & texts.str.contains(r"(?i)^\s*\d+(?:\.\d+)?e\+?\d+\s*$").fill_null(False)
    if other.any():  # 1.7E+09, as spreadsheets write it
        numbers = texts.to_frame().select(pl.col(name).str.strip_chars().cast(pl.Float64, strict=False))[name]
        whole = numbers.round(0).cast(pl.Int64, strict=False)
        frame = frame.with_columns(whole=pl.when(other).then(whole).otherwise(pl.col("whole")))
    return frame


def units_of(whole: pl.Series) -> pl.Series:
    """Name of the unit of each number; null where none gives a time of 1990-2100.

    A number that two units read, of which one is compact or ticks, has both names, joined by a bar.
    """
    column = pl.col("whole")
    names = []
    for unit in EPOCHS:
        names.append(pl.when(column.is_between(unit.first, unit.last, closed="left")).then(pl.lit(unit.name)))
    for digits in COMPACT:
        low, high = 1990 * 10 ** (digits - 4), 2100 * 10 ** (digits - 4)
        year = column // 10 ** (digits - 4)
        month, day = column // 10 ** (digits - 6) % 100, column // 10 ** (digits - 8) % 100
        hour = column // 10 ** (digits - 10) % 100 if digits >= 10 else pl.lit(0)
        fits = column.is_between(low, high) & year.is_between(1990, 2100) & month.is_between(1, 12)
        fits &= day.is_between(1, 31) & (hour <= 23)
        names.append(pl.when(fits).then(pl.lit("compact")))
    frame = whole.alias("whole").to_frame()
    return frame.select(pl.concat_str(names, separator="|", ignore_nulls=True).replace("", None).alias("unit"))["unit"]


def nanoseconds(numbers: pl.DataFrame, unit: str) -> pl.Series:
    """Nanoseconds since 1970 of (whole, billionths) in that unit; null where a compact date is none.

    Days have 16 digits in a float, which is a microsecond: they are rounded to milliseconds.
    """
    if unit == "compact":
        return _compact(numbers["whole"])
    chosen = BY_NAME[unit]
    whole, part = pl.col("whole"), pl.col("billionths")
    if unit == "excel":
        ms = (whole - chosen.origin) * (DAY * 1000) + (part * (DAY * 1000) + 5 * 10**8) // 10**9
        return numbers.select((ms * 10**6).alias("ns"))["ns"]
    return numbers.select(((whole - chosen.origin) * chosen.ns + part * chosen.ns // 10**9).alias("ns"))["ns"]


def _compact(whole: pl.Series) -> pl.Series:
    texts = whole.cast(pl.String).alias("text")
    times = pl.Series("ns", [None] * len(texts), dtype=pl.Int64)
    for digits, form in COMPACT.items():
        fits = texts.str.len_bytes() == digits
        if fits.fill_null(False).any():
            # strftime has no hour without a minute
            padded, form = (texts + "00", form + "%M") if digits == 10 else (texts, form)
            read = padded.str.to_datetime(form, time_unit="ns", strict=False).cast(pl.Int64)
            times = read.zip_with(fits.fill_null(False), times)
    return times.alias("ns")


def one_unit(found: str, file: str, line: int, value: object) -> None:
    """Raises PlantDataError where a number can be read in two units."""
    if "|" not in found:
        return
    one, two = found.split("|")[:2]
    raise PlantDataError(
        f"the time stamp {value} can be read as {one} and as {two}",
        [f"say --time-format {one}", f"say --time-format {two}", "name another column with --column time=NAME"],
        file=file,
        line=line,
    )
