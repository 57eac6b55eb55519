"""Whether the adapters of a sparse model are in a state in which it can run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..attention.interface import SparseAttentionMixin
from ..config import ATTN_IMPLEMENTATION, SparseAttentionConfig
from ..router.module import SparseRouter, active_router
from .adapter_settings import holds_routers, settings_of
from .attach import ROUTER
from .layer_numbers import number_layers

if TYPE_CHECKING:
    from peft import PeftConfig


def check_adapters(model: Any, _args: Any) -> None:
    """Forward pre-hook of a sparse model with adapters.

    Raises:
        ValueError: the model runs sparse, and an active adapter has no routers or other ones run, its scale was
            changed, or rows of the batch have adapters of their own.
    """
    if not runs_sparse(model):
        return
    layers, sites = _layers_and_sites(model)
    if not layers:
        return
    active = (
        {} if layers[0].disable_adapters else {name: model.peft_config.get(name) for name in layers[0].active_adapters}
    )
    refuse_without_routers(model, {name: config for name, config in active.items() if config is not None})
    # PEFT's wrapper of a router, in place of the router itself, once an adapter saves it
    wrappers = [site.router for site in sites if not isinstance(site.router, SparseRouter)]
    # for as long as a call has adapter_names, PEFT hangs a partial with them on each wrapper: one tells for all
    if any(
        "adapter_names" in getattr(hook, "keywords", ())
        for router in wrappers[:1]
        for hook in router._forward_pre_hooks.values()
    ):
        raise ValueError(
            "adapter_names was passed: sparse attention routes a whole batch by the active adapter's routers. Call "
            "the model once for each "
            'adapter, or run dense with model.set_attn_implementation("sdpa")'
        )
    running = _running(layers)
    _refuse_other_routers(running, wrappers)
    for layer in layers:
        refuse_scaled(layer, running)


def _layers_and_sites(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """PEFT's layers and the attention layers with a router, in one walk that leaves out what is inside them:
    it is made at every token.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = []
    sites: list[Any] = []
    # a walk of its own: Module.modules would also enter routers and what PEFT's layers hold, at every token
    left: list[Any] = [model]
    while left:
        module = left.pop()
        if isinstance(module, BaseTunerLayer):
            layers.append(module)
            left.append(layers[-1].base_layer)  # another one in a mixed model
            continue
        routed = isinstance(module, SparseAttentionMixin)
        if routed:
            sites.append(module)
        left += [
            child
            for name, child in reversed(module._modules.items())
            if child is not None and not (routed and name == ROUTER)
        ]
    return layers, sites


def _running(layers: list[Any]) -> set[str]:
    """The adapters that change the output of one of PEFT's ``layers``."""
    running: set[str] = set()
    for layer in layers:
        if not layer.disable_adapters:
            # merged adapters run whatever is active: their weights are in the base layer's
            new = [name for name in layer.merged_adapters or layer.active_adapters if name not in running]
            running.update(new and layer._get_available_adapters().intersection(new))
    return running


def _refuse_other_routers(running: set[str], wrappers: list[Any]) -> None:
    """Raise ValueError unless the routers that run are those of the adapter that runs, or the base model's where none
    does.
    """
    # PEFT's wrapper runs one adapter's copy only: that of the first active one
    routed = {name for router in wrappers if not router.disable_adapters for name in router.active_adapters[:1]}
    if wrappers and running != routed:
        of = ", ".join(map(repr, sorted(routed))) or "the base model"
        raise ValueError(
            f"adapter {', '.join(map(repr, sorted(running))) or 'none'} runs with the routers of {of}: a part of the "
            "model was enabled, "
            "disabled, or given another adapter by itself. Use model.set_adapter(name) and the model's or PeftModel's "
            "own methods, which "
            'change both, or run dense with model.set_attn_implementation("sdpa")'
        )


def refuse_scaled(layer: Any, names: set[str]) -> None:
    """Raise ValueError if the scale of one of the adapters ``names`` is not the one that the routers were
    trained with.
    """
    # kinds of adapters without a scale have none to change
    for name in names.intersection(getattr(layer, "scaling", ())):
        trained, scale = _trained_scale(layer, name), float(layer.scaling[name])
        if trained is not None and not math.isclose(scale, trained, rel_tol=1e-5):
            raise ValueError(
                f"adapter {name!r} is scaled by {scale / trained:g}, but its routers were trained with the adapter as "
                "it is: set its scale "
                'to 1 again (layer.set_scale, unscale_layer), or run dense with model.set_attn_implementation("sdpa")'
            )


# scale = alpha / r: LoRA, Hu et al. 2021, arXiv:2106.09685
# alpha / √r with rsLoRA: Kalajdzievski 2023, arXiv:2312.03732
def _trained_scale(layer: Any, name: str) -> float | None:
    """What PEFT multiplies an adapter by from its start: alpha / r, for AdaLoRA alpha; None for kinds without these."""
    from peft.tuners.adalora.layer import AdaLoraLayer

    alphas = getattr(layer, "lora_alpha", None) or getattr(layer, "alpha", None)
    if not isinstance(alphas, dict) or name not in alphas or name not in layer.r:
        return None
    alpha, rank = float(alphas[name]), float(layer.r[name])
    # PEFT divides by the rank in the forward pass, not in the scale
    if isinstance(layer, AdaLoraLayer):
        return alpha if alpha > 0 else rank
    return alpha / (math.sqrt(rank) if getattr(layer, "use_rslora", {}).get(name) else rank)


def runs_sparse(model: Any) -> bool:
    """Whether a sparse model, or its text part, runs sparse attention now."""
    return bool(model.config.get_text_config()._attn_implementation == ATTN_IMPLEMENTATION)


def active_routers(model: nn.Module) -> list[SparseRouter]:
    """The routers that run, by layer: those of the active adapter, if there is one."""
    number_layers(base_model(model))
    return [active_router(site.router) for site in router_sites(model).values()]


def base_model(model: Any) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[no-any-return]


def router_sites(model: nn.Module) -> dict[str, Any]:
    """Attention layers with a router, by their name in the base model."""
    return {
        name: module for name, module in base_model(model).named_modules() if isinstance(module, SparseAttentionMixin)
    }


def refuse_misfits(model: Any, adapters: Mapping[str, PeftConfig]) -> None:
    """Raise ValueError if ``model`` runs sparse and an adapter has no routers, or routers for blocks of
    another size.
    """
    refuse_without_routers(model, adapters)
    size = active_routers(model)[0].config.block_size
    for name, config in adapters.items():
        settings = settings_of(config)
        # settings leave out defaults; an adapter without any is taken to fit
        trained_for = size if settings is None else settings.get("block_size", SparseAttentionConfig().block_size)
        if trained_for != size:
            raise ValueError(
                f"the routers of adapter {name!r} were trained for block_size {trained_for}, those of the model are "
                f"for {size}: load the "
                f"base with sparse_attention={settings}"
            )


def refuse_without_routers(model: Any, adapters: Mapping[str, PeftConfig]) -> None:
    # learned prompts change what goes in, not the layers: the base model's routers serve them
    without = [name for name, config in adapters.items() if not (holds_routers(config) or config.is_prompt_learning)]
    if without and runs_sparse(model):
        raise ValueError(
            f"adapter {', '.join(map(repr, without))} has no routers, but {type(model).__name__} runs sparse "
            "attention: it belongs to a "
            "dense model, or was made without modules_to_save=['router']. Make it with "
            "hf_sparse_attn.lora_config(model, ...), or run the "
            'model dense, with hf_sparse_attn.to_dense(model) or model.set_attn_implementation("sdpa")'
        )
