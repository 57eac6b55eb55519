"""Settings of both stages of training: distillation, the joint stage, LoRA;
which fields of TrainingArguments they may set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any

from ..config import BUDGET_FIELDS, FIXED_FIELDS, SparseAttentionConfig

ANNEALED = ("kl_weight", "density", "min_keys", "max_keys", "candidate_factor", "query_samples")

# Which fields of ``transformers.TrainingArguments`` settings may set: a list of what is allowed, so that a new field is
# not.
# Left out is what belongs to settings of our own, reads or writes other files, loads what Trainer unpickles, or runs
# elsewhere.
Number = float
ALLOWED: dict[str, Any] = {
    **dict.fromkeys(("lr_scheduler_type", "optim", "optim_args", "train_sampling_strategy", "torch_compile_mode"), str),
    **dict.fromkeys(
        ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps", "warmup_ratio"), Number
    ),
    **dict.fromkeys(("label_smoothing_factor", "neftune_noise_alpha", "logging_steps", "num_train_epochs"), Number),
    **dict.fromkeys(
        ("data_seed", "save_total_limit", "torch_empty_cache_steps", "ddp_bucket_cap_mb", "ddp_timeout"), int
    ),
    **dict.fromkeys(("dataloader_num_workers", "dataloader_prefetch_factor"), int),
    **dict.fromkeys(
        ("dataloader_pin_memory", "dataloader_drop_last", "dataloader_persistent_workers", "dataloader_in_order"), bool
    ),
    **dict.fromkeys(("bf16", "fp16", "tf32", "torch_compile", "use_liger_kernel", "use_cpu", "full_determinism"), bool),
    **dict.fromkeys(
        ("logging_first_step", "logging_nan_inf_filter", "include_num_input_tokens_seen", "skip_memory_metrics"), bool
    ),
    **dict.fromkeys(("average_tokens_across_devices", "save_only_model", "ignore_data_skip"), bool),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_static_graph"), bool),
    "lr_scheduler_kwargs": dict[str, float | int | bool | str],
}
# sends what is trained, or what is known of it, to other machines; a token is never read from settings
NETWORK: dict[str, Any] = {
    **dict.fromkeys(("push_to_hub", "hub_private_repo", "hub_always_push"), bool),
    **dict.fromkeys(("hub_model_id", "hub_strategy", "hub_revision", "run_name", "project"), str),
    "report_to": list[str] | str,
}
FROM_SCRATCH: dict[str, Any] = {  # where a recipe trains a model with these arguments alone
    **dict.fromkeys(("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "save_steps"), int),
    **dict.fromkeys(("learning_rate", "max_grad_norm"), Number),
    "disable_tqdm": bool,
}
# fields of TrainingArguments that follow from settings under names of their own
OWN_ARGUMENTS = {
    *(
        "output_dir",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "max_grad_norm",
    ),
    *("activation_checkpointing", "gradient_checkpointing", "save_steps", "save_strategy", "seed", "disable_tqdm"),
}


@dataclass(frozen=True)
class DistillationConfig:
    """Settings of `distill`. A batch is one dense forward pass.

    Raises:
        ValueError: a field has an impossible value.
    """

    lr: float = 1e-3  # of stage 1; AdamW, no weight decay
    index_lr: float = 2e-4  # of stage 2, whose start is good
    warmup_steps: int = 20  # optimiser steps of linear warm-up; then cosine to a tenth over the rest
    steps_per_batch: int = 4  # optimiser steps on each forward pass
    tiles_per_step: int = 4  # query tiles of each row in a step on tiles
    queries_per_step: int = 48  # single queries of each row in a step on tiles of 1
    seed: int = 0
    # batches between checkpoints, if a checkpoint path is given; sooner where these take more than a minute
    save_every: int = 4
    # windows, the last ones, in which retrieval heads are looked for at the end; 0 = they are not
    retrieval_windows: int = 3
    target: InitVar[str] = "mass"  # settings that an older version saved name it, see `without_target`

    def __post_init__(self, target: str) -> None:
        without_target({"target": target}, "distillation")
        for name in ("steps_per_batch", "tiles_per_step", "queries_per_step", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"distillation.{name} is {getattr(self, name)!r}: must be >= 1")
        if self.retrieval_windows < 0:
            raise ValueError(f"distillation.retrieval_windows is {self.retrieval_windows!r}: must be >= 0")
        if not (self.lr > 0 and self.index_lr > 0 and self.warmup_steps >= 0):
            values = f"lr {self.lr!r}, index_lr {self.index_lr!r}, warmup_steps {self.warmup_steps!r}"
            raise ValueError(f"distillation has {values}: learning rates must be > 0, warmup_steps >= 0")


@dataclass(frozen=True)
class SparseTrainingConfig:
    """Settings of the joint stage, beside those of the task.

    Raises:
        ValueError: a field has an impossible value; the message names it as ``lora.<field>``, its place in a recipe.
    """

    router_lr: float = 2e-4  # of the routers; a tenth of distillation's order
    kl_weight: float = 0.1  # 0 = the routers stay as they are, and no KL is computed
    kl_tile_share: int = 16  # the KL is computed on one query tile in this many
    # every this-many-th step runs dense, so that gradients reach links that would be cut; 0 = none, 1 = all
    dense_every: int = 4
    anneal: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # e.g. {"density": [1.0, 0.125]}: from, to
    anneal_share: float = 0.5  # the share of all steps after which annealing is done
    seed: int = 0

    def __post_init__(self) -> None:
        # the class is frozen, and a recipe's YAML gives lists
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
            if (
                name not in ANNEALED
                or len(ends) != 2
                or not all(isinstance(end, int | float) and math.isfinite(end) for end in ends)
            ):
                self._refuse("anneal", f"pairs [from, to] of finite numbers for any of {', '.join(ANNEALED)}")
            if name == "kl_weight" and min(ends) <= 0:
                self._refuse("anneal", "above 0 for kl_weight: without a KL the routers are frozen from the start")

    def _refuse(self, name: str, allowed: str) -> None:
        raise ValueError(f"lora.{name} is {getattr(self, name)!r}: must be {allowed}")

    def is_dense(self, step: int) -> bool:
        """Whether optimiser step ``step`` (from 0) runs dense."""
        return self.dense_every > 0 and step % self.dense_every == self.dense_every - 1

    # value(step) = start + (end − start) · min(1, step / last), last = ⌈anneal_share · steps⌉ − 1
    def annealed(self, step: int, steps: int) -> dict[str, float]:
        """Values at optimiser step ``step`` of ``steps``: linear from the first to the second end, then constant."""
        last = max(1, math.ceil(self.anneal_share * steps) - 1)
        done = min(1.0, step / last)
        # the end itself at last: in floats start + (end − start) may miss it
        return {name: end if done == 1 else start + (end - start) * done for name, (start, end) in self.anneal.items()}

    def budget(self, config: SparseAttentionConfig, step: int, steps: int) -> dict[str, Any]:
        """Changes of the model's settings at that step; whole keys where a field counts keys.

        Raises:
            ValueError: an annealed value is impossible for this model, or its ``mass_threshold`` was fitted for another
                budget.
        """
        values = {name: value for name, value in self.annealed(step, steps).items() if name != "kl_weight"}
        whole = {
            name: value if name in ("density", "candidate_factor") else round(value) for name, value in values.items()
        }
        assert not set(whole) & set(FIXED_FIELDS)
        moved = sorted({*whole} & {*BUDGET_FIELDS})
        if moved and config.mass_threshold is not None:
            raise ValueError(
                f"lora.anneal moves {', '.join(moved)}, but sparse_attention.mass_threshold={config.mass_threshold} "
                "was fitted for one "
                "budget: set mass_threshold to None for the training, and fit it anew with "
                "hf_sparse_attn.fit_mass_threshold afterwards"
            )
        # for its checks alone: it raises where the model cannot have a value
        config.changed(**whole)
        return whole


@dataclass(frozen=True)
class AdaptationConfig(SparseTrainingConfig):
    """Settings of `adapt`: those of the joint stage, of LoRA, and of the optimiser.

    Raises:
        ValueError: a field has an impossible value.
    """

    rank: int = 8  # of LoRA
    alpha: int = 16  # of LoRA
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    lr: float = 2e-4  # of LoRA; AdamW
    batch_size: int = 1  # rows of a micro-batch on each device
    accumulation: int = 1  # micro-batches of an optimiser step
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = True  # where the model supports it
    offload_activations: bool = False  # what checkpointing keeps waits in the CPU's memory; GPUs only
    chunked_loss: bool = True  # causal models: the logits of all tokens never exist
    save_every: int = 2  # optimiser steps between checkpoints, if a folder is given
    # further fields of TrainingArguments, see `ALLOWED`
    training_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for name in ("rank", "alpha", "lr", "batch_size", "accumulation", "max_grad_norm", "save_every"):
            if not getattr(self, name) > 0:
                self._refuse(name, "> 0")
        taken = sorted(set(self.training_arguments) & OWN_ARGUMENTS)
        if taken:
            raise ValueError(f"lora.training_arguments names {', '.join(taken)}: set the recipe's own fields instead")
        check_arguments(self.training_arguments, "lora.training_arguments")


def without_target(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings of a distillation without ``target``, which older versions knew.

    Raises:
        ValueError: the target was another one than the mass, which is the only one that is left.
    """
    if settings.get("target", "mass") != "mass":
        raise ValueError(
            f"{where}.target is {settings['target']!r}: routers learn the block mass of dense attention ('mass') "
            "only, the targets "
            "'max' and 'output' were removed (they gained nothing): leave target out"
        )
    return {name: value for name, value in settings.items() if name != "target"}


def check_arguments(names: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a field of TrainingArguments that settings may not set."""
    unknown = sorted(set(map(str, names)) - {*ALLOWED, *NETWORK})
    if unknown:
        raise ValueError(f"{where} names {', '.join(unknown)}: allowed are {', '.join(sorted(ALLOWED))}")
