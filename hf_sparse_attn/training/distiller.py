"""What trains the routers during the dense forward passes of the distillation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from ..attention.call import SparseCall
from ..data.model_inputs import NonFiniteError, check_finite
from ..router.module import RoutingInputs, SparseRouter, active_router
from .config import DistillationConfig
from .distributed import average_gradients, mean_over_processes
from .index_init import start_index
from .router_loss import TileLoss, recovered_share, tile_loss


class Distiller(SparseCall):
    """Dense forward passes that train each layer's router as the layer runs."""

    def __init__(self, layer_routers: list[SparseRouter], config: DistillationConfig, rounds: int) -> None:
        super().__init__(dense=True)
        self.config, self.rounds = config, rounds
        self.generator = torch.Generator(device="cpu").manual_seed(config.seed)
        # layers that are copies of each other share a layer index
        self.optimizers = {r: self._optimizer(r) for r in layer_routers}
        self.total_steps = max(1, rounds * config.steps_per_batch)
        self.batch = 0
        self.losses: list[TileLoss] = []
        self.start_index = False
        self.counts = True  # whether this process has a batch of its own in this round

    def _optimizer(self, router: SparseRouter) -> torch.optim.AdamW:
        # one group for each stage: they differ in learning rate
        stages = ((router.wq, router.wk), (router.wq_index, router.wk_index))
        return torch.optim.AdamW([{"params": list(stage)} for stage in stages], weight_decay=0.0)

    # linear warm-up to 1, then 0.55 + 0.45 cos(π · done), from 1 to 0.1
    # cosine schedule: SGDR, Loshchilov and Hutter 2016, arXiv:1608.03983
    def _schedule(self, step: int) -> float:
        """Factor on the learning rates at an optimiser step."""
        config = self.config
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        done = min(1.0, (step - config.warmup_steps) / max(1, self.total_steps - config.warmup_steps))
        return 0.55 + 0.45 * math.cos(math.pi * done)

    def on_document(self, router: SparseRouter, inputs: RoutingInputs) -> None:
        router = active_router(router)  # not PEFT's wrapper
        check_finite(router.layer, queries=inputs.q, keys=inputs.k)
        if self.start_index:
            if router.index_is_untrained:
                start_index(router, inputs, self.counts)
            return
        optimizer = self.optimizers[router]
        for i in range(self.config.steps_per_batch):
            # tiles as at prefill and single queries as at decode in turn: one router serves both
            single = i % 2 == 1
            tile, count = (
                (1, self.config.queries_per_step) if single else (router.config.query_tile, self.config.tiles_per_step)
            )
            with torch.enable_grad():
                loss = tile_loss(router, inputs, tile, count, self.generator)
                if loss is not None:
                    # queries and keys have no graph: this ends at the router's weights
                    (loss.coarse + loss.fine).backward()
            # collective: every process calls it in every step, with or without a loss of its own
            if not average_gradients(router.weights, loss is not None and self.counts):
                continue
            self._check_gradients(router)
            factor = self._schedule(self.batch * self.config.steps_per_batch + i)
            for group, lr in zip(optimizer.param_groups, (self.config.lr, self.config.index_lr), strict=True):
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # the log is of tiles: masses of single queries do not compare with them
            if loss is not None and not single:
                self.losses.append(replace(loss, coarse=loss.coarse.detach(), fine=loss.fine.detach()))

    def _check_gradients(self, router: SparseRouter) -> None:
        """Raise NonFiniteError in place of a step that would destroy the router."""
        if not all(bool(torch.isfinite(w.grad).all()) for w in router.weights if w.grad is not None):
            for weight in router.weights:
                weight.grad = None
            raise NonFiniteError(f"the gradient of layer {router.layer}'s router is NaN or infinite")

    def row(self) -> dict[str, float]:
        """Means over the layers and processes of the round just done; recovered share over layers at equal budget."""
        losses, self.losses = self.losses, []
        n, device = len(losses), losses[0].coarse.device
        names = {"kl_coarse": "coarse", "kl_fine": "fine", "kept": "kept", "window": "window", "oracle": "oracle"}
        averages = {name: sum(float(getattr(x, attribute)) for x in losses) / n for name, attribute in names.items()}
        # masses are averaged before the share is taken: a layer where window and oracle keep the same weighs nothing
        means = mean_over_processes(averages, device, self.counts)
        return {
            "batch": float(self.batch),
            "kl_coarse": means["kl_coarse"],
            "kl_fine": means["kl_fine"],
            "kept_mass": means["kept"],
            "recovered_share": recovered_share(means["kept"], means["window"], means["oracle"]),
        }

    def state(self) -> dict[str, Any]:
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers.values()]
        return {"batch": self.batch, "generator": self.generator.get_state(), "optimizers": optimizers}

    def load(self, state: dict[str, Any]) -> None:
        self.batch = state["batch"]
        self.generator.set_state(state["generator"])
        for optimizer, saved in zip(self.optimizers.values(), state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
