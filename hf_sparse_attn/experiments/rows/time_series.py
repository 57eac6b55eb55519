"""Tables of numbers over time: one normalised array for each machine, cut into a part that trains and what
follows it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...data.sources import SourceError
from .series_files import read_tables
from .stamps import TimeColumn

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

MOST_MISSING = 0.2  # share of a channel that may be filled with the value before
# share of a machine's rows that may have the stamp of another, as an hour of local time does in autumn
MOST_REPEATED = 0.01


@dataclass(frozen=True)
class Series:
    """The steps of one machine: ``values`` float32 [steps, channels], normalised by mean and deviation of
    what trains.
    """

    machine: str
    values: Tensor
    trained: int  # steps from the first that train

    def row(self, start: int, context: int, horizon: int) -> dict[str, Tensor]:
        """``past_values`` [context, channels] and the ``future_values`` [horizon, channels] after them."""
        return {
            "past_values": self.values[start : start + context],
            "future_values": self.values[start + context : start + context + horizon],
        }


@dataclass(frozen=True)
class SeriesTable:
    """All series of a run, and what was done to their numbers."""

    series: list[Series]
    channels: list[str]
    mean: list[float]
    deviation: list[float]
    filled: list[float]  # share of each channel's steps that held no number and have the one before
    reordered: int = 0  # rows that did not stand in the order of time
    repeated: int = 0  # rows that had the time stamp of another one, and were dropped

    def report(self) -> dict[str, Any]:
        """What a run records of its data."""
        steps = {s.machine: len(s.values) for s in self.series}
        numbers = {"mean": self.mean, "deviation": self.deviation, "filled": self.filled}
        return {
            "steps": steps,
            "channels": self.channels,
            **numbers,
            "reordered": self.reordered,
            "repeated": self.repeated,
        }


def read_series(
    sources: Sequence[str],
    split: float,
    time: str | None,
    machine: str | None,
    channels: Sequence[str],
    time_format: str | None = None,
) -> SeriesTable:
    """The series of ``sources``: CSV or Parquet files, or ``FILE.zip::MEMBER``, of which the first ``split`` of each
    machine's steps train.

    Missing numbers get the value before them (the first ones the value after). Rows are sorted by the column ``time``,
    written as ``time_format`` says (`stamps.TimeColumn`); of rows with one time stamp the first is kept.

    Raises:
        SourceError: a file cannot be read, lacks a column, holds no numbers, too few of them, or the same number
            throughout; a time stamp is none or ambiguous; more than ``MOST_REPEATED`` of a machine's rows have the
            stamp of another row, but other numbers.
    """
    tables = [
        entry
        for source in sources
        for entry in read_tables(source, [name for name in (time, machine) if name is not None])
    ]
    names = list(channels) or [name for name in tables[0][2].columns if name not in (time, machine)]
    tables = [(path, stem, _numeric(path, table, names)) for path, stem, table in tables]
    parts, reordered, repeated = _machines(tables, time, machine, time_format)
    filled, missing = _complete(parts, names)
    cuts = [int(len(values) * split) for _, values in filled]
    # (x − mean) / deviation by channel, both of what trains: what is evaluated leaks nothing
    known = np.concatenate([values[:cut] for (_, values), cut in zip(filled, cuts, strict=True)])
    mean, deviation = known.mean(0), known.std(0)
    flat = [channel for channel, wide in zip(names, deviation, strict=True) if not wide > 0]
    if flat:
        raise SourceError(
            f"channel {flat[0]!r} holds the same number throughout what trains: leave it out with series.channels"
        )
    series = [
        Series(name, torch.from_numpy(((values - mean) / deviation).astype(np.float32)), cut)
        for (name, values), cut in zip(filled, cuts, strict=True)
    ]
    return SeriesTable(series, names, mean.tolist(), deviation.tolist(), missing, reordered, repeated)


def _complete(
    parts: Sequence[tuple[str, pd.DataFrame]], names: Sequence[str]
) -> tuple[list[tuple[str, NDArray[np.float64]]], list[float]]:
    """(machine, numbers [steps, channels], none of them missing) of each machine; share of each channel that was."""
    arrays, missing = [], np.zeros(len(names))
    for name, table in parts:
        values = _numbers(name, table, names)
        missing += np.isnan(values).sum(0)
        arrays.append((name, values))
    total = sum(len(values) for _, values in arrays)
    for channel, share in zip(names, missing / total, strict=True):
        if share > MOST_MISSING:
            raise SourceError(
                f"channel {channel!r} lacks {share:.0%} of its {total} numbers, at most {MOST_MISSING:.0%}: leave it "
                "out"
            )
    filled = [(name, _filled(values)) for name, values in arrays]
    for name, values in filled:
        if np.isnan(values).any():
            raise SourceError(
                f"{name} holds no number at all in channel {names[int(np.isnan(values).any(0).argmax())]!r}: leave "
                "one out"
            )
    return filled, (missing / total).tolist()


def _machines(
    tables: Sequence[tuple[str, str, pd.DataFrame]], time: str | None, machine: str | None, time_format: str | None
) -> tuple[list[tuple[str, pd.DataFrame]], int, int]:
    """(name, table in the order of time) of each machine, without a column that names it of each file; rows moved;
    rows dropped.
    """
    import pandas as pd  # heavy, and needed for series only

    if time is not None:
        column = TimeColumn(time, [(path, table[time]) for path, _, table in tables], time_format)
        tables = [(p, n, t.assign(**{time: stamps})) for (p, n, t), stamps in zip(tables, column.stamps(), strict=True)]
    # parts of a machine are joined over the files; without a column of machines each file is one
    parts: dict[tuple[int, str], list[pd.DataFrame]] = {}
    for at, (path, stem, table) in enumerate(tables):
        if machine is None:
            parts[at, stem] = [table]
            continue
        lacking = table[machine].isna() | (table[machine].astype(object) == "")
        if lacking.any():
            raise SourceError(
                f"{path}: {lacking.sum()} rows name no machine in column {machine!r}: fill it, or leave them out"
            )
        for name, part in table.groupby(table[machine].astype(str)):
            parts.setdefault((0, str(name)), []).append(part)
    whole = [(name, pd.concat(stamps, ignore_index=True)) for (_, name), stamps in parts.items()]
    if time is None:
        return whole, 0, 0
    shown = (
        [path for path, _, _ in tables]
        if machine is None
        else [f"{', '.join(path for path, _, _ in tables[:3])}: {name}" for name, _ in whole]
    )
    ordered = [_ordered(where, table, time) for where, (_, table) in zip(shown, whole, strict=True)]
    reordered, repeated = sum(moved for _, moved, _ in ordered), sum(dropped for *_, dropped in ordered)
    if reordered or repeated:
        logger.warning(
            "%d rows were put into the order of column %r, and %d that had the time stamp of another row dropped",
            reordered,
            time,
            repeated,
        )
    return [(name, table) for (name, _), (table, *_) in zip(whole, ordered, strict=True)], reordered, repeated


def _ordered(where: str, table: pd.DataFrame, time: str) -> tuple[pd.DataFrame, int, int]:
    """(rows by time, each stamp once; rows that were moved; rows that were dropped)."""
    # stable: of rows with one stamp the first in the file comes first
    ordered = table.sort_values(time, kind="stable")
    moved = int((ordered.index != table.index).sum())
    again = ordered.duplicated(time)
    # rows that are alike in all columns are copies; only the others are a sign of a wrong column
    other = int((again & ~ordered.duplicated()).sum())
    if other > MOST_REPEATED * len(ordered):
        raise SourceError(
            f"{where}: {other} of {len(ordered)} rows have the time stamp of another row in column {time!r}, but "
            "other numbers: name a finer "
            "column in series.time, one of machines in series.machine, or no series.time if the rows are in order"
        )
    return ordered[~again], moved, int(again.sum())


def _numeric(path: str, table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The table with numbers in those of the columns ``names`` that it has."""
    import pandas as pd

    columns = {}
    for name in names:
        if name not in table.columns or table[name].dtype.kind in "fiub":
            continue
        values = pd.to_numeric(table[name].astype(str).where(table[name].notna()).astype(object), errors="coerce")
        if (wrong := values.isna() & table[name].notna()).any():
            at = int(wrong.to_numpy().argmax())
            held = str(table[name].iloc[at])
            raise SourceError(
                f"{path}, row {at}: channel {name!r} holds {held!r}, not numbers: name others in series.channels, or "
                "repair it"
            )
        columns[name] = values
    return table.assign(**columns)


