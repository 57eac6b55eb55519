"""Timelines from a prepared folder, and from a plain CSV file with labelled windows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...system.extras import needs_extra
from ...system.files import read_json
from ..dataset import PlantDataset
from ..errors import PlantDataError
from ..findings import Quality
from .timeline import Array, Timeline, merged_intervals, split_steps

with needs_extra("industry", "data of plants"):
    import polars as pl

OTHER = "(other)"  # kinds of events beyond the most frequent
NO_STATE = "(none)"  # steps that no operating state covers
# a hexadecimal number, a word of hexadecimal digits with at least one digit, digits within a word
NUMBER = r"\b0[xX][0-9a-fA-F]+\b|\b[0-9a-fA-F]*[0-9][0-9a-fA-F]*\b|[0-9]+"
ZONED = re.compile(r"(.*\d:?\d\d(?:\.\d+)?)\s*(?:Z|([+-])(\d\d):?(\d\d))")


def mask_numbers(text: str) -> str:
    """The text with ``<*>`` in place of numbers, addresses and hexadecimal ids."""
    return re.sub(NUMBER, "<*>", text)


def timeline_from_dataset(
    data: PlantDataset,
    asset: str,
    *,
    step_seconds: float = 60.0,
    faults: Sequence[tuple[str, str]] | None = None,
    train_share: float = 0.6,
    purge_seconds: float = 0.0,
    most_kinds: int = 256,
) -> Timeline:
    """The timeline of one asset of a prepared folder.

    Values are means of a step. Rows that are duplicates count once. An event's kind is its template where the data
    names one, else its text with numbers masked. ``faults``: start and end (ISO 8601, UTC without a zone), the end
    excluded; None takes the steps of labelled events, where the label is neither null nor "-".
    ``train_share`` and ``purge_seconds`` hold where the folder names no split.

    Raises:
        PlantDataError: the asset is unknown, has no rows, or its split leaves nothing.
    """
    step = round(step_seconds * 1e9)
    readings = data.readings(asset, in_order=False).filter((pl.col("quality") & int(Quality.DUPLICATE)) == 0)
    events = data.events(asset, in_order=False).filter((pl.col("quality") & int(Quality.DUPLICATE)) == 0)
    begin, steps = _grid(data, asset, [readings, events], step)
    at = ((pl.col("time").dt.epoch("ns") - begin) // step).alias("step")
    channels = [c.name if c.asset == asset else None for c in data.manifest.channels]
    numbers = [n for n, name in enumerate(channels) if name is not None]
    values = np.full((steps, len(numbers)), np.nan)
    means = readings.drop_nulls("value").group_by(at, "channel").agg(pl.col("value").mean()).collect()
    place = {number: n for n, number in enumerate(numbers)}
    columns = np.array([place[number] for number in means["channel"].to_list()], np.int64)
    values[means["step"].to_numpy(), columns] = means["value"].to_numpy()
    counts, templates, notes = _count_events(events.with_columns(at), steps, most_kinds)
    states, names = _states(data.states(asset).collect(), begin, step, steps)
    if faults is None:
        labelled = events.filter(pl.col("label").is_not_null() & (pl.col("label") != "-")).select(at).collect()["step"]
        starts = begin + np.unique(labelled.to_numpy()).astype(np.int64) * step
        intervals = merged_intervals(np.stack([starts, starts + step], 1))
    else:
        intervals = _intervals(faults, None)
    train, test = _split(data, begin, step, steps, train_share, purge_seconds)
    return Timeline(
        asset=asset,
        times=begin + step * np.arange(steps, dtype=np.int64),
        values=values,
        channels=tuple(str(channels[n]) for n in numbers),
        counts=counts,
        templates=templates,
        faults=intervals,
        states=states,
        state_names=names,
        train_steps=train,
        test_from=test,
        notes=notes,
    )


def _grid(data: PlantDataset, asset: str, frames: list[pl.LazyFrame], step: int) -> tuple[int, int]:
    """(Start of the first step in ns, number of steps) that cover every row of ``frames``."""
    ends = [
        f.select(first=pl.col("time").min().dt.epoch("ns"), last=pl.col("time").max().dt.epoch("ns")) for f in frames
    ]
    rows = [row for row in pl.concat(ends).collect().rows() if row[0] is not None]
    if not rows:
        raise PlantDataError(
            f"asset {asset!r} has neither readings nor events",
            [
                "name another asset",
                "prepare its files: hf-sparse-attn prep",
                "read health.html: it says what was refused",
            ],
            file=data.folder,
        )
    begin = min(row[0] for row in rows) // step * step
    steps = int((max(row[1] for row in rows) - begin) // step + 1)
    if steps > 20_000_000:
        raise PlantDataError(
            f"asset {asset!r} spans {steps} steps of {step / 1e9:g} s",
            ["take longer steps", "cut the record", "look for a wrong time stamp in health.html"],
            file=data.folder,
        )
    return begin, steps


def _count_events(events: pl.LazyFrame, steps: int, most: int) -> tuple[Array, tuple[str, ...], tuple[str, ...]]:
    """(Counts int32 [T, K], names of the kinds, notes)."""
    masked = pl.coalesce(pl.col("template"), pl.col("text").str.replace_all(NUMBER, "<*>"))
    level = pl.col("level").fill_null("")
    kind = pl.when(level == "").then(masked).otherwise(level + " " + masked).alias("kind")
    table = events.group_by("step", kind).len().collect()
    totals = table.group_by("kind").agg(pl.col("len").sum()).sort(["len", "kind"], descending=[True, False])
    kept = totals["kind"].to_list()[:most]
    notes: tuple[str, ...] = ()
    names = [*kept, OTHER] if len(totals) > most else kept
    if len(totals) > most:
        notes = (f"{len(totals) - most} of {len(totals)} kinds of events are counted together as {OTHER}",)
    place = {name: n for n, name in enumerate(kept)}
    counts = np.zeros((steps, len(names)), np.int32)
    columns = [place.get(name, len(kept)) for name in table["kind"].to_list()]
    np.add.at(counts, (table["step"].to_numpy(), np.array(columns, np.int64)), table["len"].to_numpy().astype(np.int32))
    return counts, tuple(names), notes


def _states(table: pl.DataFrame, begin: int, step: int, steps: int) -> tuple[Array, tuple[str, ...]]:
    names = (NO_STATE, *sorted(set(table["state"].to_list())))
    states = np.zeros(steps, np.int32)
    rows = zip(*(table[name].dt.epoch("ns") for name in ("start", "end")), table["state"], strict=True)
    for start, end, name in rows:
        # a step belongs to the state of its start
        first, last = (-((begin - ns) // step) for ns in (start, end))
        states[max(first, 0) : max(last, 0)] = names.index(name)
    return states, names


def _split(
    data: PlantDataset, begin: int, step: int, steps: int, share: float, purge_seconds: float
) -> tuple[int, int]:
    if (split := data.manifest.split) is None:
        return split_steps(steps, share, round(purge_seconds * 1e9 / step))
    train, test = (int((_nanoseconds(text) - begin) // step) for text in (split.train_end, split.test_start))
    if not 0 < train <= test < steps:
        raise PlantDataError(
            f"its split ({split.train_end}, {split.test_start}) leaves steps [0, {train}) and [{test}, {steps})",
            ["prepare the data again with another split", "name an asset that covers both parts"],
            file=data.folder / "dataset.json",
        )
    return train, test


def timeline_from_csv(
    path: str | Path,
    windows: str | Path | Sequence[tuple[str, str]],
    *,
    time_column: str = "timestamp",
    train_share: float = 0.6,
    purge_seconds: float = 0.0,
    asset: str | None = None,
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
    distances = np.diff(np.unique(times))
    if not len(distances):
        raise PlantDataError("holds fewer than two different times", ["give a longer record"], file=path)
    step = int(np.median(distances))
    begin, at = int(times.min()), (times - times.min()) // step
    steps = int(at.max()) + 1
    names = [name for name in frame.columns if name != "time"]
    values = np.stack([_step_means(frame[name].to_numpy(), at, steps) for name in names], 1)
    shared = len(at) - len(np.unique(at))
    if not isinstance(windows, str | Path):
        spans = list(windows)
    elif path.name in (by_file := read_json(windows)):
        spans = [(start, end) for start, end in by_file[path.name]]
    else:
        raise PlantDataError(
            f"has no windows of {path.name}",
            [f"name one of {', '.join(by_file)}", "give a list of windows"],
            file=windows,
        )
    train, test = split_steps(steps, train_share, round(purge_seconds * 1e9 / step))
    return Timeline(
        asset=asset or path.stem,
        times=begin + step * np.arange(steps, dtype=np.int64),
        values=values,
        channels=tuple(names),
        counts=np.zeros((steps, 0), np.int32),
        templates=(),
        # the last row of a window belongs to it
        faults=merged_intervals(_intervals(spans, path) + np.array([0, step])),
        states=np.zeros(steps, np.int32),
        state_names=(NO_STATE,),
        train_steps=train,
        test_from=test,
        notes=(f"{shared} rows share a step with another; their mean stands",) if shared else (),
    )


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
        "time": [_nanoseconds(t, path, n, time_column) for n, t in enumerate(frame[time_column], 2)]
    }
    for name in frame.columns:
        if name != time_column:
            columns[name] = frame[name].str.strip_chars().replace("", None).cast(pl.Float64, strict=False)
            bad = (columns[name].is_null() & (frame[name].str.strip_chars().fill_null("") != "")) | columns[
                name
            ].is_infinite().fill_null(False)
            if bad.any():
                row = int(bad.arg_true()[0])
                raise PlantDataError(
                    f"{frame[name][row]!r} is no number",
                    [
                        "correct or empty the field",
                        "remove the column",
                        "use hf-sparse-attn prep, which reports such rows",
                    ],
                    file=path,
                    line=row + 2,
                    column=name,
                )
    return pl.DataFrame(columns)


def _step_means(numbers: Array, at: Array, steps: int) -> Array:
    seen = ~np.isnan(numbers)
    count = np.bincount(at[seen], minlength=steps)
    total = np.bincount(at[seen], numbers[seen], minlength=steps)
    means: Array = np.divide(total, count, out=np.full(steps, np.nan), where=count > 0)
    return means


def _nanoseconds(text: str | None, file: Path | None = None, line: int | None = None, column: str | None = None) -> int:
    """ns since 1970 of an ISO 8601 text, UTC if it names no zone."""
    zoned = ZONED.fullmatch((text or "").strip())
    sign, hours, minutes = zoned.group(2, 3, 4) if zoned else (None, None, None)
    try:
        moment = np.datetime64(zoned.group(1) if zoned else (text or "").strip(), "ns")
    except ValueError as error:
        raise PlantDataError(
            f"{text!r} is no time in ISO 8601",
            ["write it as 2024-03-01T12:00:00Z", "drop the line", "use hf-sparse-attn prep, which reads other forms"],
            file=file,
            line=line,
            column=column,
        ) from error
    if np.isnat(moment):
        raise PlantDataError("a time is missing", ["fill it in", "drop the line"], file=file, line=line, column=column)
    offset = (int(hours or 0) * 60 + int(minutes or 0)) * (-1 if sign == "-" else 1)
    return int(moment.astype(np.int64)) - offset * 60 * 10**9


def _intervals(spans: Sequence[tuple[str, str]], file: Path | None) -> Array:
    pairs = [[_nanoseconds(start, file), _nanoseconds(end, file)] for start, end in spans]
    for (start, end), span in zip(pairs, spans, strict=True):
        if end < start:
            raise PlantDataError(f"a fault ends before it starts: {span}", ["swap them", "drop it"], file=file)
    return merged_intervals(np.array(pairs, np.int64).reshape(-1, 2))
