"""Settings of the joint stage: what learns how fast, which steps run dense, what is annealed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import BUDGET_FIELDS, FIXED_FIELDS, SparseAttentionConfig

ANNEALED = ("kl_weight", "density", "min_keys", "max_keys", "candidate_factor", "query_samples")


@dataclass(frozen=True)
class SparseTrainingConfig:
    """Settings of the joint stage, beside those of the task.

    Raises:
        ValueError: a field has an impossible value; the message names it as ``lora.<field>``, its place in a recipe.
    """

    router_lr: float = 2e-4  # of the routers; a tenth of distillation's order
    kl_weight: float = 0.1  # 0 = the routers stay as they are, and no KL is computed
    kl_tile_share: int = 16  # the KL is computed on one query tile in this many
    dense_every: int = 4  # every this-many-th step runs dense, so that gradients reach links that would be cut; 0 = none, 1 = all
    anneal: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # e.g. {"density": [1.0, 0.125]}: from, to
    anneal_share: float = 0.5  # the share of all steps after which annealing is done
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "anneal", {name: tuple(ends) for name, ends in self.anneal.items()})
        for name in ("router_lr", "kl_tile_share", "anneal_share"):
            if not getattr(self, name) > 0:
                self._refuse(name, "> 0")
        for name in ("kl_weight", "dense_every", "seed"):
            if not getattr(self, name) >= 0:
                self._refuse(name, ">= 0")
        if self.anneal_share > 1:
            self._refuse("anneal_share", "a share in (0, 1]")
        for name, ends in self.anneal.items():
            if name not in ANNEALED or len(ends) != 2 or not all(isinstance(end, int | float) and math.isfinite(end) for end in ends):
                self._refuse("anneal", f"pairs [from, to] of finite numbers for any of {', '.join(ANNEALED)}")
            if name == "kl_weight" and min(ends) <= 0:
                self._refuse("anneal", "above 0 for kl_weight: without a KL the routers are frozen from the start")

    def _refuse(self, name: str, allowed: str) -> None:
        raise ValueError(f"lora.{name} is {getattr(self, name)!r}: must be {allowed}")

    def is_dense(self, step: int) -> bool:
        """Whether optimiser step ``step`` (from 0) runs dense."""
        return self.dense_every > 0 and step % self.dense_every == self.dense_every - 1

    def annealed(self, step: int, steps: int) -> dict[str, float]:
        """Values at optimiser step ``step`` of ``steps``: linear from the first to the second end, then constant."""
        last = max(1, math.ceil(self.anneal_share * steps) - 1)
        done = min(1.0, step / last)
        return {name: end if done == 1 else start + (end - start) * done for name, (start, end) in self.anneal.items()}

    def budget(self, config: SparseAttentionConfig, step: int, steps: int) -> dict[str, Any]:
        """Changes of the model's settings at that step; whole keys where a field counts keys.

        Raises:
            ValueError: an annealed value is impossible for this model, or its ``mass_threshold`` was fitted for another budget.
        """
        values = {name: value for name, value in self.annealed(step, steps).items() if name != "kl_weight"}
        whole = {name: value if name in ("density", "candidate_factor") else round(value) for name, value in values.items()}
        assert not set(whole) & set(FIXED_FIELDS)
        moved = sorted({*whole} & {*BUDGET_FIELDS})
        if moved and config.mass_threshold is not None:
            raise ValueError(
                f"lora.anneal moves {', '.join(moved)}, but sparse_attention.mass_threshold={config.mass_threshold} was fitted for one "
                "budget: set mass_threshold to None for the training, and fit it anew with hf_sparse_attn.fit_mass_threshold afterwards"
            )
        config.changed(**whole)
        return whole
