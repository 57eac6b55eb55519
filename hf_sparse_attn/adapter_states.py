"""Whether the adapters of a sparse model are in a state in which it can run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from .adapter_marks import holds_routers, settings_of
from .attention import SparseAttentionMixin
from .checks import ATTN_IMPLEMENTATION
from .config import SparseAttentionConfig
from .router import SparseRouter, active_router

if TYPE_CHECKING:
    from peft import PeftConfig


def check_adapters(model: Any, _args: Any) -> None:
    """Forward pre-hook of a sparse model with adapters.

    Raises:
        ValueError: an active adapter has no routers, or rows of the batch have adapters of their own.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    if layer is None or layer.disable_adapters:
        return
    refuse_without_routers(model, {name: model.peft_config[name] for name in layer.active_adapters if name in model.peft_config})
    router = next(module.router for module in model.modules() if isinstance(module, SparseAttentionMixin))  # type: ignore[attr-defined]
    mixed = any("adapter_names" in getattr(hook, "keywords", ()) for hook in router._forward_pre_hooks.values())  # PEFT's hook
    if mixed and model.config._attn_implementation == ATTN_IMPLEMENTATION:
        raise ValueError(
            "adapter_names was passed: sparse attention routes a whole batch by the active adapter's routers. Call the model once for each "
            'adapter, or run dense with model.set_attn_implementation("sdpa")'
        )


def active_routers(model: nn.Module) -> list[SparseRouter]:
    """The routers that run, by layer: those of the active adapter, if there is one."""
    return [active_router(site.router) for site in router_sites(model).values()]


def base_model(model: Any) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[no-any-return]


def router_sites(model: nn.Module) -> dict[str, Any]:
    """Attention layers with a router, by their name in the base model."""
    return {name: module for name, module in base_model(model).named_modules() if isinstance(module, SparseAttentionMixin)}


def refuse_misfits(model: Any, adapters: Mapping[str, PeftConfig]) -> None:
    """Raise ValueError if ``model`` runs sparse and an adapter has no routers, or routers for blocks of another size."""
    refuse_without_routers(model, adapters)
    size = active_routers(model)[0].config.block_size
    for name, config in adapters.items():
        settings = settings_of(config)
        trained_for = size if settings is None else settings.get("block_size", SparseAttentionConfig().block_size)
        if trained_for != size:
            raise ValueError(
                f"the routers of adapter {name!r} were trained for block_size {trained_for}, those of the model are for {size}: load the "
                f"base with sparse_attention={settings}"
            )


def refuse_without_routers(model: Any, adapters: Mapping[str, PeftConfig]) -> None:
    without = [name for name, config in adapters.items() if not (holds_routers(config) or config.is_prompt_learning)]
    if without and model.config._attn_implementation == ATTN_IMPLEMENTATION:
        raise ValueError(
            f"adapter {', '.join(map(repr, without))} has no routers, but {type(model).__name__} runs sparse attention: it belongs to a "
            "dense model, or was made without modules_to_save=['router']. Make it with hf_sparse_attn.lora_config(model, ...), or run the "
            'model dense, with hf_sparse_attn.to_dense(model) or model.set_attn_implementation("sdpa")'
        )
