"""The joint stage for any training loop: routers that learn from the KL, dense steps, annealed budgets.

A bare loop, here with Accelerate::

    objective = SparseObjective(model, SparseTrainingConfig())
    optimizer = torch.optim.AdamW(objective.parameter_groups(lr=2e-4))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for step, batch in enumerate(loader):
        forward = objective.forward(step, total_steps)
        loss = model(**batch, use_cache=False, sparse_call=forward.call).loss
        accelerator.backward(loss + forward.kl_loss())
        optimizer.step()
        optimizer.zero_grad()
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..attention.checks import refuse_split_sequences
from ..models.adapters import active_routers
from ..models.convert import mark_trained, set_sparse_attention
from .config import SparseTrainingConfig
from .distributed import materialize_trained
from .joint_forward import TrainingForward


class SparseObjective:
    """Unfreezes the routers of ``model`` (a sparse model or a PeftModel of one) and makes one `TrainingForward` per forward pass.

    Raises:
        ValueError: the model has no routers, its settings and those to be annealed do not fit, or Accelerate splits sequences.
    """

    def __init__(self, model: nn.Module, config: SparseTrainingConfig | None = None) -> None:
        refuse_split_sequences()
        self.model, self.config = model, config or SparseTrainingConfig()
        found = active_routers(model)
        if not found:
            raise ValueError(f"{type(model).__name__} has no routers: convert it with hf_sparse_attn.sparsify first")
        for router in found:
            router.requires_grad_(self.config.kl_weight > 0)
        materialize_trained(model)
        for step in (0, 1):
            self.config.budget(found[0].config, step, 2)  # raises before the first step
        if self.config.kl_weight > 0:
            mark_trained(_base(model))

    def forward(self, step: int, steps: int) -> TrainingForward:
        """What one forward pass of optimiser step ``step`` (from 0) of ``steps`` needs; sets the budget of that step."""
        config = self.config
        if len(config.anneal) > ("kl_weight" in config.anneal):
            set_sparse_attention(_base(self.model), **config.budget(active_routers(self.model)[0].config, step, steps))
        weight = config.annealed(step, steps).get("kl_weight", config.kl_weight)
        return TrainingForward(config.seed, step, weight, config.kl_tile_share, config.is_dense(step))

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups for an optimiser: the backbone's trainable weights at ``lr``, the routers' at ``router_lr`` without decay."""
        routers, others = split_parameters(self.model)
        groups = [{"params": others, "lr": lr, "weight_decay": weight_decay}, {"params": routers, **self.router_group}]
        return [group for group in groups if group["params"]]

    @property
    def router_group(self) -> dict[str, float]:
        """Options of the optimiser's group of routers."""
        return {"lr": self.config.router_lr, "weight_decay": 0.0}


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters of the routers, and all other trainable ones."""
    named = [(".router." in f".{name}", p) for name, p in model.named_parameters() if p.requires_grad]
    return [p for is_router, p in named if is_router], [p for is_router, p in named if not is_router]


def _base(model: Any) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[no-any-return]
