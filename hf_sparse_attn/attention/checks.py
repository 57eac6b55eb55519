"""What one call of the attention may ask for, checked where Transformers calls it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ATTN_IMPLEMENTATION, KEY
from ..router.module import SparseRouter


def refuse_without_router(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise ValueError unless ``module`` is a layer of a sparse model that keeps its own, local attention."""
    config = getattr(module, "config", None)
    if getattr(config, KEY, None) is None or kwargs.get("sliding_window") is None:
        name = getattr(config, "_name_or_path", "")
        loaded = f" of the model loaded from {name!r}" if name else ""
        raise ValueError(
            f'attn_implementation="{ATTN_IMPLEMENTATION}" needs a model with routers, and '
            f"{type(module).__name__}{loaded} has none: "
            "load it with from_pretrained(..., sparse_attention={...}) or convert it with "
            "hf_sparse_attn.sparsify(model, {...}). "
            "If it is the reference model of a TRL trainer, which loads the folder that the trained model once came "
            "from: put "
            "SparseTrainerMixin in front of the trainer, pass ref_model=copy.deepcopy(model), or save the sparse "
            "model and train the "
            "one loaded from there"
        )


def check_call(
    router: SparseRouter,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    kwargs: dict[str, Any],
) -> None:
    """Raise ValueError that says what sparse attention cannot give of what a call asks for."""
    name = type(module).__name__
    if dropout:
        raise ValueError(
            f"sparse attention has no attention dropout, got {dropout} from {name}: load the model with "
            "attention_dropout=0.0 "
            "(Bert: attention_probs_dropout_prob=0.0), or set it on the config and the attention modules"
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            "sparse attention never forms the attention matrix, so output_attentions=True cannot be answered: "
            'use model.set_attn_implementation("eager") for that call'
        )
    for argument in ("position_bias", "sliding_window", "cache"):
        if kwargs.get(argument) is not None:
            raise ValueError(
                f"sparse attention does not support {argument} (asked for by {name}); supported: attention over the "
                "whole past or "
                'document, with soft cap and sinks. Run dense with model.set_attn_implementation("sdpa")'
            )
    position_ids = kwargs.get("position_ids")
    if position_ids is not None and position_ids.ndim != 2:
        raise ValueError(
            f"sparse attention supports position_ids [batch, queries], got {tuple(position_ids.shape)} ({name})"
        )
    want = (router.heads, router.groups, router.head_dim, router.head_dim)
    got = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
    if got != want:
        raise ValueError(
            f"the router of {name} was made for (query heads, KV heads, key dim, value dim) = {want}, but the call "
            f"has {got}: "
            "tensor parallelism and other head layouts are not supported"
        )


EXPORT = (
    "sparse attention cannot be exported (torch.export, torch.onnx.export, torch.jit, ExecuTorch, AOTInductor): which "
    "keys a layer reads "
    "is decided by code and state that live in this process, and the program would run with another model's routers, "
    "or none. Export the "
    'dense model: hf_sparse_attn.to_dense(model) or model.set_attn_implementation("sdpa") before it. To run this one '
    "faster, torch.compile"
)


def refuse_export() -> None:
    """Raise ValueError where the call is being written down as a program for elsewhere:
    `torch.compile` runs here, and may.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise ValueError(EXPORT)


def refuse_split_sequences() -> None:
    """Raise ValueError if Accelerate splits sequences over processes, as its state says."""
    # read without an import: a process that never imported Accelerate splits nothing
    state = sys.modules.get("accelerate.state")
    config = None if state is None else state.AcceleratorState._shared_state.get("parallelism_config")
    for field, kind in (("cp_size", "context parallelism"), ("sp_size", "sequence parallelism")):
        size = getattr(config, field, None) or 1
        if size > 1:
            raise ValueError(
                f"{kind} ({field}={size}) is not supported: each process would route by its own part of the keys "
                f"only. Leave {field} at 1 "
                "and shard the model instead (FSDP2, ZeRO-3), with activation checkpointing and chunk_loss for long "
                "sequences; "
                "recipes/accelerate/README.md has the design"
            )


def check_mask(mask: Tensor | None) -> None:
    """Raise ValueError unless ``mask`` is of a kind that sparse attention can read."""
    if mask is not None and mask.ndim not in (2, 4):
        raise ValueError(
            f"sparse attention got an attention mask {tuple(mask.shape)}; supported: None, a padding mask [batch, "
            "keys] or a 4D mask "
            '[batch, 1, queries, keys]. Pass one of these, or run dense with model.set_attn_implementation("sdpa")'
        )
