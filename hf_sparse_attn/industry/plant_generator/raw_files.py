"""Raw files as they grow: lines are counted as they are written, and Parquet gets groups of one size."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ...system.extras import needs_extra
from ..dataset import Source
from .fault_plan import RawFile

with needs_extra("industry", "generated plants"):
    import polars as pl

GROUP = 1 << 17  # rows of a Parquet row group, whatever comes at a time
KEPT = 0.4  # of a line that is cut off


class TextFile:
    """A text file of lines, or a CSV file with ``header``; used in ``with``."""

    def __init__(self, folder: Path, file: RawFile, asset: str, header: list[str] | None = None) -> None:
        self.file, self.asset, self.lines = file, asset, 0
        self._path = folder / file.path
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = self._path.open("wb")
        if header is not None:
            self._handle.write((",".join(header) + "\n").encode())
            self.lines = 1

    def numbers(self, count: int) -> npt.NDArray[np.int64]:
        """Line numbers, from 1, of the ``count`` rows that come next."""
        return np.arange(self.lines + 1, self.lines + count + 1)

    def append(self, frame: pl.DataFrame, cut: Collection[int] = ()) -> None:
        """Write rows, a line each; of those at ``cut`` only the first part."""
        done = 0
        for row in sorted(cut):
            self._write(frame[done:row])
            line = frame[row : row + 1].write_csv(include_header=False).rstrip("\n")
            self._handle.write(f"{line[: int(KEPT * len(line))]}\n".encode())
            done = row + 1
        self._write(frame[done:])
        self.lines += len(frame)

    def _write(self, frame: pl.DataFrame) -> None:
        # a row that is one text is the line itself
        style: Any = "never" if frame.width == 1 else "necessary"
        frame.write_csv(self._handle, include_header=False, quote_style=style)

    def close(self) -> None:
        self._handle.close()

    def source(self, clock_offset: float = 0.0) -> Source:
        """What is written, after it is closed."""
        with self._path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        size = self._path.stat().st_size
        return Source(self.file.path, self.file.form, digest, size, self.lines, self.asset, clock_offset)


class ParquetFile(TextFile):
    """A Parquet file with the schema of the first rows; its lines are its rows."""

    def __init__(self, folder: Path, file: RawFile, asset: str) -> None:
        super().__init__(folder, file, asset)
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pl.DataFrame] = []

    def append(self, frame: pl.DataFrame, cut: Collection[int] = ()) -> None:
        """Write rows, as soon as they fill a group. Raises ValueError for ``cut``: Parquet has no cut lines."""
        if cut:
            raise ValueError("rows of a Parquet file cannot be cut off")
        self.lines += len(frame)
        self._waiting.append(frame)
        while sum(map(len, self._waiting)) >= GROUP:
            rows = pl.concat(self._waiting)
            self._group(rows[:GROUP])
            self._waiting = [rows[GROUP:]]

    def _group(self, rows: pl.DataFrame) -> None:
        table = pa.Table.from_batches([_one_batch(rows.to_arrow())])
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._handle, table.schema)
        self._writer.write_table(table, row_group_size=GROUP)

    def close(self) -> None:
        # nothing waits after a whole group, or where writing failed
        if any(map(len, self._waiting)):
            self._group(pl.concat(self._waiting))
        if self._writer is not None:
            self._writer.close()
        super().close()


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    # where the batches of a table end moves the pages of the file
    return table.combine_chunks().to_batches()[0]
