"""The verb doctor: what is installed and used here."""

from __future__ import annotations

import os

from ..system.extras import extra_states, needs_extra
from .options import JsonOption, console, emit

with needs_extra("cli", "the command line"):
    from rich.markup import escape


def doctor(json_path: JsonOption = None) -> None:
    """What is installed, which extras are missing, which implementation and which dtype would be used, and why."""
    import torch
    from hf_sparse_attn_kernels import IMPLEMENTATIONS, default_choice
    from hf_sparse_attn_kernels.caching import cache_folder

    from ..architectures import supported_types
    from ..architectures.versions import SUPPORTED_TRANSFORMERS
    from ..models.self_test import run_self_test
    from ..system.environment import environment
    from ..system.precision import choice, linear_rates

    device = "cuda" if torch.cuda.is_available() else "cpu"
    implementation, why = default_choice(device)
    dtype = choice(device)
    result = {
        **environment(),
        "device": device,
        "dtype": str(dtype.dtype).removeprefix("torch."),
        "why_dtype": dtype.why,
        "linear_layer_gflops": {name: round(rate / 1e9, 1) for name, rate in linear_rates(device).items()},
        "implementation": implementation,
        "implementations": list(IMPLEMENTATIONS),
        "why": f"{why}; inputs that it does not support run on 'torch'",
        "supported_transformers": [str(v) for v in SUPPORTED_TRANSFORMERS],
        "self_test": run_self_test() or "passed",
        "model_types": supported_types(),
        "extras": extra_states(),
        "offline": os.environ.get("HF_HUB_OFFLINE", "0"),
        "cache": str(cache_folder()),
    }
    for key, value in result.items():
        console.print(f"[bold]{key}[/]: {escape(str(value))}", highlight=False)
    emit(result, json_path)
