"""The attention modules of a stock model that get a router, and putting routers there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..architectures import SUPPORTED, Architecture
from ..architectures.class_factory import accepted_names, make_class, makes
from ..attention.custom_op import know_layer
from ..attention.interface import SparseAttentionMixin
from ..config import SettingsHolder, SparseAttentionConfig
from ..router.budget import check_two_sided
from ..router.module import SparseRouter
from ..router.rotary import Rotary, find_rotary
from .layer_numbers import number_layers, sparse_sites

ROUTER = "router"  # name of the module in every attention layer


def routers(model: nn.Module) -> list[SparseRouter]:
    """The routers of a sparse model, by layer."""
    number_layers(model)
    return [m for m in model.modules() if isinstance(m, SparseRouter)]


def no_routers(model: nn.Module) -> str:
    """What is wrong with a ``model`` without routers, and what helps."""
    return f"{type(model).__name__} has no routers: convert it with hf_sparse_attn.sparsify first"


def is_of_router(name: str) -> bool:
    """Whether the parameter or buffer ``name`` of a model belongs to a router."""
    return f".{ROUTER}." in f".{name}"


@cache
def calls_interface(forward: Callable[..., Any]) -> bool:
    """Whether the ``forward`` of a module calls Transformers' attention interface."""
    # co_names holds every global and attribute that the body names, as in ALL_ATTENTION_FUNCTIONS.get_interface(…)
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and "get_interface" in code.co_names


