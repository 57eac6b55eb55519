"""Parquet files as columns with the number of each row, some rows at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pyarrow.parquet as pq

from ...data.formats import stamp
from ...system.extras import needs_extra
from ..errors import PlantDataError
from .csv_fields import BadLine

with needs_extra("industry", "data of plants"):
    import polars as pl

ROWS = 200_000  # of a chunk
SAMPLE = 500  # rows that tell what columns hold


def parquet_names(path: str) -> tuple[list[str], list[list[str]]]:
    """(names, sample of each column as text). Raises PlantDataError if the file is no whole Parquet."""
    try:
        with pq.ParquetFile(path) as opened:
            names: list[str] = opened.schema_arrow.names
            batch = next(opened.iter_batches(SAMPLE, use_threads=False), None)
    except (OSError, ValueError) as error:
        raise PlantDataError(
            f"is no whole Parquet file ({error})",
            ["copy it anew: it may be cut off", "export it again", "leave it out"],
            file=path,
        ) from error
    if batch is None:
        raise PlantDataError(
            "holds no rows", ["leave it out", "export it again", "check what filtered its rows"], file=path
        )
    frame = pl.from_arrow(batch)
    assert isinstance(frame, pl.DataFrame)
    return names, [[str(value) for value in column.drop_nulls()] for column in frame.iter_columns()]


def parquet_rows(path: str, used: list[int]) -> Iterator[tuple[pl.DataFrame, list[BadLine]]]:
    """(columns ``0``, ``1`` … as they are typed, and ``line``: the row from 1) of the columns that are used."""
    before, row = stamp(os.stat(path)), 1
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as opened:
        names = opened.schema_arrow.names
        for batch in opened.iter_batches(ROWS, columns=[names[at] for at in used], use_threads=False):
            if stamp(os.stat(path)) != before:
                raise PlantDataError(
                    "changed while it was read",
                    ["wait until it is written", "name a copy of it", "stop what writes it"],
                    file=path,
                )
            frame = pl.from_arrow(batch)
            assert isinstance(frame, pl.DataFrame)
            frame = frame.select(pl.col(names[at]).alias(str(at)) for at in used)
            texts = [pl.col(name).cast(pl.String) for name, kind in frame.schema.items() if kind == pl.Categorical]
            yield (
                frame.with_columns(*texts, line=pl.int_range(row, row + frame.height, dtype=pl.UInt64, eager=True)),
                [],
            )
            row += frame.height
