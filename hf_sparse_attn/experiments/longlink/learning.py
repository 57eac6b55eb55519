"""A small model that learns LongLink from scratch, dense, on sequences that grow longer;
its routers are distilled afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ...config import SparseAttentionConfig
from ...models.convert import sparsify
from ...system.progress import bar
from ...training.config import DistillationConfig
from ...training.distillation import distill
from .families import LongLinkConfig
from .planting import plant

# a small model bears, and needs, large steps
DISTILLATION: dict[str, Any] = {"lr": 1e-2, "index_lr": 2e-3, "tiles_per_step": 32}
STEP_TOKENS = 4096
WARM_UP = 0.1  # of the steps
# by the longest sequence: at 1e5 too few of a head's pairs keep their phase over 8192 tokens to tell the keys apart
# (dense
# accuracy .58 there), at 1e7 too few over 16384 (.90)
ROPE_THETA = ((8192, 1e7), (math.inf, 1e8))
EVALUATED = 1 << 20  # seeds of sets for each seed of a training, which uses those from its own multiple on


@dataclass(frozen=True)
class Stage:
    """Training on sequences of one length."""

    length: int
    batch: int
    steps: int


@dataclass(frozen=True)
class LearningConfig:
    """The model, and how it is trained."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    groups: int = 2
    lr: float = 3e-3
    stages: tuple[Stage, ...] = (Stage(128, 32, 250), Stage(512, 8, 100), Stage(1024, 4, 100), Stage(2048, 4, 200))
    distilled: int = 200  # batches
    seed: int = 0

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies, by the longest sequences."""
        longest = max(stage.length for stage in self.stages)
        return next(theta for length, theta in ROPE_THETA if longest <= length)

    @classmethod
    def up_to(cls, length: int, seed: int = 0) -> LearningConfig:
        """Stages for sequences of ``length`` tokens: 128, 512, 1024 and on in doublings.

        A step has 4096 tokens, 8192 in the last stage, or one sequence.
        """
        # 1024, 2048 … below ``length``
        lengths = [512 << i for i in range(1, max(1, math.ceil(math.log2(length / 512))))]
        stages = [
            *(Stage(size, max(1, STEP_TOKENS // size), 100) for size in lengths),
            Stage(length, max(1, 2 * STEP_TOKENS // length), 200),
        ]
        return cls(stages=(Stage(128, 32, 250), Stage(512, 8, 100), *stages), seed=seed)


def learn(config: LongLinkConfig, learning: LearningConfig, *, progress: bool = True) -> PreTrainedModel:
    """A dense Llama that was trained on ``config``'s links, at the lengths of the stages;
    the last one should be ``config.length``.
    """
    torch.manual_seed(learning.seed)
    tokens = config.tokens.count
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokens,
            hidden_size=learning.hidden,
            intermediate_size=2 * learning.hidden,
            num_hidden_layers=learning.layers,
            num_attention_heads=learning.heads,
            num_key_value_heads=learning.groups,
            max_position_embeddings=max(stage.length for stage in learning.stages),
            rope_parameters={"rope_type": "default", "rope_theta": learning.rope_theta},
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    steps = sum(stage.steps for stage in learning.stages)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning.lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning.lr, total_steps=steps, pct_start=WARM_UP)
    with bar(progress) as shown:
        task = shown.add_task("learning LongLink", total=steps, info="")
        done = 0
        for stage in learning.stages:
            for _ in range(stage.steps):
                # a set of its own for every step
                loss = _step(model, _batch(config, stage, learning.seed * EVALUATED + done), optimizer)
                schedule.step()
                done += 1
                shown.update(task, completed=done, info=f"{stage.length} tokens, loss {loss:.3f}")
    trained: PreTrainedModel = model.eval()
    return trained


def _batch(config: LongLinkConfig, stage: Stage, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    # a short stage has distances and a start in proportion to its length
    first = min(config.first, stage.length // 4)
    short = min(config.min_distance, max(2, stage.length // 16))
    far = min(config.longest, stage.length - 2 - first)
    settings: dict[str, Any] = {
        "length": stage.length,
        "sequences": stage.batch,
        "min_distance": short,
        "max_distance": far,
        "first": first,
    }
    planted = plant(replace(config, **settings), seed)
    return torch.from_numpy(planted.input_ids), torch.from_numpy(planted.labels)


def _step(model: PreTrainedModel, batch: tuple[torch.Tensor, torch.Tensor], optimizer: torch.optim.Optimizer) -> float:
    ids, labels = batch
    # a hidden state predicts the next token
    hidden, target = model.base_model(ids, use_cache=False).last_hidden_state[:, :-1], labels[:, 1:]
    labelled = target >= 0
    # logits of the answers only, a small part of the tokens
    loss = F.cross_entropy(model.get_output_embeddings()(hidden[labelled]), target[labelled])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def with_routers(
    model: PreTrainedModel,
    sparse: SparseAttentionConfig,
    config: LongLinkConfig,
    learning: LearningConfig,
    *,
    progress: bool = True,
) -> PreTrainedModel:
    """The same model with routers distilled on sets of ``config``, in place."""
    sparsify(model, sparse)
    length = learning.stages[-1].length
    stage = Stage(length, max(1, STEP_TOKENS // length), learning.distilled)
    # seeds from the upper half of this training's range: sets that the model did not learn from
    sets = [_batch(config, stage, learning.seed * EVALUATED + EVALUATED // 2 + at)[0] for at in range(stage.steps)]
    distill(
        model,
        [{"input_ids": ids} for ids in sets],
        DistillationConfig(seed=learning.seed, **DISTILLATION),
        progress=progress,
    )
    return model
