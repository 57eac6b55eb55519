"""A small Llama made for a vocabulary of logs, to be trained from scratch on a CPU, and the stages of its training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..representation.log_vocabulary import KEY, LogVocabulary

PAD, UNKNOWN = 0, 1
STEP_TOKENS = 4096
# Base of the rotary frequencies by the longest rows: with a smaller one too few of a small head's pairs keep their
# phase over that many tokens to tell keys apart (measured on links over 2048 to 16384 tokens)
ROPE_THETA = ((8192, 1e7), (math.inf, 1e8))


@dataclass(frozen=True)
class Stage:
    """Training on pieces of rows of one length."""

    length: int
    batch: int
    steps: int


@dataclass(frozen=True)
class SmallModelConfig:
    """The model, and how it is trained: on pieces of rows that grow longer, so that near links are learnt first.

    Attributes:
        layers, hidden, heads, groups: of the Llama; ``groups`` are KV heads.
        lr: largest learning rate of AdamW; a small model bears large steps.
        stages: in their order; the last one's length is the longest context that is learnt.
        seed: of weights and pieces.
    """

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    groups: int = 2
    lr: float = 3e-3
    stages: tuple[Stage, ...] = (Stage(128, 32, 250), Stage(512, 8, 100), Stage(1024, 4, 100), Stage(2048, 4, 200))
    seed: int = 0

    @classmethod
    def up_to(cls, length: int, seed: int = 0) -> SmallModelConfig:
        """Stages of 128, 512, 1024 … tokens up to ``length``."""
        lengths = [512 << i for i in range(max(1, math.ceil(math.log2(length / 512)))) if 512 << i < length]
        middle = [Stage(size, max(1, STEP_TOKENS // size), 100) for size in lengths]
        return cls(
            stages=(
                Stage(min(128, length), 32, 250),
                *middle,
                Stage(length, max(1, 2 * STEP_TOKENS // length), 200),
            ),
            seed=seed,
        )

    @property
    def longest(self) -> int:
        return max(stage.length for stage in self.stages)

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage of optimiser step ``step``, from 0."""
        ends = np.cumsum([stage.steps for stage in self.stages])
        return self.stages[int(np.searchsorted(ends, step, side="right"))]


def vocabulary_tokenizer(vocabulary: LogVocabulary) -> PreTrainedTokenizerBase:
    """A tokenizer with the tokens of the vocabulary, padding and an unknown token, for template mode alone."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"<pad>": PAD, "<unk>": UNKNOWN}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    vocabulary.add_to(tokenizer)
    return tokenizer


def new_model(tokens: int, config: SmallModelConfig, vocabulary: LogVocabulary | None = None) -> PreTrainedModel:
    """A dense Llama with random weights, the same for the same seed, over ``tokens`` ids.

    With ``vocabulary`` its config names it, as that of an extended model does.
    """
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokens,
            hidden_size=config.hidden,
            intermediate_size=2 * config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.groups,
            max_position_embeddings=config.longest,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": next(theta for length, theta in ROPE_THETA if config.longest <= length),
            },
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    if vocabulary is not None:
        setattr(model.config, KEY, {"digest": vocabulary.digest, "tokens": len(vocabulary)})
    return model
