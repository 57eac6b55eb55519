"""Where a token or a patch comes from: the lines of files, in runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from ...system.extras import needs_extra
from ..dataset import Manifest

with needs_extra("industry", "where tokens come from"):
    import polars as pl


@dataclass(frozen=True)
class LineRange:
    """Consecutive lines of a file, from 1, both included (rows of a Parquet file)."""

    source: int  # number of the file in `Manifest.sources`
    file: str
    first: int
    last: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(source, line) of every line."""
        return ((self.source, line) for line in range(self.first, self.last + 1))


@dataclass(frozen=True)
class TokenPlace:
    """What one token stands for.

    Attributes:
        part: "gap", "origin", "template", "parameter" or "text" of a line; "gap", "step" or "value" of a sensor step.
        lines: the lines of files that it was made from; of a sensor step's gap and start those of all its channels.
        start, stop: the time it covers in nanoseconds since 1970 (UTC), the second not included; of a line its time.
        origin: what wrote the line; None for sensors.
        span: first character of the line's text and the one behind the last; None where the token is not of the text.
        channels: names of the sensors; empty for a line.
    """

    part: str
    lines: tuple[LineRange, ...]
    start: int
    stop: int
    origin: str | None = None
    span: tuple[int, int] | None = None
    channels: tuple[str, ...] = ()

    @property
    def time(self) -> str:
        """When it starts: ISO 8601, UTC, to the microsecond."""
        seconds, rest = divmod(self.start, 1_000_000_000)
        return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest // 1000).isoformat()


def line_ranges(manifest: Manifest, rows: pl.DataFrame) -> tuple[LineRange, ...]:
    """The lines of ``rows`` (columns ``source``, ``line``) in runs, by source and line."""
    ordered = rows.select("source", "line").unique().sort("source", "line")
    run = ((pl.col("line").diff() != 1) | (pl.col("source").diff() != 0)).fill_null(False).cum_sum().alias("run")
    runs = ordered.with_columns(pl.col("source", "line").cast(pl.Int64)).with_columns(run)
    grouped = runs.group_by("run", maintain_order=True).agg(
        pl.col("source").first(), pl.col("line").first().alias("first"), pl.col("line").last().alias("last")
    )
    return tuple(
        LineRange(source, manifest.sources[source].path, first, last) for _, source, first, last in grouped.iter_rows()
    )
