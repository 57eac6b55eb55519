"""What surprise is usual: median and spread by operating state and hour of the week, and how far above it one lies."""

# Shapes: S segments, T steps.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
from numpy.typing import NDArray

from ...system.extras import needs_extra
from ..dataset import PlantDataset
from ..errors import PlantDataError
from .surprise import Surprise

with needs_extra("industry", "what surprise is usual"):
    import polars as pl

# from the finest cell to the coarsest; a kind is never given up: a sensor step has more tokens than a line
LEVELS = (("kind", "state", "hour"), ("kind", "state"), ("kind",), ())
MAD_TO_SIGMA = 1.4826  # of a normal distribution
# In place of a MAD of 0: Iglewicz and Hoaglin 1993, "How to Detect and Handle Outliers"
MEAN_DEVIATION_TO_SIGMA = 1.253314
SMALLEST_SCALE = 0.01  # nats; differences below it are rounding of a model
NO_STATE = ""


@dataclass(frozen=True)
class Scored:
    """``scores`` float64 [S]: (nats − median) / scale; ``levels`` int64 [S]: the place in `LEVELS` of the cell used."""

    scores: NDArray[np.float64]
    levels: NDArray[np.int64]

    @property
    def by_level(self) -> tuple[int, ...]:
        """How many segments were scored by each of `LEVELS`."""
        return tuple(int(n) for n in np.bincount(self.levels, minlength=len(LEVELS)))


@dataclass(frozen=True)
class SurpriseBaseline:
    """Median and scale of the nats of a segment by kind, operating state and hour of the week.

    Attributes:
        cells: a table for each of `LEVELS`: its columns, ``median``, ``scale``, ``count``; only cells with enough.
        least: segments of training that a cell needs, else the next coarser one is used.
        zone: of the hours, such as ``Asia/Tokyo``.
        dropped: cells of each level with fewer segments.
    """

    cells: tuple[pl.DataFrame, ...]
    least: int
    zone: str
    dropped: tuple[int, ...]

    @classmethod
    def fit(
        cls,
        surprise: Surprise,
        states: NDArray[Any],
        train_end: int,
        *,
        zone: str = "UTC",
        least: int = 30,
    ) -> SurpriseBaseline:
        """Fit on the segments that end before ``train_end`` (nanoseconds since 1970) alone.

        Args:
            surprise: of one asset.
            states: the operating state of each segment [S], see `states_at`.
            train_end: the end of training.
            zone: the plant's time zone, by whose clock shifts begin.
            least: see above.

        Raises:
            PlantDataError: too few segments lie in training, or the zone is unknown.
        """
        early = surprise.times < train_end
        if least < 2 or int(early.sum()) < least:
            raise PlantDataError(
                f"{int(early.sum())} segments end before the end of training, a baseline needs {max(least, 2)}",
                ["take a longer training period", "lower least (2 or more)", "name the asset that has logs"],
            )
        frame = _frame(surprise, states, zone).filter(pl.Series(early))
        cells, dropped = [], []
        for columns in LEVELS:
            found = _summary(frame, columns)
            kept = found.filter(pl.col("count") >= least) if columns else found
            cells.append(kept)
            dropped.append(len(found) - len(kept))
        return cls(tuple(cells), least, zone, tuple(dropped))

    # score = (nats − median) / max(1.4826 · MAD, 0.01), of the finest cell that has enough segments
    def score(self, surprise: Surprise, states: NDArray[Any]) -> Scored:
        """How far each segment's nats lie above what is usual, in units of the spread."""
        frame = _frame(surprise, states, self.zone)
        median, scale = np.full(len(frame), np.nan), np.ones(len(frame))
        levels = np.full(len(frame), -1)
        for level, (columns, cell) in enumerate(zip(LEVELS, self.cells, strict=True)):
            if columns:
                joined = frame.join(cell, on=list(columns), how="left", maintain_order="left")
            else:
                joined = frame.join(cell, how="cross", maintain_order="left")
            known = (levels < 0) & joined["median"].is_not_null().to_numpy()
            median[known] = joined["median"].to_numpy()[known]
            scale[known] = joined["scale"].to_numpy()[known]
            levels[known] = level
        return Scored((frame["nats"].to_numpy() - median) / scale, levels)


