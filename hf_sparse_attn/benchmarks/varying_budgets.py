"""Time of budgets that vary by tile, KV head and layer, against the uniform budget that they were fitted for."""

# shapes: N tokens

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hf_sparse_attn_kernels import BlockSelection, block_sparse_attention
from torch import Tensor
from transformers import PreTrainedModel

from ..attention.call import SparseCall
from ..router.module import RoutingInputs, SparseRouter
from ..router.selection import select_blocks
from ..training.mass_threshold import select_above
from .timing import alternate, ratio, spread

KINDS = ("uniform", "threshold")
PARTS = ("select", "attend", "attend in torch")


class _LayerTimes(SparseCall):
    """A dense pass that times every layer's selections and the attention over them; keys serve as values."""

    def __init__(self, threshold: float, repeats: int) -> None:
        super().__init__(dense=True)
        self.threshold, self.repeats = threshold, repeats
        self.times: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * repeats)  # of all layers, by round
        self.keys: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def on_document(self, router: SparseRouter, inputs: RoutingInputs) -> None:
        tile = router.config.query_tile
        select = {
            "uniform": partial(select_blocks, router, inputs, tile),
            "threshold": partial(select_above, router, inputs, tile, self.threshold),
        }
        selections = {kind: function() for kind, function in select.items()}
        calls: dict[tuple[str, str], Callable[[], object]] = {
            (kind, "select"): function for kind, function in select.items()
        }
        for kind, selection in selections.items():
            calls[kind, "attend"] = partial(_attend, inputs, selection, None)
            calls[kind, "attend in torch"] = partial(_attend, inputs, selection, "torch")
            self.keys[kind].append(float(selection.kept_keys().double().mean()))
        # each once: kernels are compiled before they are timed
        for call in calls.values():
            call()
        named = {"/".join(name): call for name, call in calls.items()}
        for name, seconds in alternate(named, self.repeats, str(inputs.q.device)).items():
            kind, part = name.split("/")
            # added by round over the layers, so that a round is one pass through the model
            self.times[kind, part] = [a + b for a, b in zip(self.times[kind, part], seconds, strict=True)]


def _attend(inputs: RoutingInputs, selection: BlockSelection, impl: str | None) -> None:
    block_sparse_attention(inputs.q, inputs.k, inputs.k, selection, scale=inputs.scale, impl=impl)


@torch.no_grad()
def bench_budgets(model: PreTrainedModel, ids: Tensor, threshold: float, *, repeats: int = 3) -> dict[str, Any]:
    """Seconds of selecting and of attending in all sparse layers, on their own queries and keys of ``ids`` [1, N] in a
    dense pass.

    The model's uniform budget and ``threshold`` take turns in every layer. ``over_uniform`` is the time of the
    threshold over that of the uniform budget, for each part and for both stages of a layer together; ``keys`` are the
    mean keys of all tiles.
    """
    times = _LayerTimes(threshold, repeats)
    model.base_model(ids, use_cache=False, sparse_call=times)
    total = {
        kind: [sum(pair) for pair in zip(times.times[kind, "select"], times.times[kind, "attend"], strict=True)]
        for kind in KINDS
    }
    over = {part: ratio(times.times["threshold", part], times.times["uniform", part]) for part in PARTS}
    return {
        "length": ids.shape[1],
        "keys": {kind: statistics.mean(keys) for kind, keys in times.keys.items()},
        "seconds": {f"{part}, {kind}": spread(seconds) for (kind, part), seconds in times.times.items()},
        "over_uniform": {**over, "select + attend": ratio(total["threshold"], total["uniform"])},
    }
