"""Stage B: LoRA on the backbone and the routers together, with the sparse forward pass.

Loss = task loss + ``kl_weight`` · KL. The router's inputs are detached: routers learn from the KL only, the backbone
from the task only. A share of the steps runs dense, so that gradients also reach links that the routers would cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapters import lora_config
from ..attending import SparseCall
from ..conversion import mark_trained
from ..files import write_atomically
from ..plan import make_plan
from ..router import RoutingInputs, SparseRouter
from .losses import tile_loss
from .progress import bar


@dataclass(frozen=True)
class AdaptationConfig:
    """Settings of `adapt`. A batch is one optimiser step.

    Raises:
        ValueError: a field has an impossible value.
    """

    rank: int = 8  # of LoRA
    alpha: int = 16  # of LoRA
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    lr: float = 2e-4  # of LoRA; AdamW
    router_lr: float = 2e-4  # a tenth of stage A's
    kl_weight: float = 0.1
    kl_tile_share: int = 16  # the KL is computed on one tile in this many
    dense_every: int = 4  # every this-many-th step runs dense
    max_grad_norm: float = 1.0
    seed: int = 0
    save_every: int = 2  # steps between checkpoints, if a checkpoint path is given

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for name in ("rank", "alpha", "lr", "router_lr", "kl_tile_share", "dense_every", "max_grad_norm", "save_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"lora.{name} is {getattr(self, name)!r}: must be > 0")
        if self.kl_weight < 0:
            raise ValueError(f"lora.kl_weight is {self.kl_weight!r}: must be >= 0")


class KLCollector:
    """Observer that collects the routers' KL of one forward pass, with gradient to the routers."""

    def __init__(self, config: AdaptationConfig, generator: torch.Generator) -> None:
        self.config, self.generator = config, generator
        self.losses: list[Tensor] = []
        self.kept: list[tuple[float, float, float]] = []

    def __call__(self, router: SparseRouter, inputs: RoutingInputs) -> None:
        plan = make_plan(router.config, inputs.grid(router.config.query_tile, router.config.block_size), inputs.q.device)
        count = -(-int(plan.open.sum()) // self.config.kl_tile_share)
        loss = tile_loss(router, inputs, router.config.query_tile, count, self.generator) if count else None
        if loss is not None:
            self.losses.append(loss.coarse + loss.fine)
            self.kept.append((loss.kept, loss.window, loss.oracle))

    def total(self) -> Tensor:
        """Mean KL over layers."""
        return torch.stack(self.losses).mean() if self.losses else torch.zeros(())


def add_lora(model: PreTrainedModel, config: AdaptationConfig) -> Any:
    """A PeftModel of the sparse ``model``: LoRA on ``target_modules``, the routers trained and saved with the adapter."""
    from peft import get_peft_model  # heavy, and needed in this stage only

    targets = list(config.target_modules)
    return get_peft_model(model, lora_config(model, r=config.rank, lora_alpha=config.alpha, target_modules=targets, task_type="CAUSAL_LM"))


def adapt(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    config: AdaptationConfig | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> tuple[Any, list[dict[str, Any]]]:
    """Train LoRA and routers on ``batches`` (``input_ids`` [B, N]; next-token loss), one step each.

    Returns:
        (the PeftModel, one log row per step). Call ``merge_and_unload()`` on it for a plain sparse model.

    Raises:
        ValueError: no batches, or a checkpoint of another run.
    """
    if not batches:
        raise ValueError("adapt got no batches: give at least one document")
    config = config or AdaptationConfig()
    torch.manual_seed(config.seed)
    peft_model = add_lora(model, config)
    trainer = _Adapter(peft_model, config)
    if checkpoint is not None and Path(checkpoint).exists():
        trainer.load(Path(checkpoint))
    peft_model.train()
    with bar(progress) as shown:
        task = shown.add_task("LoRA + routers", total=len(batches), completed=trainer.step, info="")
        for batch in batches[trainer.step :]:
            row = trainer.train_step(batch)
            shown.update(task, advance=1, info=f"loss {row['loss']:.3f} ({'dense' if row['dense'] else 'sparse'}), KL {row['kl']:.3f}")
            if checkpoint is not None and (trainer.step % config.save_every == 0 or trainer.step == len(batches)):
                trainer.save(Path(checkpoint))
    peft_model.eval()
    mark_trained(model)
    return peft_model, trainer.log


class _Adapter:
    """Optimiser, step counter and log of one `adapt` run."""

    def __init__(self, peft_model: nn.Module, config: AdaptationConfig) -> None:
        self.model, self.config = peft_model, config
        self.trainable = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
        router = [p for name, p in self.trainable.items() if ".router." in name]
        lora = [p for name, p in self.trainable.items() if ".router." not in name]
        groups = [{"params": lora, "lr": config.lr}, {"params": router, "lr": config.router_lr}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0
        self.log: list[dict[str, Any]] = []

    def train_step(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        dense = self.step % self.config.dense_every == self.config.dense_every - 1
        collector = KLCollector(self.config, self.generator)
        call = SparseCall(dense=dense, observer=collector)
        device = next(iter(self.trainable.values())).device
        inputs = {name: value.to(device) for name, value in batch.items()}
        task = self.model(**{"labels": inputs["input_ids"], **inputs}, use_cache=False, sparse_call=call).loss
        kl = collector.total().to(device)
        (task + self.config.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(self.trainable.values(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        kept = sum(k[0] for k in collector.kept) / max(1, len(collector.kept))
        self.log.append({"step": self.step, "dense": dense, "loss": float(task.detach()), "kl": float(kl.detach()), "kept_mass": kept})
        return self.log[-1]

    def save(self, path: Path) -> None:
        weights = {name: p.detach() for name, p in self.trainable.items()}
        state = {"weights": weights, "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(), "log": self.log}
        write_atomically(path, lambda temporary: torch.save({**state, "config": asdict(self.config)}, temporary))

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        if state["config"] != asdict(self.config) or state["weights"].keys() != self.trainable.keys():
            raise ValueError(f"{path} is a checkpoint of another model or of other settings: remove it or give another path")
        with torch.no_grad():
            for name, p in self.trainable.items():
                p.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.log, self.step = state["log"], len(state["log"])
