"""Rows that repeat an earlier one of their file, and rows of one channel that share a time stamp."""

from __future__ import annotations

from pathlib import Path

from ...system.extras import needs_extra
from ..findings import Quality

with needs_extra("industry", "data of plants"):
    import polars as pl

FLAGS = pl.Schema({"row": pl.UInt32(), "flag": pl.UInt16(), "line": pl.UInt64(), "time": pl.Int64()})


def repeated_readings(path: Path, known: pl.DataFrame, *, wide: bool) -> pl.DataFrame:
    """Rows of a file of readings that are flagged, schema `FLAGS`; ``row`` counts from 0.

    Args:
        path: Arrow of schema READINGS, in the order of the file.
        known: (channel, time in ns) of rows that are not later than all before them: only these can repeat one. Of a
            wide table its rows, all of whose channels are compared.
        wide: whether rows of one line belong together.
    """
    on = ["time"] if wide else ["channel", "time"]
    wanted = known.select(on).unique().lazy()
    rows = pl.scan_ipc(path).with_row_index("row").with_columns(pl.col("time").cast(pl.Int64))
    near = rows.join(wanted, on=on, how="semi").sort("row").collect(engine="streaming")
    if near.is_empty():
        return pl.DataFrame(schema=FLAGS)
    value = pl.struct("value")
    near = near.with_columns(same=value.hash())
    if wide:
        lines = near.group_by("line", maintain_order=True).agg(
            pl.col("time").first(), pl.struct("channel", "same").hash().sum().alias("content")
        )
        again = lines.filter(~pl.struct("time", "content").is_first_distinct())["line"]
        duplicate = pl.col("line").is_in(again.implode())
    else:
        duplicate = ~pl.struct("channel", "time", "same").is_first_distinct()
    near = near.with_columns(duplicate=duplicate)
    several = pl.col("same").n_unique().over("channel", "time") > 1
    flag = pl.when("duplicate").then(Quality.DUPLICATE.value).when(several).then(Quality.EQUAL_STAMP.value)
    flagged = near.with_columns(flag=flag.cast(pl.UInt16)).filter(pl.col("flag").is_not_null())
    return flagged.select(FLAGS.names()).cast(FLAGS)


def repeated_events(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows that are flagged, schema `FLAGS`, of (row, line, time, hash of all fields) of all events of a file."""
    again = rows.filter(pl.col("hash").is_duplicated()).filter(~pl.col("hash").is_first_distinct())
    return again.with_columns(flag=pl.lit(Quality.DUPLICATE.value)).select(FLAGS.names()).cast(FLAGS)