def attention_sites(model: nn.Module) -> dict[str, Any]:
    """The modules of ``model`` with full self-attention that sparse attention serves, by name.

    Layers with a sliding window keep their own attention. Of a composite model only the text part is served.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if calls_interface(type(module).forward)
        and getattr(module, "config", None) is not None
        and module.config.model_type in SUPPORTED
        and not getattr(module, "is_cross_attention", False)
        and _window(module) is None
    }


def _window(site: Any) -> int | None:
    """The sliding window of an attention module: its own attribute, else the config's where its forward
    passes that on.
    """
    # a layer with full attention, of a model that also has others
    if getattr(site, "is_sliding", True) is False:
        return None
    if hasattr(site, "sliding_window"):
        return site.sliding_window  # type: ignore[no-any-return]
    # the names of keyword arguments of a call are a tuple among the constants of the code
    constants = inspect.unwrap(type(site).forward).__code__.co_consts
    passes = any(isinstance(names, tuple) and "sliding_window" in names for names in constants)
    return getattr(site.config, "sliding_window", None) if passes else None


def attach_routers(model: Any, config: SparseAttentionConfig, device: torch.device | None = None) -> None:
    """Give every attention layer of a stock ``model`` a router (weights uninitialised, on ``device``) and the thin
    subclass.

    Raises:
        ValueError: no layer can be served, ``config`` does not fit the model, or a layer has a feature that is not
            supported.
    """
    sites = attention_sites(model)
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no attention layer that sparse attention can serve: all of its layers "
            "have a sliding window, or none calls Transformers' attention interface"
        )
    # a layer without a number, or with 0, is numbered by its place among the sites
    layers = {name: int(getattr(site, "layer_idx", None) or 0) or at for at, (name, site) in enumerate(sites.items())}
    # an inner model that an Auto class made from a sparse config is sparse already
    stock = {name: site for name, site in sites.items() if not isinstance(site, SparseAttentionMixin)}
    rotaries: dict[Any, Rotary] = {}
    modules = {
        name: _make_router(model, name, site, config, layers[name], rotaries, device) for name, site in stock.items()
    }
    sparse = [site.router for name, site in sites.items() if name not in modules]
    check_places(config, [*sparse, *modules.values()])
    # one for all routers: settings change for the whole model at once
    holder = SettingsHolder(config)
    for name, router in modules.items():
        router.holder = holder
        sites[name].router = router
        # the class changes in place: weights, hooks and references to the module stay as they are
        sites[name].__class__ = sparse_attention_class(type(sites[name]))
        know_layer(sites[name])


def check_places(config: SparseAttentionConfig, layer_routers: Iterable[SparseRouter]) -> None:
    """Raise ValueError where ``config`` names a layer or a KV head that the model with these routers does not have."""
    heads = {router.layer: router.groups for router in layer_routers}
    if any(layer not in heads for layer in config.dense_layers):
        raise ValueError(
            f"sparse_attention.dense_layers is {config.dense_layers!r}: the layers that can be sparse are "
            f"{sorted(heads)}"
        )
    for layer, head in config.retrieval_heads:
        if head >= heads.get(layer, 0):
            known = layer in heads
            has = f"layer {layer} has KV heads 0 to {heads[layer] - 1}" if known else f"layers are {sorted(heads)}"
            raise ValueError(
                f"sparse_attention.retrieval_heads names KV head {head} of layer {layer}: this model's {has}. Heads of "
                "another model say nothing: leave the setting out, and distill finds this model's own"
            )


def detach_routers(model: Any) -> None:
    """Remove what `attach_routers` added."""
    for module in sparse_sites(model):
        del module.router, module.sparse_number
        # made classes have the bases (mixin, stock)
        module.__class__ = type(module).__bases__[1]


@makes(SparseAttentionMixin)
@cache
def sparse_attention_class(stock: Any) -> type:
    """The thin subclass of a stock attention class, which knows what arguments the stock ``forward`` takes."""
    parameters = inspect.signature(stock.forward).parameters.values()
    # a position_ids that forward takes by name need not be among what reaches the attention function
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    keeps_positions = passes_on and any(parameter.name == "position_ids" for parameter in parameters)
    return make_class(
        SparseAttentionMixin, stock, accepted=accepted_names(stock.forward)[1:], keeps_positions=keeps_positions
    )


def _make_router(
    model: nn.Module,
    name: str,
    site: Any,
    config: SparseAttentionConfig,
    layer: int,
    rotaries: dict[Any, Rotary],
    device: torch.device | None,
) -> SparseRouter:
    refuse_features(site)
    # local keys are forced on both sides of a tile: more than the config counted when it was made
    if not getattr(site, "is_causal", True):
        check_two_sided(config)
    architecture = SUPPORTED[site.config.model_type]
    heads, groups, head_dim = _shape(site)
    rotary = _rotary(model, name, site, architecture)
    if rotary is not None:  # layers that share an embedding share its view, which keeps the rotations of a decode step
        rotary = rotaries.setdefault((id(rotary.module), rotary.prefix, rotary.interleaved), rotary)
    return SparseRouter(config, heads, groups, head_dim, rotary, layer, device)


def refuse_features(site: Any) -> None:
    """Raise ValueError naming a feature of an attention module or its config that sparse attention cannot honour."""
    config = site.config
    for field in ("is_encoder_decoder", "add_cross_attention"):
        if getattr(config, field, False):
            raise ValueError(
                f"{type(site).__name__} with {field}=True is not supported: sparse attention serves self-attention "
                "only. "
                f"Set {field}=False, or load the model without sparse_attention"
            )


def _rotary(model: nn.Module, name: str, site: Any, architecture: Architecture) -> Rotary | None:
    return find_rotary(model, site, name, architecture.interleaved) if architecture.rotates(site) else None


def _shape(site: Any) -> tuple[int, int, int]:
    """(query heads, KV heads, head dim) of an attention module."""
    config: PreTrainedConfig = site.config
    heads = int(config.num_attention_heads)
    sizes = (getattr(site, name, None) for name in ("head_dim", "attention_head_size", "head_size"))
    head_dim = int(next((dim for dim in sizes if dim is not None), None) or config.hidden_size // heads)
    # the projection itself tells how many KV heads there are; configs name that number differently
    if hasattr(site, "k_proj"):
        return heads, int(site.k_proj.out_features) // head_dim, head_dim
    return heads, heads // int(getattr(site, "num_key_value_groups", 1)), head_dim
