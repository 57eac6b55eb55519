"""A run's size from the rates of its machine: what a recipe's steps will take, and what is left out so that it ends in
time.
"""

# letters: H query heads, D head dim, N tokens

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..benchmarks.planner.attention_cost import AttentionShape, LayerWork, layer_work
from ..benchmarks.planner.cpu_rates import TAUGHT_SHARE, heads_of, measure_cpu
from ..benchmarks.planner.devices import Device
from ..benchmarks.planner.plan import plan_training
from ..config import SparseAttentionConfig, fixed_budget
from .recipe import Quality, Recipe

OTHER_SECONDS = 30.0  # loading, saving, the answer
MARGIN = 1.2  # what else runs on a machine, and what no formula counts
CORE_SELECTIONS = ("oracle", "two stages", "window + sink")  # what the shares are made of
LEAST_SPEED, USUAL_SPEED = 4096, 8192  # tokens of the prefill that is timed
LEAST_BATCHES = 4


@dataclass(frozen=True)
class Work:
    """A model's work by length on a device whose rates were measured."""

    config: PreTrainedConfig
    parameters: int
    sparse: SparseAttentionConfig
    device: Device
    dtype: torch.dtype
    joint_seconds: float  # of a micro-batch of the joint stage

    # products + 2 · H · D · N² a layer: N² / 2 pairs with 4 · H · D operations each
    def dense(self, length: int) -> float:
        """Seconds of a dense forward pass without logits."""
        heads, _, dim = heads_of(self.config)
        return self._products(length) + 2 * heads * dim * self._layers * length**2 / self.device.attention[0]

    # products + layers · (4 · H · D · kept pairs + both stages of the router), each part at its own rate
    def routed(self, length: int, keys: int) -> float:
        """Seconds of a sparse forward pass without logits at a budget of ``keys``."""
        heads, _, dim = heads_of(self.config)
        work = self._work(length, self.sparse.changed(**fixed_budget(keys)))
        pairs = 4 * heads * dim * work.kept_pairs
        return self._products(length) + self._layers * (
            pairs / self.device.sparse_attention[0] + work.routing / self.device.routing
        )

    def taught(self, length: int) -> float:
        """Seconds of one optimiser step of the distillation in every layer."""
        return self._layers * self._work(length, self.sparse).teaching / self.device.teaching

    def logits(self, tokens: int) -> float:
        text = self.config.get_text_config()
        return float(2 * tokens * text.vocab_size * text.hidden_size / self.device.products[self.dtype])

    @property
    def _layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    def _products(self, length: int) -> float:
        text = self.config.get_text_config()
        # neither the embedding nor the head multiplies anything in a pass without logits
        embedded = text.vocab_size * text.hidden_size * (1 if getattr(text, "tie_word_embeddings", False) else 2)
        # two operations a weight and token
        return float(2 * max(0, self.parameters - embedded) * length / self.device.products[self.dtype])

    def _work(self, length: int, sparse: SparseAttentionConfig) -> LayerWork:
        return layer_work(sparse, AttentionShape(1, *heads_of(self.config)), length, TAUGHT_SHARE, self.dtype.itemsize)


def measured_work(config: PreTrainedConfig, parameters: int, recipe: Recipe, dtype: torch.dtype) -> Work:
    """The model's work here; its rates take some two seconds to measure.
    Raises ValueError for a model that cannot be planned.
    """
    device, adaptation = measure_cpu(config, dtype, recipe.adaptation), recipe.adaptation
    joint = 0.0
    if recipe.lora["steps"]:
        options: dict[str, Any] = {
            "batch": adaptation.batch_size,
            "dtype": dtype,
            "sparse_attention": recipe.sparse_attention,
        }
        joint = plan_training(config, device, recipe.lora["context"], training=adaptation, **options).seconds
    return Work(config, parameters, recipe.sparse_attention, device, dtype, joint)


def seconds(recipe: Recipe, work: Work) -> dict[str, float]:
    """Predicted seconds of each step, without margin."""
    distill, speed = recipe.distill, recipe.speed
    # each window: one dense pass, then its steps
    window = work.dense(distill["context"]) + recipe.distillation.steps_per_batch * work.taught(distill["context"])
    steps = {
        "distill": distill["batches"] * window,
        "lora": _joint(recipe, work),
        "quality": sum(_read(e, work) for e in recipe.quality),
    }
    if speed["length"]:
        # what a layer takes of a dense pass
        layer = (work.dense(speed["length"]) - work.dense(0)) / max(1, work.config.get_text_config().num_hidden_layers)
        passes = speed["repeats"] * (work.dense(speed["length"]) + work.routed(speed["length"], speed["keys"]))
        steps["speed"] = 1.1 * passes + (speed["attention_repeats"] + 2) * layer
    return {**steps, "other": OTHER_SECONDS}


