"""Log-loss and kept mass of selections on unseen windows of text, at equal budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hf_sparse_attn_kernels import BlockSelection, TileGrid, block_mass
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..attending import Selector, SparseCall
from ..budgets import KeptKeys
from ..config import SparseAttentionConfig
from ..conversion import sparse_attention_as
from ..data.windows import Window
from ..router import RoutingInputs, SparseRouter
from ..sites import routers
from ..training.losses import kept_mass

LOGIT_POSITIONS = 512  # positions whose logits are held at a time
MASS_TILE_STRIDE = 4  # kept mass is measured on every fourth tile


@dataclass
class WindowResult:
    """One window under one selection: mean log-loss (nats a token) and kept mass by layer."""

    document: str
    length: int
    keys: int | None  # budget, None for dense
    selection: str
    prefill: float  # last half of the window, tiles of query_tile
    decode: float | None  # last tokens, fed through the cache in tiles of 1; None if not measured
    prefill_of_decoded: float | None = None  # the same last tokens at prefill: what the look-ahead inside a tile is worth
    mass: dict[int, float] = field(default_factory=dict)  # by layer
    low_mass: float | None = None  # 5th percentile over tiles, KV heads and layers
    kept: float | None = None  # mean keys of the tiles of the last half that see more than the budget, None for dense
    kept_all: float | None = None  # the same over the whole window
    kept_decode: float | None = None  # the same of the tokens that are fed through the cache

    def line(self) -> str:
        """The result in one line, for the terminal."""
        keys = "" if self.keys is None else f", {self.keys} keys"
        return f"{self.document} {self.length} tokens{keys}, {self.selection}: {self.prefill:.4f}"

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "mass": {str(layer): value for layer, value in self.mass.items()}}


@torch.no_grad()
def token_losses(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats of ``targets`` [1, n] from ``hidden`` [1, n, d], float32 [n]; logits a part at a time."""
    head = model.get_output_embeddings()
    parts = zip(hidden[0].split(LOGIT_POSITIONS), targets[0].split(LOGIT_POSITIONS), strict=True)
    return torch.cat([F.cross_entropy(head(h).float(), t, reduction="none") for h, t in parts])


