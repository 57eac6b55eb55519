"""The joint stage for any training loop: routers that learn from the KL, dense steps, annealed budgets.

A bare loop, here with Accelerate::

    objective = SparseObjective(model, SparseTrainingConfig())
    optimizer = torch.optim.AdamW(objective.parameter_groups(lr=2e-4))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for step, batch in enumerate(loader):
        forward = objective.forward(step, total_steps)
        loss = model(**batch, use_cache=False, sparse_call=forward).loss
        accelerator.backward(loss + forward.kl_loss())
        optimizer.step()
        optimizer.zero_grad()
"""

# Shapes: b rows of a document's call, H query heads, D head dim.

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hf_sparse_attn_kernels import BlockSelection
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..attention.call import Selector, SparseCall, learned_selector
from ..attention.checks import refuse_split_sequences
from ..attention.gradients import Carried, carry
from ..models.adapters import active_routers
from ..models.attach import is_of_router, no_routers
from ..models.convert import mark_trained, set_sparse_attention
from ..router.budget import make_plan
from ..router.module import RoutingInputs, SparseRouter, active_router
from .config import SparseTrainingConfig
from .distributed import materialize_trained
from .router_loss import recovered_share, tile_loss

STEP_STRIDE = 1_000_003  # a prime: seeds of (seed, step, layer) stay apart


@dataclass
class RouterStatistics:
    """Means over layers and documents of one forward pass, on the tiles that the KL was computed on."""

    kl: float = 0.0
    kept_mass: float = 0.0  # softmax mass of the kept links, at a uniform budget
    recovered_share: float = 0.0
    router_entropy: float = 0.0  # of stage 1's distribution over the blocks it may choose, nats
    density: float = 1.0  # kept keys over visible keys, all tiles; 1 in a dense pass


@dataclass
class _Layer:
    carried: Carried
    scalar: Tensor  # zero, with the KL's gradient
    kl: float = 0.0  # times tokens
    tokens: float = 0.0

    @property
    def mean(self) -> float:
        return self.kl / max(self.tokens, 1.0)


@dataclass
class _Routed:
    """A selection, and the mean of the queries [b, H, D] that it was made for."""

    selection: BlockSelection
    queries: Tensor