def _joint(recipe: Recipe, work: Work) -> float:
    settings = recipe.lora
    if not settings["steps"]:
        return 0.0
    # dense LoRA on the same rows is a second training
    micro_batches = (2 if recipe.compare["dense_lora"] else 1) * settings["steps"] * recipe.adaptation.accumulation
    # read before and after
    return float(micro_batches * work.joint_seconds + 2 * work.routed(settings["context"], work.sparse.min_keys))


def _read(entry: Quality, work: Work) -> float:
    """Every window densely, then under every selection at every budget; the oracle looks at all pairs."""
    n = entry.length
    passes = [work.routed(n, keys) + work.logits(n // 2) for keys in entry.budgets for _ in entry.selections]
    # the dense pass and every selection are decoded
    decoded = (1 + len(passes)) * (work.logits(entry.decode_tokens) + work.dense(entry.decode_tokens))
    dense = (1 + len(entry.budgets)) * (work.dense(n) + work.logits(n))
    return entry.windows * (dense + sum(passes) + decoded)


def fitted(recipe: Recipe, work: Work, minutes: float) -> tuple[Recipe, list[str], dict[str, float]]:
    """(the recipe at a size that ends within ``minutes``, what that left out, predicted seconds by step).

    A recipe that fits is left as it is. One that does not fit at its least size is given back at that.
    """
    left_out: dict[str, str] = {}
    predicted = seconds(recipe, work)
    for kind, smaller, what in _smaller(recipe):
        if MARGIN * sum(predicted.values()) <= 60 * minutes:
            break
        recipe = smaller(recipe)
        left_out[kind] = what  # what is made smaller twice is named once
        predicted = seconds(recipe, work)
    return recipe, list(left_out.values()), predicted


def _smaller(recipe: Recipe) -> Iterator[tuple[str, Any, str]]:
    """What can be left out, least missed first: (kind, a change of the recipe, what of the whole it leaves out in
    words).
    """
    speed, batches, steps, (first, *others) = (
        recipe.speed["length"],
        recipe.distill["batches"],
        recipe.lora["steps"],
        recipe.quality,
    )
    if speed > USUAL_SPEED:
        yield "speed", _with("speed", length=USUAL_SPEED), f"speed at {USUAL_SPEED} tokens in place of {speed}"
    if others:
        yield (
            "lengths",
            lambda r: replace(r, quality=r.quality[:1]),
            f"quality at {', '.join(str(entry.length) for entry in others)} tokens",
        )
    if extra := [name for name in first.selections if name not in CORE_SELECTIONS]:
        yield "selections", _with_quality(selections=CORE_SELECTIONS), f"the selections {', '.join(extra)}"
    if batches > LEAST_BATCHES:
        fewer = max(LEAST_BATCHES, 2 * batches // 3)
        yield "distill", _with("distill", batches=fewer), f"{batches - fewer} of {batches} windows of distilling"
    if speed > LEAST_SPEED:
        yield "speed", _with("speed", length=LEAST_SPEED), f"speed at {LEAST_SPEED} tokens in place of {speed}"
    if first.windows > 1:
        yield (
            "windows",
            _with_quality(windows=1),
            f"{first.windows - 1} of {first.windows} windows of {first.length} tokens of quality",
        )
    if batches > LEAST_BATCHES:
        yield (
            "distill",
            _with("distill", batches=LEAST_BATCHES),
            f"{batches - LEAST_BATCHES} of {batches} windows of distilling",
        )
    if steps > 1:
        yield "lora", _with("lora", steps=steps // 2), f"{steps - steps // 2} of {steps} LoRA steps"
    if len(first.budgets) > 1:
        yield (
            "budgets",
            _with_quality(budgets=first.budgets[-1:]),
            f"quality at {', '.join(map(str, first.budgets[:-1]))} keys",
        )
    if speed:
        yield "speed", _with("speed", length=0), "speed"


def _with(section: str, **values: Any) -> Any:
    return lambda recipe: replace(recipe, **{section: {**getattr(recipe, section), **values}})


def _with_quality(**values: Any) -> Any:
    return lambda recipe: replace(recipe, quality=tuple(replace(entry, **values) for entry in recipe.quality))


def size_of(recipe: Recipe) -> dict[str, Any]:
    """What `fitted` may change, as JSON."""
    quality = [
        {"length": e.length, "windows": e.windows, "budgets": e.budgets, "selections": e.selections}
        for e in recipe.quality
    ]
    return {
        "distill": recipe.distill["batches"],
        "lora": recipe.lora["steps"],
        "speed": recipe.speed["length"],
        "quality": quality,
    }


def at_size(recipe: Recipe, size: dict[str, Any]) -> Recipe:
    """The recipe at a size that `size_of` gave, so that a continued run goes on with the size it began with."""
    # a size may hold fewer lengths than the recipe
    quality = tuple(replace(entry, **changes) for entry, changes in zip(recipe.quality, size["quality"], strict=False))
    for section, key, value in (
        ("distill", "batches", "distill"),
        ("lora", "steps", "lora"),
        ("speed", "length", "speed"),
    ):
        recipe = _with(section, **{key: size[value]})(recipe)
    return replace(recipe, quality=quality)
