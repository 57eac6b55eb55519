"""What each way of reading costs, measured side by side, and the window that costs what the routers do."""

# Shapes: N tokens of a window.

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...benchmarks.timing import alternate
from ...models.attach import routers
from ..errors import PlantDataError
from .stream_reading import Reading, backbone_states, language_model, reading_call

LADDER = 2**0.25  # from one tried window to the next


@dataclass(frozen=True)
class ReadingCost:
    """Seconds a token of each way of reading one window of ``tokens``, of every round.

    Where windows overlap a token costs ``length`` / (``length`` − ``past``) times as much, for all ways alike.
    """

    tokens: int
    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Seconds a token."""
        return statistics.median(self.seconds[name])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: median, least and most by name, and the number of rounds."""
        rows = {
            name: {"median_s": statistics.median(s), "min_s": min(s), "max_s": max(s), "n": len(s)}
            for name, s in self.seconds.items()
        }
        return {"tokens": self.tokens, "seconds_a_token": rows}


@dataclass(frozen=True)
class EqualCost:
    """A window + sink that costs no more than the routers.

    Attributes:
        window: the reading; the largest that was tried whose median time is at most that of ``sparse``.
        sparse: the reading it is held against, routers included.
        cost: of both, of dense, and of the other windows that were tried.
        reason: why it is no larger or smaller, in words.
    """

    window: Reading
    sparse: Reading
    cost: ReadingCost
    reason: str


def reading_cost(model: Any, ids: NDArray[np.int32], readings: Sequence[Reading], *, repeats: int = 5) -> ReadingCost:
    """Time all ``readings`` of one window, the tokens ``ids`` [N], in turn: what disturbs the machine meets all alike.

    Args:
        model: a causal language model; states alone are made, no logits, which all need alike.
        ids: as many tokens as a window has.
        readings: their names must differ.
        repeats: rounds, after one that warms up.

    Raises:
        PlantDataError: no tokens or rounds, or two readings of one name.
    """
    names = [reading.name for reading in readings]
    if not len(ids) or repeats < 1 or not names or len(set(names)) < len(names):
        raise PlantDataError(
            f"{len(ids)} tokens, {repeats} rounds, readings {', '.join(names) or '(none)'}",
            ["give a window of tokens", "take 1 round or more", "give readings that differ in what they attend to"],
        )
    model = language_model(model)
    training, device = model.training, next(model.parameters()).device
    row = torch.from_numpy(ids.astype(np.int64))[None].to(device)
    functions: dict[str, Callable[[], object]] = {r.name: partial(_pass, model, row, r) for r in readings}
    model.eval()
    try:
        alternate(functions, 1, device.type)
        times = alternate(functions, repeats, device.type)
    finally:
        model.train(training)
    return ReadingCost(len(ids), {name: tuple(s / len(ids) for s in seconds) for name, seconds in times.items()})


@torch.no_grad()
def _pass(model: Any, row: torch.Tensor, reading: Reading) -> None:
    with reading_call(model, reading) as call:
        backbone_states(model, row, call)


def window_at_equal_cost(
    model: Any, ids: NDArray[np.int32], sparse: Reading, *, repeats: int = 5, rungs: int = 12
) -> EqualCost:
    """The window + sink whose measured time is that of ``sparse``, routers included.

    Windows from the budget of ``sparse`` up, each a quarter of an octave larger, are timed in the same rounds as it and
    dense attention; the largest that takes no longer is taken. Where even the whole window takes no longer, dense
    attention is the one to compare with.

    Args:
        model: a sparse model.
        ids: a window of tokens [N], longer than the budget.
        sparse: a reading by the routers with a number of ``keys``.
        repeats: rounds.
        rungs: windows that are tried at most.

    Raises:
        PlantDataError: ``sparse`` is another kind of reading, or its budget holds the whole window.
    """
    if sparse.attends != "sparse" or sparse.keys is None or sparse.keys >= len(ids):
        raise PlantDataError(
            f"{sparse.name} over {len(ids)} tokens has no window of equal cost to be found",
            ["give Reading('sparse', keys=…)", "give a window longer than its keys"],
        )
    block = routers(language_model(model))[0].config.block_size
    sizes = [-(-round(sparse.keys * LADDER**at) // block) * block for at in range(rungs)]
    keys = sorted({size for size in sizes if size < len(ids)})
    tried = [replace(sparse, attends="window", keys=size) for size in keys]
    dense = replace(sparse, attends="dense", keys=None)
    cost = reading_cost(model, ids, [sparse, dense, *tried], repeats=repeats)
    limit = cost.median(sparse.name)
    # times rise with the window but for noise: the last one below the limit, not the first above it
    cheap = [window for window in tried if cost.median(window.name) <= limit]
    chosen = cheap[-1] if cheap else tried[0]
    if not cheap:
        reason = "no window takes less time than the routers: that of equal budget is taken"
    elif chosen is tried[-1]:
        reason = "the largest window that was tried takes no longer"
    else:
        reason = "the next larger window takes longer"
    if cost.median(dense.name) <= limit:
        reason += "; dense attention takes no longer either, and is the one to compare with"
    return EqualCost(chosen, sparse, cost, reason)
