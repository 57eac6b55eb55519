"""Which fields of ``transformers.TrainingArguments`` settings may set: a list of what is allowed, so that a new field is not.

Left out is what belongs to settings of our own, reads or writes other files, loads what Trainer unpickles, or runs elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Number = float
ALLOWED: dict[str, Any] = {
    **dict.fromkeys(("lr_scheduler_type", "optim", "optim_args", "train_sampling_strategy", "torch_compile_mode"), str),
    **dict.fromkeys(("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps", "warmup_ratio"), Number),
    **dict.fromkeys(("label_smoothing_factor", "neftune_noise_alpha", "logging_steps", "num_train_epochs"), Number),
    **dict.fromkeys(("data_seed", "save_total_limit", "torch_empty_cache_steps", "ddp_bucket_cap_mb", "ddp_timeout"), int),
    **dict.fromkeys(("dataloader_num_workers", "dataloader_prefetch_factor"), int),
    **dict.fromkeys(("dataloader_pin_memory", "dataloader_drop_last", "dataloader_persistent_workers", "dataloader_in_order"), bool),
    **dict.fromkeys(("bf16", "fp16", "tf32", "torch_compile", "use_liger_kernel", "use_cpu", "full_determinism"), bool),
    **dict.fromkeys(("logging_first_step", "logging_nan_inf_filter", "include_num_input_tokens_seen", "skip_memory_metrics"), bool),
    **dict.fromkeys(("average_tokens_across_devices", "save_only_model", "ignore_data_skip"), bool),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_static_graph"), bool),
    "lr_scheduler_kwargs": dict[str, float | int | bool | str],
}
NETWORK: dict[str, Any] = {  # sends what is trained, or what is known of it, to other machines; a token is never read from settings
    **dict.fromkeys(("push_to_hub", "hub_private_repo", "hub_always_push"), bool),
    **dict.fromkeys(("hub_model_id", "hub_strategy", "hub_revision", "run_name", "project"), str),
    "report_to": list[str] | str,
}
FROM_SCRATCH: dict[str, Any] = {  # where a recipe trains a model with these arguments alone
    **dict.fromkeys(("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "save_steps"), int),
    **dict.fromkeys(("learning_rate", "max_grad_norm"), Number),
    "disable_tqdm": bool,
}


def check_arguments(names: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a field of TrainingArguments that settings may not set."""
    unknown = sorted(set(map(str, names)) - {*ALLOWED, *NETWORK})
    if unknown:
        raise ValueError(f"{where} names {', '.join(unknown)}: allowed are {', '.join(sorted(ALLOWED))}")
