"""The tokens of one asset on disk, memory-mapped, and where each of them comes from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from numpy.typing import NDArray

from ...system.extras import needs_extra
from ...system.files import read_json, replaced_folder, write_json
from ..dataset import PlantDataset
from ..errors import PlantDataError
from ..findings import Quality
from .provenance import LineRange, TokenPlace, line_ranges
from .sensor_patches import GridSettings, SensorGrid
from .token_segments import TABLE, Kind, Segments

with needs_extra("industry", "logs as tokens"):
    import polars as pl

FORMAT = 1
TOKENS, SEGMENTS, META = "tokens.arrow", "segments.parquet", "stream.json"
HEADS = {  # tokens at the start of a line's segment
    "template": ("gap", "origin", "template"),
    "text": (),
    "text with vocabulary": ("gap", "origin"),
}
STEP_HEAD = ("gap", "step")


class TokenStream:
    """An asset's tokens in the order of time; made by `log_tokens.token_streams`.

    Attributes:
        asset: the machine.
        meta: ``mode``, number of ``tokens`` and ``segments``, and ``counts`` of lines, of lines with an unknown or
            nearest template, and of steps.
        segments: a row a line or step: ``first`` token, ``start``, ``stop`` in nanoseconds since 1970 (the second not
            included), ``kind`` (`Kind`), ``source``, ``line`` (of a step its number), ``origin``.

    Raises:
        PlantDataError: the folder holds no stream, or a part of one.
    """

    def __init__(self, folder: Path, data: PlantDataset) -> None:
        self.folder, self.data = folder, data
        if not is_whole(folder):
            raise PlantDataError(
                "holds no tokens, or not all of them",
                ["make them again: token_streams(…)", "delete the folder, then make them again"],
                file=folder,
            )
        self.meta: dict[str, Any] = read_json(folder / META)
        self.asset: str = self.meta["asset"]

    def __len__(self) -> int:
        return int(self.meta["tokens"])

    @cached_property
    def _table(self) -> pa.Table:
        with pa.memory_map(str(self.folder / TOKENS)) as file:
            return pa.ipc.open_file(file).read_all()

    @cached_property
    def ids(self) -> NDArray[np.int32]:
        """The tokens [t]."""
        return np.asarray(self._table["id"].to_numpy(), np.int32)

    @cached_property
    def segments(self) -> pl.DataFrame:
        return pl.read_parquet(self.folder / SEGMENTS)

    @cached_property
    def _firsts(self) -> NDArray[np.int64]:
        return self.segments["first"].to_numpy()

    @cached_property
    def grid(self) -> SensorGrid:
        """The sensor grid behind the stream. Raises PlantDataError if it holds no sensors."""
        if self.meta["grid"] is None:
            raise PlantDataError("the stream holds no sensors", ["make one with grid=GridSettings(step=…)"])
        values = self.meta["grid"]
        settings = GridSettings(
            values["step"], values["reduce"], Quality(values["leave_out"]), tuple(values["channels"])
        )
        return SensorGrid(self.data, self.asset, settings)

    def place(self, token: int) -> TokenPlace:
        """Where a token comes from. Raises IndexError if there are not so many tokens."""
        if not 0 <= token < len(self):
            raise IndexError(f"token {token} of {len(self)}")
        # the last segment that starts at the token or before it
        at = int(np.searchsorted(self._firsts, token, side="right")) - 1
        row = self.segments.row(at, named=True)
        offset = token - row["first"]
        if row["kind"] == Kind.STEP:
            return self._step_place(row, offset)
        source, head = row["source"], HEADS[self.meta["head"]]
        body = "parameter" if self.meta["mode"] == "template" else "text"
        return TokenPlace(
            part=head[offset] if offset < len(head) else body,
            lines=(LineRange(source, self.data.manifest.sources[source].path, row["line"], row["line"]),),
            start=row["start"],
            stop=row["stop"],
            origin=row["origin"],
            span=self._span(token) if body == "text" and offset >= len(head) else None,
        )

    def _span(self, token: int) -> tuple[int, int]:
        return self._table["begin"][token].as_py(), self._table["end"][token].as_py()

    def _step_place(self, row: dict[str, Any], offset: int) -> TokenPlace:
        grid, step = self.grid, int(row["line"])
        names = grid.names if offset < len(STEP_HEAD) else (grid.names[offset - len(STEP_HEAD)],)
        part = STEP_HEAD[offset] if offset < len(STEP_HEAD) else "value"
        return TokenPlace(part, grid.lines(step, step, names), row["start"], row["stop"], channels=names)

    def lines(self, first: int, last: int) -> tuple[LineRange, ...]:
        """The lines that tokens ``first`` to ``last`` (included) come from, such as those of a row or a block."""
        if not 0 <= first <= last < len(self):
            raise IndexError(f"tokens {first} to {last} of {len(self)}")
        low, high = (int(np.searchsorted(self._firsts, token, side="right")) for token in (first, last))
        part = self.segments[low - 1 : high]
        rows = part.filter(pl.col("kind") == Kind.LINE.value).select("source", "line")
        steps = part.filter(pl.col("kind") == Kind.STEP.value)["line"]
        if len(steps):
            # of a step all lines: blocks of a model do not end where channels do
            rows = pl.concat([rows, self.grid.rows(steps.to_list())])
        return line_ranges(self.data.manifest, rows)

    def tokens(self, source: int | str, line: int) -> list[range]:
        """The tokens that were made from a line: one range for each record or run of sensor values it holds.

        Args:
            source: number of the file in the manifest, or its path as it stands there.
            line: from 1.

        Raises:
            PlantDataError: there is no such file.
        """
        number = self._source(source)
        mine = (pl.col("kind") == Kind.LINE.value) & (pl.col("source") == number) & (pl.col("line") == line)
        ranges = [self._range(at) for at in self._rows(mine)]
        if self.meta["grid"] is not None:
            ranges += self._value_ranges(self.grid.cells(number, line))
        return sorted(ranges, key=lambda r: r.start)

    def _value_ranges(self, cells: Iterable[tuple[int, int]]) -> list[range]:
        """Neighbouring cells of a step as one range."""
        ranges: list[range] = []
        for step, column in cells:
            at = self._rows((pl.col("kind") == Kind.STEP.value) & (pl.col("line") == step))[0]
            token = int(self._firsts[at]) + len(STEP_HEAD) + column
            if ranges and ranges[-1].stop == token:
                ranges[-1] = range(ranges[-1].start, token + 1)
            else:
                ranges.append(range(token, token + 1))
        return ranges

    def _rows(self, condition: pl.Expr) -> list[int]:
        return self.segments.select(condition.arg_true()).to_series().to_list()

    def _range(self, at: int) -> range:
        stop = int(self._firsts[at + 1]) if at + 1 < len(self._firsts) else len(self)
        return range(int(self._firsts[at]), stop)

    def _source(self, source: int | str) -> int:
        paths = [entry.path for entry in self.data.manifest.sources]
        if isinstance(source, str) and source in paths:
            return paths.index(source)
        if isinstance(source, int) and 0 <= source < len(paths):
            return source
        raise PlantDataError(f"there is no file {source!r}", [f"name one of {', '.join(paths)}"], file=self.data.folder)


def is_whole(folder: Path) -> bool:
    """Whether a folder holds all of a stream."""
    try:
        meta = read_json(folder / META)
        sizes = {name: (folder / name).stat().st_size for name in (TOKENS, SEGMENTS)}
        return bool(meta["format"] == FORMAT and meta["bytes"] == sizes)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_stream(folder: Path, batches: Iterable[Segments], meta: dict[str, Any], grid: GridSettings | None) -> None:
    """Write a stream, whole or not at all.

    Args:
        folder: where.
        batches: segments in the order of time; read once.
        meta: ``asset``, ``mode``, ``head`` (of `HEADS`) and ``counts``, which is read after the last batch.
        grid: how the sensors in it were put on a grid.
    """
    spans = meta["mode"] == "text"
    fields = [pa.field("id", pa.int32()), *([pa.field(n, pa.int32()) for n in ("begin", "end")] if spans else [])]
    tokens = segments = 0
    with replaced_folder(folder, valid=META) as new:
        with (
            pa.OSFile(str(new / TOKENS), "wb") as file,
            pa.ipc.new_file(file, pa.schema(fields)) as writer,
            parquet.ParquetWriter(new / SEGMENTS, _arrow(pl.DataFrame(schema=TABLE), 0).schema) as rows,
        ):
            for batch in batches:
                columns = [batch.ids, *(batch.spans.T if spans else ())]
                writer.write_batch(pa.record_batch([pa.array(column) for column in columns], schema=pa.schema(fields)))
                rows.write_table(_arrow(batch.table, batch.firsts + tokens))
                tokens, segments = tokens + len(batch.ids), segments + len(batch.counts)
        sizes = {name: (new / name).stat().st_size for name in (TOKENS, SEGMENTS)}
        settings = None if grid is None else {**asdict(grid), "leave_out": grid.leave_out.value}
        entry = {"format": FORMAT, "tokens": tokens, "segments": segments, "bytes": sizes, "grid": settings, **meta}
        write_json(new / META, entry)


def _arrow(table: pl.DataFrame, firsts: NDArray[np.int64] | int) -> pa.Table:
    frame = table.with_columns(pl.lit(firsts, pl.Int64) if isinstance(firsts, int) else pl.Series("first", firsts))
    frame = frame.select(pl.col(frame.columns[-1]).alias("first"), *TABLE)
    return frame.to_arrow(compat_level=pl.CompatLevel.oldest())
