"""Local times -> UTC: the hour that occurs twice in autumn, the one that is left out in spring, and changed zones.

An hour that occurs twice is read in the order of the file: where its rows jump back, the second one begins.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Literal
from zoneinfo import ZoneInfo, available_timezones

from ...system.extras import needs_extra

with needs_extra("industry", "data of plants"):
    import polars as pl

HOUR = 3600 * 10**9  # nanoseconds
MINUTE = 60 * 10**9


class LocalTimes:
    """Turns local times of one file into UTC, chunk by chunk.

    Args:
        zone: IANA name.
    """

    def __init__(self, zone: str) -> None:
        self.zone = zone
        self._last: pl.DataFrame | None = None  # last row of each stream

    def utc(self, local: pl.Series, stream: pl.Series) -> pl.DataFrame:
        """Columns ``utc`` (ns; null where the local time does not exist), ``ambiguous`` and ``second`` (reading).

        Args:
            local: nanoseconds of local time since 1970, in the order of the file.
            stream: what each row belongs to; the order of rows counts within it.
        """
        early, late = (self._reading(local, which) for which in ("earliest", "latest"))
        frame = pl.DataFrame({"local": local, "key": stream, "ambiguous": (early != late).fill_null(False)})
        if self.zone == "UTC" or frame.is_empty():
            second = frame["ambiguous"]
        else:
            second = self._second(frame.with_row_index("row"))
        return pl.DataFrame({"utc": late.zip_with(second, early), "ambiguous": frame["ambiguous"], "second": second})

    def _reading(self, local: pl.Series, which: Literal["earliest", "latest"]) -> pl.Series:
        if self.zone == "UTC":
            return local
        naive = local.cast(pl.Datetime("ns"))
        return naive.dt.replace_time_zone(self.zone, ambiguous=which, non_existent="null").cast(pl.Int64)

    def _second(self, frame: pl.DataFrame) -> pl.Series:
        """Whether a row stands behind the jump back within an hour that occurs twice."""
        rows = frame.filter(pl.col("local").is_not_null()).with_columns(second=pl.lit(False))
        if self._last is not None:
            before = self._last.with_columns(pl.col("key").cast(rows.schema["key"])).select(rows.columns)
            rows = pl.concat([before, rows])
        if rows["ambiguous"].any():
            rows = rows.with_columns(second=_behind_jump(rows))
        self._last = (
            rows.group_by("key")
            .agg(pl.col("local", "ambiguous", "second").last())
            .with_columns(row=pl.lit(None, dtype=pl.UInt32))
        )
        known = rows.filter(pl.col("row").is_not_null()).select("row", "second")
        return frame.select("row").join(known, on="row", how="left", maintain_order="left")["second"].fill_null(False)


def _behind_jump(rows: pl.DataFrame) -> pl.Series:
    steps = rows.with_columns(step=pl.col("local").diff().over("key"))
    steps = steps.with_columns(usual=pl.col("step").filter(pl.col("step") > 0).median().over("key").fill_null(0))
    step, usual = pl.col("step"), pl.col("usual")
    # rows an hour apart do not jump back, they repeat their time
    repeats = (step <= 0) & (step + HOUR <= 1.5 * usual)
    jumps = (step <= -pl.max_horizontal(pl.lit(MINUTE), 3 * usual)) | repeats
    # what an earlier chunk found holds for as long as the hour lasts
    jumped = pl.col("ambiguous") & (jumps.fill_null(False) | pl.col("second"))
    stretch = (~pl.col("ambiguous")).cast(pl.Int32).cum_sum().over("key")
    marked = steps.with_columns(jumped=jumped, stretch=stretch)
    # a row that opens a stretch comes from the hour before it: no jump within the hour
    first = pl.col("ambiguous") & ~pl.col("ambiguous").shift(1).over("key").fill_null(False)
    marked = marked.with_columns(jumped=pl.col("jumped") & (~first | pl.col("second")))
    return marked.select((pl.col("jumped").cum_max().over("key", "stretch") & pl.col("ambiguous")).alias("second"))[
        "second"
    ]


@cache
def _zones() -> tuple[str, ...]:
    return tuple(sorted(name for name in available_timezones() if "/" in name and not name.startswith("Etc/")))


def _moment(ns: int) -> datetime:
    return datetime.fromtimestamp(ns // 10**9, UTC)


def summer_time_zones(before: int, offset: timedelta, after: int, new: timedelta) -> list[str]:
    """Zones whose clocks had ``offset`` from UTC at ``before`` and ``new`` at ``after`` (ns since 1970, UTC)."""
    one, two = _moment(before), _moment(after)
    zones = (ZoneInfo(name) for name in _zones())
    return [z.key for z in zones if one.astimezone(z).utcoffset() == offset and two.astimezone(z).utcoffset() == new]


def folding_zones(local: int) -> list[str]:
    """Zones in which that local time (ns since 1970) occurs twice."""
    naive = _moment(local).replace(tzinfo=None)
    zones = (ZoneInfo(name) for name in _zones())
    return [
        z.key
        for z in zones
        if naive.replace(tzinfo=z, fold=0).utcoffset() != naive.replace(tzinfo=z, fold=1).utcoffset()
        and naive.replace(tzinfo=z, fold=0).utcoffset() > naive.replace(tzinfo=z, fold=1).utcoffset()  # type: ignore[operator]
    ]
