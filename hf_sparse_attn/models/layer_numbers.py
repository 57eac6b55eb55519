"""The numbers of a model's sparse layers, which follow the model when its layers are copied, repeated or moved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from torch import nn

from ..attention.interface import SparseAttentionMixin
from ..config import KEY, StoredSettings
from ..router.module import SparseRouter
from .config_dispatch import write_settings


def sparse_sites(model: nn.Module) -> list[Any]:
    """The attention modules that have a router."""
    return [module for module in model.modules() if isinstance(module, SparseAttentionMixin)]


def number_layers(model: Any) -> None:
    """Give every sparse layer of ``model`` a number of its own: its ``layer_idx`` where these differ, else its place.

    A copy of a layer (PEFT's ``layer_replication``, depth up-scaling) brings the number of its original along.
    What settings say of a layer holds for its copies, too: ``dense_layers`` and ``retrieval_heads`` get the new
    numbers. All run with the settings of the model.
    """
    sites = sparse_sites(model)
    # under PEFT a site holds the router that it had and one for each adapter
    held = [[part for part in site.router.modules() if isinstance(part, SparseRouter)] for site in sites]
    known: list[int | None] = [routers[0].layer for routers in held]
    # `layer_idx` first: it is the layer's place in a cache
    numbers = (
        _distinct([getattr(site, "layer_idx", None) for site in sites]) or _distinct(known) or list(range(len(sites)))
    )
    # the usual case, at every call: nothing was copied or moved
    if numbers == known and len({router.holder for routers in held for router in routers}) <= 1:
        return
    stored = getattr(getattr(model, "config", None), KEY, None)  # a copy may hold what was set before it was made
    settings = stored.settings if isinstance(stored, StoredSettings) and stored.in_use else held[0][0].config
    pairs = list(zip(numbers, known, strict=True))
    dense = tuple(sorted(new for new, old in pairs if old in settings.dense_layers))
    heads = tuple((new, head) for new, old in pairs for layer, head in settings.retrieval_heads if layer == old)
    for number, routers in zip(numbers, held, strict=True):
        for router in routers:
            router.layer = number
    write_settings(model, replace(settings, dense_layers=dense, retrieval_heads=heads))


def _distinct(numbers: list[int | None]) -> list[int] | None:
    """``numbers`` if all are there and differ."""
    present = [number for number in numbers if number is not None]
    return present if len(set(present)) == len(numbers) else None


def _configs(model: Any) -> list[Any]:
    """The configs of ``model`` that hold settings: its own, and that of its text part."""
    config = getattr(model, "config", None)
    parts = [] if config is None else [config, config.get_text_config()]
    return [part for part in {id(part): part for part in parts}.values() if getattr(part, KEY, None) is not None]


class NumberedLayersMixin:
    """In front of a stock model class: what is set for the model is set for copies of layers, too."""

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As the stock method, which does not reach the configs that copied layers brought along."""
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        for config in _configs(self):
            for site in sparse_sites(cast(nn.Module, self)):
                # a copied layer has a copy of the config, which attention reads when it runs
                if site.config is not config and type(site.config) is type(config):
                    site.config._attn_implementation = config._attn_implementation
