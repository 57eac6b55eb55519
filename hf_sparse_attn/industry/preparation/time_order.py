"""Rows against the rows above them, chunk by chunk: what runs backwards, and what may repeat an earlier row."""

from __future__ import annotations

from dataclasses import dataclass

from ...system.extras import needs_extra

with needs_extra("industry", "data of plants"):
    import polars as pl

FAR = 3  # steps
KEPT = 10_000  # jumps whose place is kept; all are counted


@dataclass(frozen=True)
class Jump:
    """A row whose time is before that of the row above it in its stream."""

    line: int
    before: int  # ns since 1970
    time: int
    usual: int  # ns: the median step of the stream


@dataclass(frozen=True)
class Leap:
    """A row far behind the one above it in its stream."""

    line: int
    before: int
    time: int


class TimeOrder:
    """Compares each row with those above it in its stream (a channel of a long table; else the file)."""

    def __init__(self) -> None:
        self.jumps: list[Jump] = []
        self.leaps: list[Leap] = []
        self.backward = 0
        self.usual: int | None = None  # ns, median step of all streams, of the first chunk that has any
        self._last: pl.DataFrame | None = None

    def add(self, time: pl.Series, stream: pl.Series, lines: pl.Series) -> pl.DataFrame:
        """Columns ``backward`` and ``known`` (not later than all rows above it, so that it may repeat one of them)."""
        rows = pl.DataFrame({"key": stream, "time": time.cast(pl.Int64), "line": lines}).with_columns(new=pl.lit(True))
        if self._last is not None:
            rows = pl.concat([self._last.with_columns(pl.col("key").cast(rows.schema["key"])), rows])
        marked = rows.with_columns(
            above=pl.col("time").shift(1).over("key"), highest=pl.col("time").cum_max().shift(1).over("key")
        )
        marked = marked.with_columns(
            backward=(pl.col("time") < pl.col("above")).fill_null(False),
            known=(pl.col("time") <= pl.col("highest")).fill_null(False),
        ).filter("new")
        self._keep_jumps(marked)
        # the highest time stands before the last one, so that both are known to the next chunk
        last = rows.group_by("key", maintain_order=True).agg(
            pl.col("time").max().alias("m"), pl.col("time", "line").last()
        )
        highest = last.select("key", pl.col("m").alias("time"), "line")
        self._last = pl.concat([highest, last.select("key", "time", "line")]).with_columns(new=pl.lit(False))
        return marked.select("backward", "known")

    def returns(self, jump: Jump) -> bool:
        """Whether the rows behind a jump end in a leap over it: a block came late, no clock was set."""
        return any(leap.line > jump.line and leap.before <= jump.before < leap.time for leap in self.leaps)

    def _keep_jumps(self, marked: pl.DataFrame) -> None:
        steps = marked.select((pl.col("time") - pl.col("above")).alias("step")).filter(pl.col("step") > 0)
        if steps.height and self.usual is None:
            self.usual = int(steps["step"].median())  # type: ignore[arg-type]
        if self.jumps or marked["backward"].any():
            far = marked.filter(pl.col("time") - pl.col("above") > FAR * (self.usual or 0))
            rows = far.select("line", "above", "time").head(KEPT - len(self.leaps))
            self.leaps += [Leap(*row) for row in rows.iter_rows()]
        backward = marked.filter("backward")
        self.backward += backward.height
        for line, above, time in backward.select("line", "above", "time").head(KEPT - len(self.jumps)).iter_rows():
            self.jumps.append(Jump(line, above, time, self.usual or 0))
