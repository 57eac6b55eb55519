"""The timeline of a plain CSV file with labelled windows, as the Numenta Anomaly Benchmark has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...system.extras import needs_extra
from ...system.files import read_json
from ..errors import PlantDataError
from .time_texts import fault_intervals, nanoseconds
from .timeline import NO_STATE, Array, Timeline, merged_intervals, split_steps

with needs_extra("industry", "data of plants"):
    import polars as pl


def timeline_from_csv(
    path: str | Path,
    windows: str | Path | Sequence[tuple[str, str]],
    *,
    time_column: str = "timestamp",
    train_share: float = 0.6,
    purge_seconds: float = 0.0,
) -> Timeline:
    """The timeline of a CSV file with a column of times (ISO 8601, UTC without a zone) and columns of numbers.

    The step is the median distance of two rows; rows that share a step are averaged. ``windows``: faults as (start,
    end), both included, or a JSON file of the Numenta Anomaly Benchmark, which has them by file name.

    Raises:
        PlantDataError: a time or number cannot be read, the column or the file's windows are missing.
    """
    path = Path(path)
    frame = _read_csv(path, time_column)
    times = frame["time"].to_numpy()
    step = _typical_step(times, path)
    begin, at = int(times.min()), (times - times.min()) // step
    steps = int(at.max()) + 1
    names = [name for name in frame.columns if name != "time"]
    shared = len(at) - len(np.unique(at))
    train, test = split_steps(steps, train_share, round(purge_seconds * 1e9 / step))
    return Timeline(
        asset=path.stem,
        times=begin + step * np.arange(steps, dtype=np.int64),
        values=np.stack([_step_means(frame[name].to_numpy(), at, steps) for name in names], 1),
        channels=tuple(names),
        counts=np.zeros((steps, 0), np.int32),
        templates=(),
        # the last row of a window belongs to it
        faults=merged_intervals(fault_intervals(_spans(windows, path), path) + np.array([0, step])),
        states=np.zeros(steps, np.int32),
        state_names=(NO_STATE,),
        train_steps=train,
        test_from=test,
        notes=(f"{shared} rows share a step with another; their mean stands",) if shared else (),
    )


def _typical_step(times: Array, path: Path) -> int:
    distances = np.diff(np.unique(times))
    if not len(distances):
        raise PlantDataError(
            "holds fewer than two different times", ["give a longer record", "check the column of times"], file=path
        )
    return int(np.median(distances))


def _spans(windows: str | Path | Sequence[tuple[str, str]], path: Path) -> list[tuple[str, str]]:
    """Start and end of every window of the file at ``path``."""
    if not isinstance(windows, str | Path):
        return list(windows)
    by_file = read_json(windows)
    if path.name not in by_file:
        raise PlantDataError(
            f"has no windows of {path.name}",
            [f"name one of {', '.join(by_file)}", "give a list of windows"],
            file=windows,
        )
    return [(start, end) for start, end in by_file[path.name]]


def _read_csv(path: Path, time_column: str) -> pl.DataFrame:
    """Columns of float64 and ``time`` in ns; an empty field is NaN."""
    try:
        frame = pl.read_csv(path, infer_schema=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise PlantDataError(
            f"is no CSV file that can be read ({error})",
            ["check the path", "save it as CSV with a header and commas", "use hf-sparse-attn prep"],
            file=path,
        ) from error
    if time_column not in frame.columns or len(frame.columns) < 2:
        raise PlantDataError(
            f"has the columns {', '.join(frame.columns)}",
            ["name the one with the times: time_column=…", "add a column of numbers", "use hf-sparse-attn prep"],
            file=path,
            column=time_column,
        )
    columns: dict[str, Any] = {
        "time": [nanoseconds(text, path, line, time_column) for line, text in enumerate(frame[time_column], 2)]
    }
    for name in frame.columns:
        if name != time_column:
            columns[name] = _numbers(frame[name].str.strip_chars(), path)
    return pl.DataFrame(columns)


def _numbers(texts: pl.Series, path: Path) -> pl.Series:
    """Float64 of a column, null where its field is empty."""
    numbers = texts.replace("", None).cast(pl.Float64, strict=False)
    bad = (numbers.is_null() & (texts.fill_null("") != "")) | numbers.is_infinite().fill_null(False)
    if bad.any():
        row = int(bad.arg_true()[0])
        raise PlantDataError(
            f"{texts[row]!r} is no number",
            ["correct or empty the field", "remove the column", "use hf-sparse-attn prep, which reports such rows"],
            file=path,
            line=row + 2,  # the header is line 1
            column=texts.name,
        )
    return numbers


def _step_means(numbers: Array, at: Array, steps: int) -> Array:
    seen = ~np.isnan(numbers)
    count = np.bincount(at[seen], minlength=steps)
    total = np.bincount(at[seen], numbers[seen], minlength=steps)
    means: Array = np.divide(total, count, out=np.full(steps, np.nan), where=count > 0)
    return means
