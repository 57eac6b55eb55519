"""The timeline of one asset of a prepared folder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...system.extras import needs_extra
from ..dataset import PlantDataset
from ..errors import PlantDataError
from ..findings import Quality
from .time_texts import fault_intervals, nanoseconds
from .timeline import NO_STATE, Array, Timeline, merged_intervals, split_steps

with needs_extra("industry", "data of plants"):
    import polars as pl

OTHER = "(other)"  # kinds of events beyond the most frequent
MOST_KINDS = 256
MOST_STEPS = 20_000_000
# a hexadecimal number, a word of hexadecimal digits with at least one digit, digits within a word
NUMBER = r"\b0[xX][0-9a-fA-F]+\b|\b[0-9a-fA-F]*[0-9][0-9a-fA-F]*\b|[0-9]+"


def timeline_from_dataset(
    data: PlantDataset,
    asset: str,
    *,
    step_seconds: float = 60.0,
    faults: Sequence[tuple[str, str]] | None = None,
) -> Timeline:
    """The timeline of one asset of a prepared folder.

    Values are means of a step. Rows that are duplicates count once. An event's kind is its template where the data
    names one, else its text with numbers masked. ``faults``: start and end (ISO 8601, UTC without a zone), the end
    excluded; None takes the steps of labelled events (label neither null nor "-"). Where the folder names no
    split, 60 % of the steps are for training.

    Raises:
        PlantDataError: the asset is unknown, has no rows, or its split leaves nothing.
    """
    step = round(step_seconds * 1e9)
    readings = data.readings(asset, in_order=False).filter((pl.col("quality") & int(Quality.DUPLICATE)) == 0)
    events = data.events(asset, in_order=False).filter((pl.col("quality") & int(Quality.DUPLICATE)) == 0)
    begin, steps = _grid(data, asset, [readings, events], step)
    at = ((pl.col("time").dt.epoch("ns") - begin) // step).alias("step")
    numbers = [n for n, channel in enumerate(data.manifest.channels) if channel.asset == asset]
    counts, templates, notes = _count_events(events.with_columns(at), steps)
    states, names = _states(data.states(asset).collect(), begin, step, steps)
    train, test = _split(data, begin, step, steps)
    return Timeline(
        asset=asset,
        times=begin + step * np.arange(steps, dtype=np.int64),
        values=_mean_values(readings.with_columns(at), numbers, steps),
        channels=tuple(data.manifest.channels[n].name for n in numbers),
        counts=counts,
        templates=templates,
        faults=_labelled(events.with_columns(at), begin, step) if faults is None else fault_intervals(faults, None),
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
    if steps > MOST_STEPS:
        raise PlantDataError(
            f"asset {asset!r} spans {steps} steps of {step / 1e9:g} s",
            ["take longer steps", "cut the record", "look for a wrong time stamp in health.html"],
            file=data.folder,
        )
    return begin, steps


def _mean_values(readings: pl.LazyFrame, numbers: list[int], steps: int) -> Array:
    """Mean of every step, float64 [T, C] for the channels with ``numbers``, NaN where none was read."""
    values = np.full((steps, len(numbers)), np.nan)
    means = readings.drop_nulls("value").group_by("step", "channel").agg(pl.col("value").mean()).collect()
    place = {number: n for n, number in enumerate(numbers)}
    columns = np.array([place[number] for number in means["channel"].to_list()], np.int64)
    values[means["step"].to_numpy(), columns] = means["value"].to_numpy()
    return values


def _labelled(events: pl.LazyFrame, begin: int, step: int) -> Array:
    """The steps with a labelled event as intervals in ns, int64 [F, 2]."""
    labelled = events.filter(pl.col("label").is_not_null() & (pl.col("label") != "-")).select("step").collect()["step"]
    starts = begin + np.unique(labelled.to_numpy()).astype(np.int64) * step
    return merged_intervals(np.stack([starts, starts + step], 1))


def _count_events(events: pl.LazyFrame, steps: int) -> tuple[Array, tuple[str, ...], tuple[str, ...]]:
    """(Counts int32 [T, K], names of the kinds, notes)."""
    masked = pl.coalesce(pl.col("template"), pl.col("text").str.replace_all(NUMBER, "<*>"))
    level = pl.col("level").fill_null("")
    kind = pl.when(level == "").then(masked).otherwise(level + " " + masked).alias("kind")
    table = events.group_by("step", kind).len().collect()
    totals = table.group_by("kind").agg(pl.col("len").sum()).sort(["len", "kind"], descending=[True, False])
    kept = totals["kind"].to_list()[:MOST_KINDS]
    notes: tuple[str, ...] = ()
    names = [*kept, OTHER] if len(totals) > MOST_KINDS else kept
    if len(totals) > MOST_KINDS:
        notes = (f"{len(totals) - MOST_KINDS} of {len(totals)} kinds of events are counted together as {OTHER}",)
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


def _split(data: PlantDataset, begin: int, step: int, steps: int) -> tuple[int, int]:
    if (split := data.manifest.split) is None:
        return split_steps(steps, 0.6, 0)
    train, test = (int((nanoseconds(text) - begin) // step) for text in (split.train_end, split.test_start))
    if not 0 < train <= test < steps:
        raise PlantDataError(
            f"its split ({split.train_end}, {split.test_start}) leaves steps [0, {train}) and [{test}, {steps})",
            ["prepare the data again with another split", "name an asset that covers both parts"],
            file=data.folder / "dataset.json",
        )
    return train, test