class TrainingForward(SparseCall):
    """One forward pass of the joint stage: the model takes it as ``sparse_call``; read `kl_loss` before the backward
    pass.

    Router inputs are detached, so the KL's gradient is computed where the queries and keys appear and handed to
    autograd as it is: no graph is kept, and gradient checkpointing neither repeats the KL nor routes again.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        kl_weight: float,
        tile_share: int,
        dense: bool,
        selector: Selector = learned_selector,
    ) -> None:
        super().__init__(dense=dense, selector=selector)
        self.seed, self.step, self.kl_weight, self.tile_share = seed, step, kl_weight, tile_share
        # by the module: copies of a layer can share its number
        self.layers: dict[SparseRouter, _Layer] = {}
        self.selections: dict[SparseRouter, list[_Routed]] = defaultdict(list)
        self.closed = False
        self._learns = self.kl_weight > 0
        self._tile_rows: list[tuple[float, float, float, float]] = []
        self._kept = self._visible = 0.0

    @property
    def call(self) -> SparseCall:
        """The pass itself, by the name that loops written for version 0.1.0 hand on: ``sparse_call=forward.call``."""
        return self

    def _only_reads(self) -> bool:
        """Whether this is a repetition for gradient checkpointing, or a pass without gradients, as of a reference
        model.
        """
        return self.closed or not torch.is_grad_enabled()

    # -- during the forward pass -----------------------------------------------------------------------------------

    def on_layer(self, router: SparseRouter) -> Tensor | None:
        """What carries the layer's KL, to be attached to its output:
        find_unused_parameters of DDP searches from there.
        """
        if not self._learns or self._only_reads():
            return None
        if router not in self.layers:
            carried = Carried()
            scalar = carry(torch.zeros((), device=router.wq.device, dtype=torch.float32), carried, router.weights)
            self.layers[router] = _Layer(carried, scalar)
        return self.layers[router].scalar

    def on_document(self, router: SparseRouter, inputs: RoutingInputs) -> None:
        """The KL of the layer on a share of the document's tiles, and its gradients."""
        if not self._learns or self._only_reads():
            return
        router = active_router(router)  # not PEFT's wrapper, which holds the frozen original, too
        layer, tokens = self.layers[router], float(inputs.q.shape[0] * inputs.q.shape[2])
        layer.tokens += tokens
        # documents count by their tokens: the backward pass divides the sum of gradients by all of them
        layer.carried.weight = layer.tokens
        query_tile = router.config.query_tile
        plan = make_plan(router.config, inputs.grid(query_tile, router.config.block_size), inputs.q.device)
        # rounded up: a document with something to select has at least one tile
        count = -(-int(plan.open.sum()) // self.tile_share)
        if not count:
            return
        # the same tiles for every document, micro-batch and process: how a batch is split does not change what is
        # learned
        seed = ((self.seed * STEP_STRIDE + self.step) * STEP_STRIDE + router.layer) % 2**63
        generator = torch.Generator(device="cpu").manual_seed(seed)
        weights = router.weights
        # not checkpointing's hooks: nothing is recomputed here
        with torch.enable_grad(), saved_tensors_hooks(_same, _same):
            loss = tile_loss(router, inputs, query_tile, count, generator)
            if loss is None:
                return
            kl = loss.coarse + loss.fine
            grads = torch.autograd.grad(kl, weights, allow_unused=True)
        layer.carried.add(grads, weights, tokens)
        layer.kl += float(kl.detach()) * tokens
        self._tile_rows.append((loss.kept, loss.window, loss.oracle, loss.entropy))

    def select(self, router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection:
        """A selection, which a repetition for gradient checkpointing gets again."""
        # never recomputed, so there is nothing to remember
        if not torch.is_grad_enabled():
            return self.selector(router, inputs, query_tile)
        selections = self.selections[active_router(router)]
        if not self.closed:
            selections.append(_Routed(self.selector(router, inputs, query_tile), inputs.q.float().mean(2)))
            return selections[-1].selection
        # recomputed: of the calls of this layer (documents, or passes through a layer that runs several times) the one
        # with these queries
        same = [one for one in selections if one.selection.grid == inputs.grid(query_tile, router.config.block_size)]
        same = [one for one in same if one.queries.shape[0] == inputs.q.shape[0]]
        if len(same) < 2:
            return same[0].selection
        queries = inputs.q.float().mean(2)
        # the nearest one: what is recomputed may differ by rounding
        return same[int(torch.stack([(one.queries - queries).abs().max() for one in same]).argmin())].selection

    def on_selection(self, router: SparseRouter, inputs: RoutingInputs, selection: BlockSelection) -> None:
        """Count kept and visible keys."""
        if not self._only_reads():
            grid = selection.grid
            kept = (selection.indices >= 0).sum(-1) * grid.block_size
            visible = grid.last_positions(kept.device) + 1 if grid.causal else torch.full_like(kept[0, 0], grid.kv_len)
            self._kept += float(torch.minimum(kept, visible).sum())  # the last block may be partial
            self._visible += float(visible.expand_as(kept).sum())

    # -- after it --------------------------------------------------------------------------------------------------

    # loss = task loss + kl_weight · share · mean over layers of (Σ_doc tokens_doc · KL_doc / Σ_doc tokens_doc)
    def kl_loss(self, share: float | Tensor = 1.0) -> Tensor:
        """``kl_weight`` · ``share`` · KL, the mean over layers and tokens, with gradient to the routers: scalar
        float32.

        ``share`` is the part of the batch that this forward pass is, e.g. its label tokens over those of all
        micro-batches and processes. Ends the collecting: what runs after this is recomputation.
        """
        self.closed = True
        if not self.layers:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        # the scalar is zero and brings the gradient, the mean brings the value
        scalars = [layer.scalar + layer.mean for layer in self.layers.values()]
        # layers may be on several devices
        mean = torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).mean()
        return mean * share * self.kl_weight

    def statistics(self) -> RouterStatistics:
        """Means over the layers and documents that had something to select."""
        rows = self._tile_rows
        kept, window, oracle, entropy = (
            (sum(column) / len(rows) for column in zip(*rows, strict=True)) if rows else (0.0,) * 4
        )
        kl = sum(layer.mean for layer in self.layers.values()) / max(1, len(self.layers))
        share = recovered_share(kept, window, oracle)
        return RouterStatistics(kl, kept, share, entropy, self._kept / self._visible if self._visible else 1.0)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def mean_statistics(rows: Sequence[RouterStatistics]) -> dict[str, float]:
    """Means of the fields over forward passes."""
    return (
        {name: sum(getattr(row, name) for row in rows) / len(rows) for name in RouterStatistics.__dataclass_fields__}
        if rows
        else {}
    )


class SparseObjective:
    """Unfreezes the routers of ``model`` (a sparse model or a PeftModel of one) and makes one `TrainingForward` per
    forward pass.

    Raises:
        ValueError: the model has no routers, its settings and those to be annealed do not fit, or Accelerate splits
            sequences.
    """

    def __init__(self, model: nn.Module, config: SparseTrainingConfig | None = None) -> None:
        refuse_split_sequences()
        self.model, self.config = model, config or SparseTrainingConfig()
        layer_routers = active_routers(model)
        if not layer_routers:
            raise ValueError(no_routers(model))
        for router in layer_routers:
            router.requires_grad_(self.config.kl_weight > 0)
        materialize_trained(model)
        for step in (0, 1):
            self.config.budget(layer_routers[0].config, step, 2)  # raises before the first step
        if self.config.kl_weight > 0:
            mark_trained(_base(model))

    def forward(self, step: int, steps: int) -> TrainingForward:
        """What one forward pass of optimiser step ``step`` (from 0) of ``steps`` needs;
        sets the budget of that step.
        """
        config = self.config
        # something beside the KL's weight is annealed: the budget moves
        if len(config.anneal) > ("kl_weight" in config.anneal):
            set_sparse_attention(_base(self.model), **config.budget(active_routers(self.model)[0].config, step, steps))
        weight = config.annealed(step, steps).get("kl_weight", config.kl_weight)
        return TrainingForward(config.seed, step, weight, config.kl_tile_share, config.is_dense(step))

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups for an optimiser: the backbone's trainable weights at ``lr``, the routers' at ``router_lr`` without
        decay.
        """
        routers, others = split_parameters(self.model)
        groups = [{"params": others, "lr": lr, "weight_decay": weight_decay}, {"params": routers, **self.router_group}]
        return [group for group in groups if group["params"]]

    @property
    def router_group(self) -> dict[str, float]:
        """Options of the optimiser's group of routers."""
        return {"lr": self.config.router_lr, "weight_decay": 0.0}


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters of the routers, and all other trainable ones."""
    named = [(is_of_router(name), p) for name, p in model.named_parameters() if p.requires_grad]
    return [p for is_router, p in named if is_router], [p for is_router, p in named if not is_router]


def _base(model: Any) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[no-any-return]