def _numbers(machine: str, table: pd.DataFrame, names: Sequence[str]) -> NDArray[np.float64]:
    lacking = [name for name in names if name not in table.columns]
    if lacking:
        raise SourceError(f"{machine} has no channel {lacking[0]!r}; columns: {', '.join(map(str, table.columns))}")
    values: NDArray[np.float64] = table[list(names)].to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)


def _filled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    import pandas as pd

    filled: NDArray[np.float64] = pd.DataFrame(values).ffill().bfill().to_numpy()
    return filled


class SeriesRows:
    """``count`` training rows at random places of what trains; the same for the same seed.

    Raises:
        SourceError: no machine has so many steps.
    """

    def __init__(self, table: SeriesTable, context: int, horizon: int, count: int, seed: int) -> None:
        self.context, self.horizon, need = context, horizon, context + horizon
        self.series = [s for s in table.series if s.trained >= need]
        if not self.series:
            longest = max(s.trained for s in table.series)
            raise SourceError(
                f"a row needs {need} steps ({context} + {horizon}), the longest training part has {longest}: shorten "
                "the context"
            )
        generator = np.random.default_rng(seed)
        room = np.array([s.trained - need + 1 for s in self.series])
        # machines in proportion to the places that a row has in them
        which = generator.choice(len(room), size=count, p=room / room.sum())
        self.places = [(int(w), int(generator.integers(room[w]))) for w in which]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        which, start = self.places[index]
        return self.series[which].row(start, self.context, self.horizon)


def evaluation_rows(table: SeriesTable, context: int, horizon: int, count: int) -> list[tuple[str, dict[str, Tensor]]]:
    """(name, row) of ``count`` rows that lie behind what trains, evenly spaced, the machines in turn.

    Raises:
        SourceError: no machine has so many steps behind its training part.
    """
    need = context + horizon
    usable = [s for s in table.series if len(s.values) - s.trained >= need]
    if not usable:
        longest = max(len(s.values) - s.trained for s in table.series)
        raise SourceError(
            f"a window needs {need} steps ({context} + {horizon}), the longest evaluation part has {longest}: lower "
            "data.split"
        )
    rows = []
    for at in range(count):
        series, turn, turns = usable[at % len(usable)], at // len(usable), -(-count // len(usable))
        room = len(series.values) - series.trained - need
        # from the first place behind what trains to the last, as many as there are turns
        start = series.trained + (room * turn // (turns - 1) if turns > 1 else room)
        rows.append((f"{series.machine}[{start}]", series.row(start, context, horizon)))
    return rows
