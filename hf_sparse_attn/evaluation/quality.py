"""Log-loss and kept mass of selections on unseen windows of text, at equal budget."""

# Shapes: B batch, N tokens of a window, d hidden size, G KV heads, m tiles that are measured, K kept blocks of a tile,
# C blocks that the oracle chose.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hf_sparse_attn_kernels import BlockSelection, TileGrid, block_mass
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..architectures.cache_arguments import MODEL_ARGUMENT
from ..attention.call import Selector, SparseCall
from ..config import SparseAttentionConfig, fixed_budget
from ..data.windows import Window
from ..models.attach import routers
from ..models.convert import sparse_attention_as
from ..router.budget import make_plan
from ..router.module import RoutingInputs, SparseRouter
from ..system.progress import counted
from ..training.mass_threshold import KeptKeys
from ..training.router_loss import kept_mass
from .divergence import predictions, token_losses

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
    # the same last tokens at prefill: what the look-ahead inside a tile is worth
    prefill_of_decoded: float | None = None
    mass: dict[int, float] = field(default_factory=dict)  # by layer
    low_mass: float | None = None  # 5th percentile over tiles, KV heads and layers
    head_mass: dict[int, list[float]] = field(default_factory=dict)  # kept mass of every KV head, by layer
    # share of the oracle's chosen blocks that are kept, likewise
    recall: dict[int, list[float]] = field(default_factory=dict)
    kl: float | None = None  # see `Predictions`, for these three
    output_error: float | None = None
    by_position: list[float] = field(default_factory=list)
    kept: float | None = None  # mean keys of the tiles of the last half that see more than the budget, None for dense
    kept_all: float | None = None  # the same over the whole window
    kept_decode: float | None = None  # the same of the tokens that are fed through the cache

    def line(self) -> str:
        """The result in one line, for the terminal."""
        keys = "" if self.keys is None else f", {self.keys} keys"
        return f"{self.document} {self.length} tokens{keys}, {self.selection}: {self.prefill:.4f}"

    def to_dict(self) -> dict[str, Any]:
        # JSON has texts as keys
        by_layer = ("mass", "head_mass", "recall")
        return {
            **self.__dict__,
            **{name: {str(layer): value for layer, value in getattr(self, name).items()} for name in by_layer},
        }


