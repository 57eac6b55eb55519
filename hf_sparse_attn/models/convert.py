"""Converting a model that is already in memory, back again, and changing its budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..config import BUDGET_FIELDS, FIXED_FIELDS, KEY, SparseAttentionConfig
from .adapter_settings import holds_routers, note_settings
from .adapters import refuse_adapters
from .attach import attach_routers, check_places, is_of_router, no_routers, routers
from .config_dispatch import (
    implementation,
    is_composite,
    name_sparse_classes,
    name_stock_classes,
    parts,
    write_settings,
)
from .model_class import SparseModelMixin, become, make_stock
from .registration import sparse_class, sparse_config_class


def sparsify(model: PreTrainedModel, sparse_attention: SparseAttentionConfig | Mapping[str, Any]) -> PreTrainedModel:
    """Give a stock model in memory routers and sparse attention, in place; returns it.

    Raises:
        ValueError: the architecture is not supported, the config is impossible, the model is sparse already or has
            adapters.
    """
    if isinstance(model, SparseModelMixin):
        raise ValueError(
            f"{type(model).__name__} is sparse already; change its budget with set_sparse_attention, or call to_dense "
            "first"
        )
    refuse_adapters(model, "sparsify")
    config = SparseAttentionConfig.coerce(sparse_attention)
    target = sparse_class(type(model))
    # refuses a model that runs on another type's config, before anything is changed
    sparse_config_class(type(model.config))
    # routers first: config and class change only once nothing can be refused any more
    attach_routers(model, config, model.device)
    for router in routers(model):  # in float32, as after from_pretrained
        router.train(model.training)
        router.init_weights()
    model.config.__class__ = sparse_config_class(type(model.config))
    name_sparse_classes(model.config)
    write_settings(model, config)
    become(model, target)
    model.set_attn_implementation(implementation(type(model.config)))
    model.add_model_tags(["hf-sparse-attn"])
    return model


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `sparsify` (or loading as sparse), in place: the stock class and config, without routers; returns it.

    Raises:
        ValueError: the model is not sparse, or has adapters.
    """
    refuse_adapters(model, "to_dense")
    if not isinstance(model, SparseModelMixin):
        raise ValueError(f"{type(model).__name__} is not a sparse model")
    # the default that Transformers would have chosen for the stock model
    stock = "sdpa" if model._supports_sdpa else "eager"
    model.set_attn_implementation({"text_config": stock} if is_composite(type(model.config)) else stock)
    for part in parts(model.config):
        delattr(part, KEY)
    name_stock_classes(model.config)
    model.config.__class__ = _stock(type(model.config))
    make_stock(model)
    model.model_tags = [tag for tag in (model.model_tags or []) if tag != "hf-sparse-attn"]
    return model


def take_routers(model: PreTrainedModel, source: nn.Module) -> PreTrainedModel:
    """Give ``model``, a reference of ``source`` with or without routers, frozen copies of the routers of ``source``;
    returns it.

    Raises:
        ValueError: ``model`` is wrapped or sharded (FSDP, DeepSpeed), or another architecture than ``source``.
    """
    # shapes tell an architecture, and sharded weights have others than whole ones
    if not isinstance(model, PreTrainedModel) or [p.shape for p in _backbone(model)] != [
        p.shape for p in _backbone(source)
    ]:
        raise ValueError(
            f"the reference model ({type(model).__name__}) cannot take the routers of {type(source).__name__}: it is "
            "sharded, or another "
            "model. Save the sparse model, load it from there, and train that one"
        )
    if not routers(model):
        sparsify(model, routers(source)[0].config)
    for router, theirs in zip(routers(model), routers(source), strict=True):
        router.load_state_dict(theirs.state_dict())
        router.requires_grad_(False)
        # neither is a weight, and both say what the weights are good for
        router.budgets, router.fresh = theirs.budgets, theirs.fresh
    write_settings(model, routers(source)[0].config)
    return model


def _backbone(model: nn.Module) -> list[nn.Parameter]:
    return [weight for name, weight in model.named_parameters() if not is_of_router(name)]


def _stock(cls: type) -> type:
    # made classes have the bases (mixin, stock)
    return cls.__bases__[1]


def set_sparse_attention(model: nn.Module, **changes: Any) -> SparseAttentionConfig:
    """Change fields of a sparse model's config, e.g. ``min_keys=1024, max_keys=1024``; returns the new config.

    Raises:
        ValueError: an unknown field, an impossible value, a field that the routers' weights depend on, no routers,
            another budget than the model's ``mass_threshold`` was fitted for, without a new one, or the model has a
            calibration.
    """
    layer_routers = routers(model)
    if not layer_routers:
        raise ValueError(no_routers(model))
    config = layer_routers[0].config.changed(**changes)
    check_places(config, layer_routers)
    for name in FIXED_FIELDS:
        if getattr(config, name) != getattr(layer_routers[0].config, name):
            raise ValueError(
                f"sparse_attention.{name} cannot change from {getattr(layer_routers[0].config, name)!r} to "
                f"{getattr(config, name)!r}: "
                "the routers' weights depend on it. Convert the dense model anew"
            )
    # a fitted threshold decides how many keys are kept: another budget beside it would not be what is kept
    moved = [name for name in BUDGET_FIELDS if getattr(config, name) != getattr(layer_routers[0].config, name)]
    if moved and layer_routers[0].config.mass_threshold is not None and "mass_threshold" not in changes:
        raise ValueError(
            f"sparse_attention.{moved[0]} cannot change alone: mass_threshold={config.mass_threshold} was fitted for "
            "the budget there is. "
            "Fit it anew with hf_sparse_attn.fit_mass_threshold(model, batches, keys=…), or pass mass_threshold=None, "
            "too"
        )
    # bookkeeping may change: no calibration depends on it
    if (
        layer_routers[0].budgets is not None
        and replace(config, bookkeeping=layer_routers[0].config.bookkeeping) != layer_routers[0].config
    ):
        raise ValueError(
            f"sparse_attention cannot change ({', '.join(changes)}): the model was calibrated for the settings there "
            "are. "
            "Call hf_sparse_attn.remove_calibration(model) first, and calibrate it anew afterwards"
        )
    write_settings(model, config)
    for adapter in (getattr(model, "peft_config", None) or {}).values():
        if holds_routers(adapter):
            note_settings(adapter, config)
    return config


@contextmanager
def sparse_attention_as(model: nn.Module, **changes: Any) -> Iterator[SparseAttentionConfig]:
    """Change fields for the length of a ``with`` block; a ``mass_threshold`` that is fitted within ends with it.

    A calibration of the model is set aside for as long.
    """
    layer_routers = routers(model)
    before, budgets = layer_routers[0].config, [router.budgets for router in layer_routers]
    try:
        # a calibrated model refuses other settings: its budgets step aside before they change
        for router in layer_routers:
            router.budgets = None
        yield set_sparse_attention(model, **changes)
    finally:
        set_sparse_attention(model, **{name: getattr(before, name) for name in (*changes, "mass_threshold")})
        for router, budget in zip(layer_routers, budgets, strict=True):
            router.budgets = budget


def mark_trained(model: nn.Module) -> None:
    """Note in the config that the routers were trained."""
    set_sparse_attention(model, bookkeeping=routers(model)[0].config.mark_trained().bookkeeping)