@torch.no_grad()
def window_losses(model: PreTrainedModel, ids: Tensor, call: SparseCall, decode_tokens: int) -> tuple[float, float | None, float | None]:
    """Log-losses of ``ids`` [1, N]: of the last half at prefill, of the last ``decode_tokens`` fed through the cache, of these at prefill.

    The cache of the prefill pass is cropped and continued with fewer tokens than a query tile at a time, so that every
    query is routed singly, as in generation. Without ``decode_tokens`` the second and third are None.
    """
    n = ids.shape[1]
    cache = DynamicCache(config=model.config) if decode_tokens else None
    hidden = model.base_model(ids, past_key_values=cache, use_cache=cache is not None, sparse_call=call).last_hidden_state
    prefill = token_losses(model, hidden[:, n // 2 - 1 : -1], ids[:, n // 2 :])
    if cache is None:
        return float(prefill.mean()), None, None
    cache.crop(-(decode_tokens + 1))
    start, step = n - decode_tokens - 1, max(1, routers(model)[0].config.query_tile - 1)
    losses = []
    for at in range(start, n - 1, step):
        stop = min(at + step, n - 1)
        hidden = model.base_model(ids[:, at:stop], past_key_values=cache, sparse_call=call).last_hidden_state
        losses.append(token_losses(model, hidden, ids[:, at + 1 : stop + 1]))
    return float(prefill.mean()), float(torch.cat(losses).mean()), float(prefill[-decode_tokens:].mean())


class MassObserver:
    """Kept mass of several selections on a dense pass, per layer: the mean over every fourth open tile."""

    def __init__(self, selectors: Mapping[str, Selector]) -> None:
        self.selectors = selectors
        self.mass: dict[str, dict[int, float]] = {name: {} for name in selectors}
        self.of_tiles: dict[str, list[Tensor]] = {name: [] for name in selectors}

    def __call__(self, router: SparseRouter, inputs: RoutingInputs) -> None:
        config = router.config
        if inputs.q.shape[2] < inputs.k.shape[2]:
            return  # the decode part of the pass
        grid: TileGrid = inputs.grid(config.query_tile, config.block_size)
        visible = grid.last_positions(inputs.q.device) + 1
        tiles = (visible > config.block_size * config.budget_blocks(grid.kv_len)).nonzero()[:, 0][::MASS_TILE_STRIDE]
        if not len(tiles):
            return
        teacher = block_mass(inputs.q, inputs.k, grid, tiles, inputs.scale)
        for name, selector in self.selectors.items():
            kept = selector(router, inputs, config.query_tile).indices[:, :, tiles]
            found = kept_mass(teacher, kept)
            self.mass[name][router.layer] = float(found.mean())
            self.of_tiles[name].append(found.flatten().cpu())

    def low(self, name: str) -> float | None:
        """5th percentile of the kept mass of tiles, over KV heads and layers; None if none was measured."""
        found = self.of_tiles.get(name)
        return float(torch.cat(found).quantile(0.05)) if found else None


class _KeptOfWindow:
    """Keys kept in a window of ``n`` tokens: ``kept``, ``kept_all`` and ``kept_decode`` of its result."""

    def __init__(self, n: int) -> None:
        self.last_half, self.whole, self.decoded = KeptKeys(n // 2), KeptKeys(), KeptKeys()

    def __call__(self, router: SparseRouter, inputs: RoutingInputs, selection: BlockSelection) -> None:
        for meter in (self.decoded,) if selection.grid.q_len < selection.grid.kv_len else (self.last_half, self.whole):
            meter(router, inputs, selection)

    def means(self) -> tuple[float | None, float | None, float | None]:
        return self.last_half.mean(), self.whole.mean(), self.decoded.mean()


def evaluate_windows(
    model: PreTrainedModel,
    windows: Sequence[Window],
    budgets: Sequence[int],
    selectors: Mapping[str, Selector],
    *,
    decode_tokens: int = 256,
    done: Sequence[WindowResult] = (),
    on_result: Callable[[WindowResult], None] | None = None,
) -> list[WindowResult]:
    """Every window, dense and under every selector at every budget (keys).

    Kept mass is measured at the first budget. A ``mass_threshold`` of the model is set aside: the budgets are those that are given.
    Results in ``done`` are not computed again; ``on_result`` is called after each new one.

    Raises:
        ValueError: a window is so short that the model would run it dense.
    """
    dense_below = SparseAttentionConfig.coerce(model.config.sparse_attention).dense_below
    for length in (window.ids.shape[1] for window in windows):
        if length < dense_below:
            raise ValueError(
                f"a window has {length} tokens, but this model runs inputs of fewer than dense_below={dense_below} tokens dense, "
                "so that every selection would give the dense result. Use longer windows, or set_sparse_attention(model, dense_below=0)"
            )
    results = list(done)
    have = {(r.document, r.length, r.keys, r.selection) for r in results}

    def add(result: WindowResult) -> None:
        results.append(result)
        if on_result is not None:
            on_result(result)

    for window in windows:
        n = window.ids.shape[1]
        for keys in budgets:
            todo = [name for name in selectors if (window.document, n, keys, name) not in have]
            with sparse_attention_as(model, min_keys=keys, max_keys=keys, mass_threshold=None):
                observer = MassObserver({name: selectors[name] for name in todo if keys == budgets[0]})
                first = (window.document, n, None, "dense") not in have
                if first or (observer.selectors and todo):
                    dense = window_losses(model, window.ids, SparseCall(dense=True, observer=observer), decode_tokens if first else 0)
                    if first:
                        have.add((window.document, n, None, "dense"))
                        add(WindowResult(window.document, n, None, "dense", *dense))
                for name in todo:
                    kept = _KeptOfWindow(n)
                    losses = window_losses(model, window.ids, SparseCall(selector=selectors[name], on_selection=kept), decode_tokens)
                    mass, low = observer.mass.get(name, {}), observer.low(name)
                    add(WindowResult(window.document, n, keys, name, *losses, mass, low, *kept.means()))
    return results
