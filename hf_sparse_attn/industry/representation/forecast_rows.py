"""Rows of a sensor grid for forecasting models such as PatchTST: past and future values with what was observed."""

# shapes: R rows, C channels

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import PlantDataError
from .sensor_patches import SensorGrid
from .splitting import Part, split_parts

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def forecast_rows(
    grids: Mapping[str, SensorGrid], context: int, horizon: int, stride: int | None = None
) -> DatasetDict | Dataset:
    """Windows of the grids: ``past_values`` [context, C], ``past_observed_mask``, ``future_values`` [horizon, C],
    ``future_observed_mask``, ``asset`` and the number ``first`` of the first step.

    A row lies in one part of the split as a whole, past and future. Cells without a reading hold 0, the centre of
    their channel, and False in the mask. Rows whose past or future holds no reading at all are left out; the
    description of each dataset counts them.

    Args:
        grids: by asset, of the same channels.
        context, horizon: steps of past and future.
        stride: steps from one row to the next; ``horizon`` by default, so that each step is forecast once.

    Returns:
        ``train`` and ``test`` by the split of the data, or one dataset where nothing is split.

    Raises:
        PlantDataError: the grids have other channels, or a part has no row.
    """
    from datasets import DatasetDict

    step = horizon if stride is None else stride
    if min(context, horizon, step) < 1:
        raise PlantDataError(
            f"a context of {context}, a horizon of {horizon} and a stride of {step} steps", ["give 1 or more of each"]
        )
    if len({grid.names for grid in grids.values()}) != 1:
        raise PlantDataError(
            "; ".join(f"{asset} has channels {', '.join(grid.names)}" for asset, grid in grids.items()) or "no grid",
            ["name the channels that all have, in GridSettings.channels", "make rows for one asset at a time"],
        )
    parts = split_parts(next(iter(grids.values())).data.manifest.split)
    sets = {part.name: _part_rows(grids, part, context, horizon, step) for part in parts}
    return sets["all"] if len(parts) == 1 else DatasetDict(sets)


def _part_rows(grids: Mapping[str, SensorGrid], part: Part, context: int, horizon: int, stride: int) -> Dataset:
    from datasets import Array2D, Dataset, DatasetInfo, Features, Value

    channels = len(next(iter(grids.values())).names)
    rows, empty = list[dict[str, Any]](), 0
    for asset, grid in grids.items():
        for first in _starts(grid, part, context + horizon, stride):
            cut, end = first + context, first + context + horizon
            past, future = grid.observed[first:cut], grid.observed[cut:end]
            if not (past.any() and future.any()):
                empty += 1
                continue
            values = {"past_values": grid.values[first:cut], "future_values": grid.values[cut:end]}
            masks = {"past_observed_mask": past, "future_observed_mask": future}
            rows.append({**values, **masks, "asset": asset, "first": first})
    if not rows:
        raise PlantDataError(
            f"no row of {context} + {horizon} steps with readings lies in part {part.name!r}",
            ["take a shorter context or horizon", "take a shorter step of the grid", "prepare with another split"],
        )
    shapes = {"past": (context, channels), "future": (horizon, channels)}
    features = Features(
        {
            **{f"{name}_values": Array2D(shape, "float32") for name, shape in shapes.items()},
            **{f"{name}_observed_mask": Array2D(shape, "bool") for name, shape in shapes.items()},
            "asset": Value("string"),
            "first": Value("int64"),
        }
    )
    columns = {
        name: [row[name] for row in rows] if name in ("asset", "first") else np.stack([row[name] for row in rows])
        for name in features
    }
    info = DatasetInfo(description=json.dumps({"rows": len(rows), "without_readings": empty}), features=features)
    return Dataset.from_dict(columns, info=info)


def _starts(grid: SensorGrid, part: Part, size: int, stride: int) -> Iterator[int]:
    """First steps of the rows of ``size`` steps that lie in a part."""
    low = max(0, -((grid.start - part.start) // grid.step))
    high = min(len(grid), (part.stop - grid.start) // grid.step)
    return iter(range(low, high - size + 1, stride))
