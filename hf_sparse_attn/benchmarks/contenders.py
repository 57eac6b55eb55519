"""What a training benchmark compares: the same model with the same LoRA start, attending sparsely, densely
or as stock.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.convert import sparse_attention_as, to_dense
from ..training.chunked_loss import chunk_loss
from ..training.config import AdaptationConfig
from ..training.lora import add_lora
from ..training.objective import SparseObjective
from .timing import BenchmarkError

SPARSE, WITHOUT_KL, DENSE, STOCK, EAGER = "sparse", "sparse without KL", "dense step", "stock sdpa", "stock eager"
VERIFY_TOKENS = 512  # of the step that is verified
PROBE_STD = 0.02  # of the LoRA weights while gradients are verified: PEFT starts one of the two factors at zero
# allowed relative deviations from stock, in the epsilon of the model's dtype
LOSS_EPSILONS, GRADIENT_EPSILONS = 1.0, 16.0


class Contender:
    """A model in training with its optimiser; `step` is forward, backward and optimiser step."""

    def __init__(self, name: str, model: Any, config: AdaptationConfig, objective: SparseObjective | None) -> None:
        self.name, self.model, self.objective = name, model, objective
        if config.gradient_checkpointing and getattr(model, "supports_gradient_checkpointing", False):
            checkpoint_activations(model)
        if config.chunked_loss:
            chunk_loss(model)
        model.train()
        groups = [{"params": self.trainable}] if objective is None else objective.parameter_groups(config.lr)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.0)
        self.losses: list[Tensor] = []  # task losses of the steps, without the KL; scalars

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def lora(self) -> dict[str, nn.Parameter]:
        """The LoRA weights by name."""
        return {name: p for name, p in self.model.named_parameters() if ".lora_" in name}

    def loss(self, batch: Mapping[str, Tensor], step: int = 0) -> tuple[Tensor, Tensor]:
        """(task loss, that plus the KL where the routers learn) of a batch."""
        if self.objective is None:
            task: Tensor = self.model(**batch, use_cache=False).loss
            return task, task
        # of so many steps that all that is annealed stays at its start
        forward = self.objective.forward(step, 1 << 20)
        task = self.model(**batch, use_cache=False, sparse_call=forward).loss
        return task, task + forward.kl_loss().to(task)

    def step(self, batch: Mapping[str, Tensor]) -> None:
        """One training step on ``batch``; its task loss is appended to ``losses``."""
        task, loss = self.loss(batch, len(self.losses))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(task.detach())

    def allocate_states(self) -> None:
        """Make the optimiser's states as a first step of zero gradients would, so that no measured step
        pays for them.
        """
        for p in self.trainable:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # AdamW corrects by the number of steps: the first measured one must count as the first
        for state in self.optimizer.state.values():
            state["step"].zero_()

    @property
    def static_bytes(self) -> int:
        """Bytes that exist between steps: weights, shared ones included, and the optimiser's states (without its step
        counters).
        """
        states = [t for state in self.optimizer.state.values() for t in state.values() if t.ndim]
        # by id: a weight that several modules share counts once
        return sum(
            t.nbytes for t in {id(t): t for t in (*self.model.parameters(), *self.model.buffers(), *states)}.values()
        )


def checkpoint_activations(model: Any) -> None:
    """Turn gradient checkpointing on, as Trainer does."""
    # the latter before 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def make_contenders(model: PreTrainedModel, config: AdaptationConfig, names: tuple[str, ...]) -> dict[str, Contender]:
    """Contenders of these names for a sparse ``model``, whose frozen weights they share; their LoRA weights start
    equal.

    The stock ones are the stock class with plain PEFT LoRA on the same modules.
    """
    contenders: dict[str, Contender] = {}
    for name in names:
        # deepcopy takes what its memo holds as it is: weights are shared, only the modules are copies
        shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        twin = copy.deepcopy(model, shared)
        contenders[name] = _stock(name, twin, config) if name in (STOCK, EAGER) else _sparse(name, twin, config)
        # PEFT draws them at random: with one start the losses can be compared
        with torch.no_grad():
            for key, first in contenders[names[0]].lora.items():
                contenders[name].lora[key].copy_(first)
        contenders[name].allocate_states()
    return contenders


def _stock(name: str, model: PreTrainedModel, config: AdaptationConfig) -> Contender:
    stock = to_dense(model)
    stock.set_attn_implementation("eager" if name == EAGER else "sdpa")
    return Contender(name, plain_lora(stock, config), config, None)


def plain_lora(model: PreTrainedModel, config: AdaptationConfig) -> Any:
    """A PeftModel of a stock ``model``, with the LoRA of ``config``."""
    from peft import LoraConfig, get_peft_model  # heavy

    options: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": list(config.target_modules),
    }
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))


def _sparse(name: str, model: PreTrainedModel, config: AdaptationConfig) -> Contender:
    changes: dict[str, Any] = {"dense_every": 1 if name == DENSE else 0}
    if name == WITHOUT_KL:
        changes["kl_weight"] = 0.0
    config = replace(config, **changes)
    adapted = add_lora(model, config)
    return Contender(name, adapted, config, SparseObjective(adapted, config))


# |loss − stock| / |stock| and ‖g − g_stock‖ / ‖g_stock‖, g all LoRA gradients side by side
def verify_training(sparse: Contender, stock: Contender, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative deviations from stock with every block kept, of the loss and of the LoRA gradients as one vector.

    Raises:
        BenchmarkError: a deviation is more than rounding explains.
    """
    short = {name: x[:, :VERIFY_TOKENS] for name, x in batch.items()}
    base = sparse.model.get_base_model()
    results = []
    # a budget beyond every length keeps all blocks; with dense_below the stock path would be compared with itself
    with sparse_attention_as(
        base, min_keys=max(VERIFY_TOKENS, 1 << 14), max_keys=None, mass_threshold=None, dense_below=0
    ):
        results.append(_probe(sparse, short))
    results.append(_probe(stock, short))
    (loss, gradient), (want, exact) = results
    eps = torch.finfo(base.dtype).eps
    errors = {"loss": abs(loss - want) / abs(want), "gradient": float((gradient - exact).norm() / exact.norm())}
    # the floor is for float32: sums in another order differ by more than its epsilon
    for name, allowed in (("loss", LOSS_EPSILONS * max(eps, 1e-6)), ("gradient", GRADIENT_EPSILONS * max(eps, 1e-6))):
        if not errors[name] <= allowed:
            what = "the loss differs" if name == "loss" else "the LoRA gradients differ"
            raise BenchmarkError(
                f"with every block kept {what} from the stock model's by {errors[name]:.3g} relative (allowed "
                f"{allowed:.3g})"
            )
    return errors


def _probe(contender: Contender, batch: Mapping[str, Tensor]) -> tuple[float, Tensor]:
    """(loss, all LoRA gradients in float64) with random LoRA weights, the same for every contender."""
    with _random_lora(contender):
        loss, _ = contender.loss(batch)
        grads = torch.autograd.grad(loss, list(contender.lora.values()))
        return float(loss.detach()), torch.cat([g.double().flatten() for g in grads])


@contextmanager
def _random_lora(contender: Contender) -> Iterator[None]:
    before = {name: p.detach().clone() for name, p in contender.lora.items()}
    generator = torch.Generator(device="cpu").manual_seed(0)
    try:
        with torch.no_grad():
            for p in contender.lora.values():
                p.add_(
                    torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu").to(p), alpha=PROBE_STD
                )
        yield
    finally:
        with torch.no_grad():
            for name, p in contender.lora.items():
                p.copy_(before[name])
