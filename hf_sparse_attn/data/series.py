"""Tables of numbers over time: one normalised array for each machine, cut into a part that trains and what follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .sources import SourceError, local_files, package_files

MOST_MISSING = 0.2  # share of a channel that may be filled with the value before
READERS = {".csv": "read_csv", ".csv.gz": "read_csv", ".csv.zst": "read_csv", ".parquet": "read_parquet"}


@dataclass(frozen=True)
class Series:
    """The steps of one machine: ``values`` float32 [steps, channels], normalised by mean and deviation of what trains."""

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

    def report(self) -> dict[str, Any]:
        """What a run records of its data."""
        steps = {s.machine: len(s.values) for s in self.series}
        return {"steps": steps, "channels": self.channels, "mean": self.mean, "deviation": self.deviation, "filled": self.filled}


def read_series(sources: Sequence[str], split: float, time: str | None, machine: str | None, channels: Sequence[str]) -> SeriesTable:
    """The series of ``sources``: CSV or Parquet files, or ``FILE.zip::MEMBER``, of which the first ``split`` of each machine's steps train.

    Missing numbers get the value before them (the first ones the value after).

    Raises:
        SourceError: a file cannot be read, lacks a column, holds no numbers, too few of them, or the same number throughout.
    """
    parts = _machines(sources, time, machine)
    names = list(channels) or [name for name in parts[0][1].columns if name not in (time, machine)]
    arrays, missing = [], np.zeros(len(names))
    for name, table in parts:
        values = _numbers(name, table, names)
        missing += np.isnan(values).sum(0)
        arrays.append((name, values))
    total = sum(len(values) for _, values in arrays)
    for channel, share in zip(names, missing / total, strict=True):
        if share > MOST_MISSING:
            raise SourceError(f"channel {channel!r} lacks {share:.0%} of its {total} numbers, at most {MOST_MISSING:.0%}: leave it out")
    filled = [(name, _filled(values)) for name, values in arrays]
    for name, values in filled:
        if np.isnan(values).any():
            raise SourceError(f"{name} holds no number at all in channel {names[int(np.isnan(values).any(0).argmax())]!r}: leave one out")
    cuts = [int(len(values) * split) for _, values in filled]
    known = np.concatenate([values[:cut] for (_, values), cut in zip(filled, cuts, strict=True)])
    mean, deviation = known.mean(0), known.std(0)
    flat = [channel for channel, wide in zip(names, deviation, strict=True) if not wide > 0]
    if flat:
        raise SourceError(f"channel {flat[0]!r} holds the same number throughout what trains: leave it out with series.channels")
    series = [
        Series(name, torch.from_numpy(((values - mean) / deviation).astype(np.float32)), cut)
        for (name, values), cut in zip(filled, cuts, strict=True)
    ]
    return SeriesTable(series, names, mean.tolist(), deviation.tolist(), (missing / total).tolist())


def _machines(sources: Sequence[str], time: str | None, machine: str | None) -> list[tuple[str, Any]]:
    """(name, table in the order of time) of each machine; without a column that names it, of each file."""
    import pandas as pd  # heavy, and needed for series only

    parts: dict[tuple[int, str], list[Any]] = {}
    for at, (path, table) in enumerate(found for source in sources for found in _tables(source)):
        for column in (time, machine):
            if column is not None and column not in table.columns:
                raise SourceError(f"{path} has no column {column!r}; columns: {', '.join(map(str, table.columns))}")
        if time is not None:
            stamps = pd.to_datetime(table[time], utc=True, errors="coerce")
            if stamps.isna().any():
                wrong = table[time][stamps.isna()].iloc[0]
                raise SourceError(f"{path}: column {time!r} holds {wrong!r}, which is no time stamp")
            table = table.assign(**{time: stamps})
        if machine is None:
            parts[at, path.stem] = [table]
            continue
        if lacking := int(table[machine].isna().sum()):
            raise SourceError(f"{path}: {lacking} rows name no machine in column {machine!r}: fill it, or leave them out")
        for name, part in table.groupby(machine):
            parts.setdefault((0, str(name)), []).append(part)
    whole = [(name, pd.concat(tables, ignore_index=True)) for (_, name), tables in parts.items()]
    if time is None:
        return whole
    return [(name, table.sort_values(time, kind="stable").drop_duplicates(time)) for name, table in whole]


def _tables(source: str) -> list[tuple[Path, Any]]:
    import pandas as pd

    pattern, _, member = source.partition("::")
    paths = package_files(pattern) if pattern.startswith(("pypi:", "deb:")) else local_files(pattern)
    if not paths:
        raise SourceError(f"source {source!r}: no such file; series are read from CSV or Parquet files, or FILE.zip::MEMBER")
    found = []
    for path in paths:
        name = member or path.name
        reader = next((READERS[end] for end in READERS if name.endswith(end)), None)
        if reader is None:
            raise SourceError(f"{path}: series are read from {', '.join(READERS)}, or such a file of a zip, named FILE.zip::MEMBER")
        try:
            found.append((Path(name), getattr(pd, reader)(f"zip://{member}::{path}" if member else path)))
        except Exception as error:
            raise SourceError(f"{path}{'::' + member if member else ''} cannot be read: {error}") from error
    return found


def _numbers(machine: str, table: Any, names: Sequence[str]) -> NDArray[np.float64]:
    lacking = [name for name in names if name not in table.columns]
    if lacking:
        raise SourceError(f"{machine} has no channel {lacking[0]!r}; columns: {', '.join(map(str, table.columns))}")
    for name in names:
        if table[name].dtype.kind not in "fiub":
            wrong = table[name].dropna().iloc[0] if table[name].notna().any() else "nothing"
            raise SourceError(f"{machine}: channel {name!r} holds {wrong!r}, not numbers: name others in series.channels")
    values: NDArray[np.float64] = table[list(names)].to_numpy(dtype=np.float64)
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
                f"a row needs {need} steps ({context} + {horizon}), the longest training part has {longest}: shorten the context"
            )
        generator = np.random.default_rng(seed)
        room = np.array([s.trained - need + 1 for s in self.series])
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
            f"a window needs {need} steps ({context} + {horizon}), the longest evaluation part has {longest}: lower data.split"
        )
    rows = []
    for at in range(count):
        series, turn, turns = usable[at % len(usable)], at // len(usable), -(-count // len(usable))
        room = len(series.values) - series.trained - need
        start = series.trained + (room * turn // (turns - 1) if turns > 1 else room)
        rows.append((f"{series.machine}[{start}]", series.row(start, context, horizon)))
    return rows