def states_at(data: PlantDataset, asset: str, times: NDArray[np.int64]) -> NDArray[np.str_]:
    """The operating state of an asset at each time [S] (nanoseconds since 1970), "" where none is known."""
    table = data.states(asset).collect().sort("start")
    if not len(table):
        return np.full(len(times), NO_STATE)
    starts, ends = (table[name].dt.epoch("ns").to_numpy() for name in ("start", "end"))
    at = np.searchsorted(starts, times, side="right") - 1
    inside = (at >= 0) & (times < ends[np.maximum(at, 0)])
    names = np.array([name or NO_STATE for name in table["state"].to_list()])
    return np.where(inside, names[np.maximum(at, 0)], NO_STATE)


def scores_on_grid(
    times: NDArray[np.int64], scores: NDArray[np.float64], grid_times: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The highest score within each step of a regular grid, float64 [T].

    A step in which nothing was scored, or only NaN, gets the lowest of all scores: silence is no alarm here. What is
    later than the grid belongs to its last step: a sensor step may end after the last reading.

    Args:
        times: int64 [S], nanoseconds since 1970, in any order.
        scores: float64 [S].
        grid_times: int64 [T], starts of the steps.

    Raises:
        PlantDataError: the grid is not regular, a score lies before it or is infinite, or none lies within it.
    """
    at = (times - grid_times[0]) // grid_step(grid_times)
    early, late = at < 0, at >= len(grid_times)
    if early.any() or np.isinf(scores).any() or not np.isfinite(scores[~late]).any():
        raise PlantDataError(
            f"of {len(scores)} scores {int(early.sum())} lie before the grid and {int(late.sum())} behind it, "
            f"{int(np.isinf(scores).sum())} are infinite and {int(np.isnan(scores).sum())} are NaN",
            ["make the grid of the same asset", "leave out what lies outside", "score again with a finite model"],
        )
    highest = np.full(len(grid_times), -np.inf)
    given = ~np.isnan(scores)
    np.maximum.at(highest, np.minimum(at, len(grid_times) - 1)[given], scores[given])
    highest[np.isinf(highest)] = scores[given].min()
    return highest


def grid_step(grid_times: NDArray[np.int64]) -> int:
    """Length of the steps of a grid [T]. Raises PlantDataError unless it is regular and has 2 steps or more."""
    steps = np.unique(np.diff(grid_times))
    if len(steps) != 1 or steps[0] <= 0:
        raise PlantDataError(
            f"the {len(grid_times)} steps of the grid are {len(steps)} lengths apart",
            ["give the times of a regular grid of 2 steps or more, such as Timeline.times"],
        )
    return int(steps[0])


def _frame(surprise: Surprise, states: NDArray[Any], zone: str) -> pl.DataFrame:
    if len(states) != len(surprise):
        raise PlantDataError(
            f"{len(states)} states for {len(surprise)} segments", ["take states_at(data, asset, surprise.times)"]
        )
    try:
        ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise PlantDataError(
            f"there is no time zone {zone!r}", ["name it as Asia/Tokyo", "take UTC", "install tzdata"]
        ) from error
    stamps = pl.from_epoch(pl.Series("time", surprise.times), "ns").dt.replace_time_zone("UTC")
    local = stamps.dt.convert_time_zone(zone)
    return pl.DataFrame(
        {
            "kind": surprise.kinds,
            "state": np.asarray(states),
            "hour": (local.dt.weekday().cast(pl.Int16) - 1) * 24 + local.dt.hour(),
            "nats": surprise.nats,
        }
    )


def _summary(frame: pl.DataFrame, columns: tuple[str, ...]) -> pl.DataFrame:
    nats = pl.col("nats")
    away = (nats - nats.median()).abs()
    mad, mean = MAD_TO_SIGMA * away.median(), MEAN_DEVIATION_TO_SIGMA * away.mean()
    scale = pl.max_horizontal(pl.when(mad > 0).then(mad).otherwise(mean), pl.lit(SMALLEST_SCALE))
    measures = [nats.median().alias("median"), scale.alias("scale"), pl.len().alias("count")]
    return frame.group_by(columns).agg(measures) if columns else frame.select(measures)
