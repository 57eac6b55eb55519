"""Readings of one asset, read channel by channel in bounded memory, and written back with flags."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...system.extras import needs_extra
from ...system.files import write_atomically
from ..dataset import Channel
from ..findings import Quality
from .channel_series import SECOND, ChannelSeries, Flags

with needs_extra("industry", "readings of assets"):
    import polars as pl

GROUP_ROWS = 6_000_000  # of the channels that are held at once; a larger channel is held alone
BATCH_ROWS = 1_000_000  # that are written at once
# flags that the checks set: those of an earlier run do not stay
CHECKED = Quality.AFTER_GAP | Quality.STUCK | Quality.FLAT | Quality.SATURATED | Quality.OTHER_UNIT


@dataclass(frozen=True)
class ChannelRows:
    """Rows of one channel in one file: how many, how many with a number, first and last time, flags of any of them."""

    channel: int
    source: int
    rows: int
    numbers: int
    start: int
    end: int
    quality: int


def count_rows(path: Path) -> list[ChannelRows]:
    """Rows of ``readings.parquet`` by channel and file, in order of both; none where there is no such file."""
    if not path.is_file():
        return []
    time = pl.col("time").to_physical()
    counts = (
        pl.scan_parquet(path)
        .group_by("channel", "source")
        .agg(
            pl.len().alias("rows"),
            _numbers().sum().alias("numbers"),
            time.min().alias("start"),
            time.max().alias("end"),
            pl.col("quality").bitwise_or().alias("quality"),
        )
        .sort("channel", "source")
        .collect(engine="streaming")
    )
    return [ChannelRows(*row) for row in counts.iter_rows()]


def _numbers() -> pl.Expr:
    duplicate = (pl.col("quality") & int(Quality.DUPLICATE)) > 0
    return (pl.col("value").is_finite() & ~duplicate & pl.col("time").is_not_null()).fill_null(False)


def read_channels(
    path: Path, channels: list[Channel], counts: list[ChannelRows], offsets: Mapping[int, float]
) -> Iterator[ChannelSeries]:
    """Every channel that has numbers, by number; repeated rows are left out.

    Args:
        path: ``readings.parquet``.
        counts: of `count_rows`.
        offsets: seconds that clocks are ahead, by file, where times are to be corrected.
    """
    numbers: dict[int, int] = {}
    for count in counts:
        numbers[count.channel] = numbers.get(count.channel, 0) + count.numbers
    group: list[int] = []
    for channel in [channel for channel, amount in numbers.items() if amount]:
        if group and sum(numbers[member] for member in (*group, channel)) > GROUP_ROWS:
            yield from _read_group(path, channels, group, offsets)
            group = []
        group.append(channel)
    if group:
        yield from _read_group(path, channels, group, offsets)


def _read_group(
    path: Path, channels: list[Channel], group: list[int], offsets: Mapping[int, float]
) -> Iterator[ChannelSeries]:
    frame = (
        pl.scan_parquet(path)
        .with_row_index("row")
        .filter(pl.col("channel").is_in(group) & _numbers())
        .select("row", "channel", pl.col("time").to_physical(), "value", "source", "line")
        .collect(engine="streaming")
    )
    columns = {name: frame[name].to_numpy() for name in frame.columns}
    del frame
    order = np.argsort(columns["channel"], kind="stable")
    sizes = np.bincount(columns["channel"], minlength=max(group) + 1)
    ends = np.cumsum(sizes)
    for number in group:
        mine = order[ends[number] - sizes[number] : ends[number]]
        times, sources = columns["time"][mine], columns["source"][mine]
        for source, seconds in offsets.items():
            times = times - np.where(sources == source, round(seconds * SECOND), 0)
        if len(times) > 1 and np.any(times[1:] < times[:-1]):
            by_time = np.argsort(times, kind="stable")
            mine, times, sources = mine[by_time], times[by_time], sources[by_time]
        yield ChannelSeries(
            channels[number].asset,
            channels[number].name,
            number,
            times,
            columns["value"][mine],
            columns["row"][mine].astype(np.int64),
            sources,
            columns["line"][mine],
        )


def write_flags(path: Path, flags: Flags | None, offsets: Mapping[int, float]) -> None:
    """Rewrite ``path`` (readings or events) with flags added and clocks corrected; rows stay as they stand.

    Args:
        flags: (rows,) bits of `Quality` that the checks found, in place of those of an earlier run; None leaves them.
        offsets: seconds by which the times of a file are put back; its rows get `Quality.SHIFTED_CLOCK`.
    """
    write_atomically(path, lambda temporary: _write_batches(path, temporary, flags, offsets))


def _write_batches(path: Path, temporary: Path, flags: Flags | None, offsets: Mapping[int, float]) -> None:
    with pq.ParquetFile(path) as file, pq.ParquetWriter(temporary, file.schema_arrow, compression="zstd") as writer:
        done = 0
        for batch in file.iter_batches(BATCH_ROWS):
            writer.write_batch(_flagged(batch, flags, done, offsets))
            done += batch.num_rows


def _flagged(batch: pa.RecordBatch, flags: Flags | None, done: int, offsets: Mapping[int, float]) -> pa.RecordBatch:
    quality = batch.column("quality").to_numpy(zero_copy_only=False)
    if flags is not None:
        quality = (quality & ~np.uint16(CHECKED)) | flags[done : done + batch.num_rows].astype(np.uint16)
    sources = batch.column("source").to_numpy(zero_copy_only=False)
    time = batch.column("time")
    for source, seconds in offsets.items():
        off = sources == source
        quality = quality | np.where(off, np.uint16(Quality.SHIFTED_CLOCK), np.uint16(0))
        shift = pa.array(np.where(off, round(seconds * SECOND), 0), pa.int64())
        time = pc.subtract(time.cast(pa.int64()), shift).cast(time.type)
    batch = batch.set_column(batch.schema.get_field_index("time"), batch.schema.field("time"), time)
    place = batch.schema.get_field_index("quality")
    return batch.set_column(place, batch.schema.field("quality"), pa.array(quality, pa.uint16()))
