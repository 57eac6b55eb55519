"""Time stamps of one file, read as its rows come in chunks; what only all of them tell is surveyed first."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from ...system.extras import needs_extra
from ..errors import PlantDataError
from .date_order import PARTS, DateOrder, Style
from .ingest_settings import UNITS, IngestSettings
from .numeric_stamps import nanoseconds, one_unit, split_numbers, units_of
from .stamp_shapes import Shape, shape_of

with needs_extra("industry", "data of plants"):
    import polars as pl

DAY = 86_400 * 10**9  # nanoseconds
TRIED = 200  # stamps of a chunk that are looked at one by one, when no known shape reads them
OFFSET = r"(Z|[+-]\d{2}(?::?\d{2})?|[A-Z]{3,4})(?:\s+\d{4})?\s*$"
HALF_YEAR = 180


class SurveyNeededError(Exception):
    """The order of dates, or the year, is decided from all stamps of a file: `StampReader.survey` must see them."""


class StampReader:
    """Reads the stamps of one file.

    Args:
        file: its path, which errors name and whose time of change gives the year of stamps without one.
        settings: what the user says.
    """

    def __init__(self, file: str, settings: IngestSettings) -> None:
        self.file, self.settings = file, settings
        self.shapes: list[Shape] = []
        self.orders: dict[Style, str] | None = None
        self.first_year: int | None = settings.year
        self._order = DateOrder(file, settings.day_first, settings.max_bad_share)
        self._turns, self._last_date = 0, None  # type: tuple[int, tuple[int, int] | None]
        self._year_turns, self._before = 0, None  # type: tuple[int, tuple[int, int] | None]

    # -- the file as a whole ------------------------------------------------------------------------------------

    def survey(self, texts: pl.Series, lines: pl.Series) -> None:
        """Take the stamps of some rows; `decide` comes when all were taken."""
        self._order.add(texts, lines)
        dates = _yearless(texts)
        turns, self._last_date = _new_years(dates, self._last_date)
        self._turns += int(turns.sum())

    def decide(self) -> None:
        """Decide what all stamps tell.

        Raises:
            PlantDataError: the order of dates cannot be told.
        """
        self.orders = self._order.orders()
        if self.first_year is None and self._last_date is not None:
            changed = datetime.fromtimestamp(Path(self.file).stat().st_mtime, UTC)
            later = self._last_date > (changed.month, changed.day)
            # the last line was written before the file was changed
            self.first_year = changed.year - (1 if later else 0) - self._turns

    # -- its rows -----------------------------------------------------------------------------------------------

    def read(self, stamps: pl.Series, lines: pl.Series) -> pl.DataFrame:
        """Columns ``ns`` (since 1970: UTC if zoned, else local time), ``offset`` (text, null: none) and ``unit``.

        Raises:
            SurveyNeededError: `decide` was not called, and is needed.
            PlantDataError: a number can be read in two units.
        """
        if stamps.dtype.is_temporal():
            return _typed(stamps)
        if self.settings.time_format not in (None, *UNITS):
            return self._formatted(stamps.cast(pl.String))
        texts = stamps.cast(pl.String).str.strip_chars().alias("text")
        frame = pl.DataFrame({"ns": _nothing(len(texts)), "offset": _no_text(len(texts)), "unit": _no_text(len(texts))})
        if self.settings.time_format is None:
            frame = self._shaped(texts, frame)
        if frame["ns"].null_count():
            frame = self._numbers(texts, lines, frame)
        return frame

    def _formatted(self, texts: pl.Series) -> pl.DataFrame:
        form = str(self.settings.time_format)
        try:
            read = texts.str.to_datetime(form, time_unit="ns", strict=False)
        except pl.exceptions.PolarsError as error:
            raise PlantDataError(
                f"time_format {form!r} is no format of time stamps ({error})",
                [
                    "write it as strftime does, such as '%d.%m.%Y %H:%M:%S'",
                    f"name a unit: {', '.join(UNITS)}",
                    "leave it out",
                ],
                file=self.file,
            ) from error
        zoned = read.dtype == pl.Datetime("ns", "UTC")
        offset = _offsets(texts) if zoned else _no_text(len(texts))
        return pl.DataFrame({"ns": read.cast(pl.Int64), "offset": offset, "unit": _no_text(len(texts))})

    def _numbers(self, texts: pl.Series, lines: pl.Series, frame: pl.DataFrame) -> pl.DataFrame:
        left = frame["ns"].is_null() & texts.is_not_null()
        numbers = split_numbers(texts)
        names = units_of(numbers["whole"])
        if self.settings.time_format in UNITS:
            names = pl.select(
                pl.when(numbers["whole"].is_not_null()).then(pl.lit(self.settings.time_format))
            ).to_series()
        for name in names.filter(left).drop_nulls().unique(maintain_order=True):
            at = int((names == name).fill_null(False).arg_max() or 0)
            one_unit(name, self.file, int(lines[at]), texts[at])
            chosen = left & (names == name).fill_null(False)
            ns = nanoseconds(numbers, name)
            frame = frame.with_columns(
                # numbers count from 1970 in UTC; days of a spreadsheet and digits of a date are local time
                ns=pl.when(chosen).then(ns).otherwise("ns"),
                offset=pl.when(chosen & (name not in ("excel", "compact"))).then(pl.lit("Z")).otherwise("offset"),
                unit=pl.when(chosen).then(pl.lit(name)).otherwise("unit"),
            )
        return frame

    def _shaped(self, texts: pl.Series, frame: pl.DataFrame) -> pl.DataFrame:
        odd: list[str] = []
        for shape in self.shapes:
            frame = self._by_shape(texts, shape, frame)
            if not frame["ns"].null_count():
                return frame
        for _ in range(TRIED):
            # digits alone are numbers
            unread = texts.filter(frame["ns"].is_null() & ~texts.str.contains(r"^[\d.,eE+]*$") & ~texts.is_in(odd))
            if unread.is_empty():
                break
            new = shape_of(unread[0])
            if new is None or not new.has_date or new in self.shapes:
                odd.append(unread[0])
                continue
            self.shapes.append(new)
            frame = self._by_shape(texts, new, frame)
        return frame

    def _by_shape(self, texts: pl.Series, shape: Shape, frame: pl.DataFrame) -> pl.DataFrame:
        left = frame["ns"].is_null() & texts.is_not_null()
        if shape.midnight:
            left &= texts.str.contains(r"(?:^|[T ,_-])24[:.時]").fill_null(False)
        order_unknown = bool(shape.orders) and self.settings.day_first is None
        if self.orders is None and (order_unknown or not shape.has_year):
            raise SurveyNeededError
        if not left.any():
            return frame
        every = left.all()
        chosen = texts if every else texts.filter(left)
        ns, offset = self._parsed(chosen, shape)
        if not every:
            rows = pl.Series("row", left.arg_true())
            ns, offset = _spread(ns, rows, len(texts)), _spread(offset, rows, len(texts))
        return frame.with_columns(ns=pl.coalesce(frame["ns"], ns), offset=pl.coalesce(frame["offset"], offset))

    def _parsed(self, texts: pl.Series, shape: Shape) -> tuple[pl.Series, pl.Series]:
        form = shape.of_order(self._order_of(texts, shape)) if shape.orders else shape.format
        offset = _offsets(texts) if shape.zoned else _no_text(len(texts))
        for pattern, text in shape.replaced:
            texts = texts.str.replace(pattern, text)
        if not shape.has_year:
            texts, form = self._with_year(texts), f"%Y {form}"
        read = texts.str.to_datetime(form, time_unit="ns", strict=False).cast(pl.Int64)
        if shape.midnight:
            read = read + DAY
        return read.alias("ns"), offset.zip_with(read.is_not_null(), _no_text(len(texts))).alias("offset")

    def _order_of(self, texts: pl.Series, shape: Shape) -> str:
        if self.settings.day_first is not None:
            return "dmy" if self.settings.day_first else "mdy"
        parts = texts.head(1).str.extract_groups(PARTS).struct.unnest()
        return (self.orders or {}).get((parts["mark"][0], len(parts["three"][0])), "dmy")

    def _with_year(self, texts: pl.Series) -> pl.Series:
        turns, self._before = _new_years(_yearless(texts), self._before)
        years = turns.cum_sum() + self._year_turns + (self.first_year or datetime.now(UTC).year)
        self._year_turns += int(turns.sum())
        return (years.cast(pl.String) + " " + texts).alias("text")


def _offsets(texts: pl.Series) -> pl.Series:
    """The offset from UTC at the end of each stamp, as it is written."""
    first = texts.drop_nulls().head(1).str.extract(OFFSET)
    # most files have one throughout, and looking for an end is faster than for a pattern
    if len(first) and first[0] is not None and texts.str.ends_with(first[0]).all():
        return first.new_from_index(0, len(texts))
    return texts.str.extract(OFFSET)


def _nothing(rows: int) -> pl.Series:
    return pl.Series("ns", [None], dtype=pl.Int64).new_from_index(0, rows)


def _no_text(rows: int) -> pl.Series:
    return pl.Series("text", [None], dtype=pl.String).new_from_index(0, rows)


def _spread(values: pl.Series, rows: pl.Series, length: int) -> pl.Series:
    """Values at the rows that they stand in, null elsewhere."""
    empty = pl.Series(values.name, [None], dtype=values.dtype).new_from_index(0, length)
    return empty.scatter(rows, values)


def _typed(stamps: pl.Series) -> pl.DataFrame:
    zoned = isinstance(stamps.dtype, pl.Datetime) and stamps.dtype.time_zone is not None
    ns = stamps.cast(pl.Datetime("ns", "UTC" if zoned else None)).cast(pl.Int64)
    offset = pl.select(pl.when(ns.is_not_null() & zoned).then(pl.lit("Z"))).to_series()
    return pl.DataFrame({"ns": ns, "offset": offset, "unit": _no_text(len(ns))})


def _yearless(texts: pl.Series) -> pl.DataFrame:
    """(month, day) of stamps that start with them by name; null of others."""
    name = texts.alias("text").str.extract_groups(r"^(?<name>[A-Z][a-z]{2})[a-z]*\.? +(?<day>\d{1,2}) +\d{1,2}:")
    months = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
    numbers = pl.col("name").replace_strict(months, range(1, 13), default=None, return_dtype=pl.Int64)
    return name.struct.unnest().select(numbers.alias("month"), pl.col("day").cast(pl.Int64))


def _new_years(dates: pl.DataFrame, before: tuple[int, int] | None) -> tuple[pl.Series, tuple[int, int] | None]:
    """By row +1 where a year begins, -1 where a row goes back into the last one; and the last date."""
    # months of 31 days: only jumps of half a year count
    days = dates.select((pl.col("month") * 31 + pl.col("day")).alias("at"))["at"].forward_fill()
    first = None if before is None else before[0] * 31 + before[1]
    step = (days - days.shift(1, fill_value=first)).fill_null(0)
    turns = (step < -HALF_YEAR).cast(pl.Int64) - (step > HALF_YEAR).cast(pl.Int64)
    known = dates.drop_nulls()
    return turns, before if known.is_empty() else (int(known["month"][-1]), int(known["day"][-1]))