@torch.no_grad()
def window_losses(
    model: PreTrainedModel,
    ids: Tensor,
    call: SparseCall,
    decode_tokens: int,
    on_hidden: Callable[[Tensor], None] | None = None,
) -> tuple[float, float | None, float | None]:
    """Log-losses of ``ids`` [1, N]: of the last half at prefill, of the last ``decode_tokens`` fed through the cache,
    of these at prefill.

    The cache of the prefill pass is cropped and continued with fewer tokens than a query tile at a time, so that every
    query is routed singly, as in generation. Without ``decode_tokens`` the second and third are None. ``on_hidden`` is
    given the last hidden states [1, N, d] of the prefill.
    """
    n = ids.shape[1]
    # one pass serves both: its states give the losses at prefill, its cache the keys for decoding
    cache = DynamicCache(config=model.config) if decode_tokens else None
    hidden = model.base_model(
        ids, **{MODEL_ARGUMENT: cache}, use_cache=cache is not None, sparse_call=call
    ).last_hidden_state
    if on_hidden is not None:
        on_hidden(hidden)
    prefill = token_losses(model, hidden[:, n // 2 - 1 : -1], ids[:, n // 2 :])
    if cache is None:
        return float(prefill.mean()), None, None
    # negative: so many are taken off. One more than is predicted, since the first target needs the state before it.
    cache.crop(-(decode_tokens + 1))
    # a call with fewer new tokens than a query tile routes each of them singly
    start, step = n - decode_tokens - 1, max(1, routers(model)[0].config.query_tile - 1)
    losses = []
    for at in range(start, n - 1, step):
        stop = min(at + step, n - 1)
        hidden = model.base_model(ids[:, at:stop], **{MODEL_ARGUMENT: cache}, sparse_call=call).last_hidden_state
        losses.append(token_losses(model, hidden, ids[:, at + 1 : stop + 1]))
    return float(prefill.mean()), float(torch.cat(losses).mean()), float(prefill[-decode_tokens:].mean())


class MassObserver(SparseCall):
    """Kept mass and recall of several selections on a dense pass, per layer and KV head:
    means over every fourth open tile.
    """

    def __init__(self, selectors: Mapping[str, Selector]) -> None:
        super().__init__(dense=True)
        self.selectors = selectors
        self.mass: dict[str, dict[int, float]] = {name: {} for name in selectors}
        self.by_head: dict[str, dict[int, list[float]]] = {name: {} for name in selectors}
        self.recall: dict[str, dict[int, list[float]]] = {name: {} for name in selectors}
        self.of_tiles: dict[str, list[Tensor]] = {name: [] for name in selectors}

    def on_document(self, router: SparseRouter, inputs: RoutingInputs) -> None:
        config = router.config
        if inputs.q.shape[2] < inputs.k.shape[2]:
            return  # the decode part of the pass
        grid: TileGrid = inputs.grid(config.query_tile, config.block_size)
        # tiles that see more than their budget: the others keep all under every selection
        visible = grid.last_positions(inputs.q.device) + 1
        tiles = (visible > config.block_size * config.budget_blocks(grid.kv_len)).nonzero()[:, 0][::MASS_TILE_STRIDE]
        if not len(tiles):
            return
        teacher = block_mass(inputs.q, inputs.k, grid, tiles, inputs.scale)
        plan = make_plan(config, grid, inputs.q.device)
        # the oracle's free blocks; forced ones are kept by all and would only raise the recall
        wanted = plan.best(teacher, tiles, plan.free[tiles])
        for name, selector in self.selectors.items():
            kept = selector(router, inputs, config.query_tile).indices[:, :, tiles]
            mass = kept_mass(teacher, kept)
            self.mass[name][router.layer] = float(mass.mean())
            self.by_head[name][router.layer] = mass.mean((0, 2)).tolist()
            if wanted.shape[-1]:
                self.recall[name][router.layer] = recall(kept, wanted).tolist()
            self.of_tiles[name].append(mass.flatten().cpu())

    def low(self, name: str) -> float | None:
        """5th percentile of the kept mass of tiles, over KV heads and layers; None if none was measured."""
        tile_masses = self.of_tiles.get(name)
        return float(torch.cat(tile_masses).quantile(0.05)) if tile_masses else None


def recall(kept: Tensor, wanted: Tensor) -> Tensor:
    """Share of the blocks ``wanted`` [B, G, m, C] that are among those ``kept`` [B, G, m, K] (−1 = empty in both),
    float32 [G].
    """
    blocks = int(torch.maximum(kept.max(), wanted.max())) + 2  # the first column stands for the empty entries
    member = torch.zeros(*kept.shape[:-1], blocks, dtype=torch.bool, device=kept.device).scatter_(
        -1, kept.long() + 1, True
    )
    # an empty entry of what is wanted counts neither as a hit nor as a miss
    named = wanted >= 0
    hits = member.gather(-1, wanted + 1) & named
    return hits.sum((0, 2, 3)).float() / named.sum((0, 2, 3)).clamp(min=1)


class _KeptOfWindow(SparseCall):
    """Keys kept in a window of ``n`` tokens: ``kept``, ``kept_all`` and ``kept_decode`` of its result."""

    def __init__(self, selector: Selector, n: int) -> None:
        super().__init__(selector=selector)
        self.last_half, self.whole, self.decoded = KeptKeys(n // 2), KeptKeys(), KeptKeys()

    def on_selection(self, router: SparseRouter, inputs: RoutingInputs, selection: BlockSelection) -> None:
        # fewer queries than keys: a part that is fed through the cache
        for meter in (self.decoded,) if selection.grid.q_len < selection.grid.kv_len else (self.last_half, self.whole):
            meter.on_selection(router, inputs, selection)

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
    progress: bool = True,
) -> list[WindowResult]:
    """Every window, dense and under every selector at every budget (keys).

    Kept mass is measured at the first budget. A ``mass_threshold`` of the model is set aside: the budgets are those
    that are given. Results in ``done`` are not computed again; ``on_result`` is called after each new one.
    ``progress``: show how many windows are done.

    Raises:
        ValueError: a window is so short that the model would run it dense.
    """
    dense_below = SparseAttentionConfig.coerce(model.config.sparse_attention).dense_below
    for length in (window.ids.shape[1] for window in windows):
        if length < dense_below:
            raise ValueError(
                f"a window has {length} tokens, but this model runs inputs of fewer than dense_below={dense_below} "
                "tokens dense, "
                "so that every selection would give the dense result. Use longer windows, or "
                "set_sparse_attention(model, dense_below=0)"
            )
    results = list(done)
    have = {(r.document, r.length, r.keys, r.selection) for r in results}

    def add(result: WindowResult) -> None:
        results.append(result)
        if on_result is not None:
            on_result(result)

    for window in counted(windows, f"windows of {windows[0].ids.shape[1] if windows else 0} tokens", progress):
        reader = _Reader(model, window, decode_tokens)
        n = window.ids.shape[1]
        for keys in budgets:
            todo = [name for name in selectors if (window.document, n, keys, name) not in have]
            with sparse_attention_as(model, **fixed_budget(keys)):
                observer = MassObserver({name: selectors[name] for name in todo if keys == budgets[0]})
                # selections are compared with dense states: a resumed run reads them again, without a second row
                first = (window.document, n, None, "dense") not in have
                if first or (todo and (observer.selectors or reader.dense is None)):
                    dense = reader.read_dense(observer, first)
                    if first:
                        have.add((window.document, n, None, "dense"))
                        add(dense)
                for name in todo:
                    add(reader.read(name, keys, selectors[name], observer))
    return results


class _Reader:
    """Reads one window, dense first."""

    def __init__(self, model: PreTrainedModel, window: Window, decode_tokens: int) -> None:
        self.model, self.window, self.decode_tokens = model, window, decode_tokens
        self.dense: Tensor | None = None  # last hidden states
        self.hidden: Tensor | None = None  # of the pass just done

    def read_dense(self, observer: MassObserver, decoded: bool) -> WindowResult:
        """The dense row; it is not ``decoded`` where it is known already."""
        losses = window_losses(self.model, self.window.ids, observer, self.decode_tokens if decoded else 0, self._take)
        self.dense = self.hidden
        return self._result(None, "dense", losses)

    def read(self, name: str, keys: int, selector: Selector, observer: MassObserver) -> WindowResult:
        kept = _KeptOfWindow(selector, self.window.ids.shape[1])
        result = self._result(
            keys, name, window_losses(self.model, self.window.ids, kept, self.decode_tokens, self._take)
        )
        result.mass, result.low_mass = observer.mass.get(name, {}), observer.low(name)
        result.head_mass, result.recall = observer.by_head.get(name, {}), observer.recall.get(name, {})
        result.kept, result.kept_all, result.kept_decode = kept.means()
        return result

    def _take(self, hidden: Tensor) -> None:
        self.hidden = hidden

    def _result(self, keys: int | None, name: str, losses: tuple[float, float | None, float | None]) -> WindowResult:
        ids = self.window.ids
        assert self.hidden is not None and self.dense is not None
        prediction = predictions(self.model, ids, self.hidden, self.dense)
        result = WindowResult(self.window.document, ids.shape[1], keys, name, *losses)
        result.kl, result.output_error, result.by_position = (
            prediction.kl,
            prediction.output_error,
            prediction.by_position,
        )
        return result
