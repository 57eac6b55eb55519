"""PEFT adapters of sparse models: an adapter holds the routers it was trained with, and goes on no other kind of model.

PEFT itself ignores routers that a model lacks, and a model's routers that an adapter lacks. A sparse model notices when
PEFT sets its ``peft_config`` and when it runs. A dense model runs none of this library's code, so an adapter carries a
mark in ``exclude_modules``, about which PEFT warns where no module matches: its text says how to load the base.
"""

from __future__ import annotations

import ast
import os
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from .attention import SparseAttentionMixin
from .checks import ATTN_IMPLEMENTATION
from .config import SparseAttentionConfig
from .router import SparseRouter, active_router

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel

ROUTER = "router"  # name of the module in every attention layer
ROUTERS = rf"(.*\.)?{ROUTER}(\..*)?"  # a regular expression, to which the mark is a comment
MARK = "adapter of a sparse model: load its base with sparse_attention={settings}, or from a saved sparse model"
HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token")


def lora_config(model: nn.Module, **options: Any) -> LoraConfig:
    """A `peft.LoraConfig` with these ``options`` for a sparse ``model``: routers are trained whole and saved with the adapter.

    PEFT's ``unload`` leaves the adapter's routers in the model, as ``merge_and_unload`` does; ``delete_adapter`` first restores all.

    Raises:
        ValueError: the model has no routers, or ``target_modules`` or ``target_parameters`` take in a router.
    """
    from peft import LoraConfig  # heavy, and only adapters need it

    sites = _sites(model)
    if not sites:
        raise ValueError(f"{type(model).__name__} has no routers: convert it with hf_sparse_attn.sparsify first, or use peft.LoraConfig")
    config: LoraConfig = LoraConfig(**options)
    for name, site in sites.items():
        router = f"{name}.{ROUTER}"
        weights = [f"{router}.{weight}" for weight, _ in active_router(site.router).named_parameters()]
        for field, keys in (("target_modules", [router]), ("target_parameters", weights)):
            target = getattr(config, field)
            hit = next((key for key in keys if _matches(target, key)), None)
            if hit is not None:
                raise ValueError(f"{field} {target!r} takes in {hit}: routers are trained whole and saved with the adapter, leave them out")
    _complete(config, model)
    return config


def load_adapter(model: nn.Module, adapter: str | os.PathLike[str], adapter_name: str = "default", **options: Any) -> PeftModel:
    """As `PeftModel.from_pretrained` (`PeftModel.load_adapter` if ``model`` is one), but refuses an adapter of the other kind.

    Returns:
        The PeftModel.

    Raises:
        ValueError: the adapter was trained on a sparse model and ``model`` is dense, or the other way round.
    """
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(os.fspath(adapter), **{name: options[name] for name in HUB_OPTIONS if name in options})
    base = _base(model)
    settings = _settings(config)
    if _sites(base):
        _refuse_misfits(base, {adapter_name: config})
    elif settings is not None or (_holds_routers(config) and not any(name.endswith(ROUTER) for name, _ in base.named_modules())):
        raise ValueError(
            f"{adapter} cannot go on the dense {type(base).__name__}: {MARK.format(settings='{...}' if settings is None else settings)}"
        )
    if isinstance(model, PeftModel):
        model.load_adapter(adapter, adapter_name, **options)
        return model
    return PeftModel.from_pretrained(model, adapter, adapter_name, **options)


class SparseAdapterMixin:
    """In front of a stock model class: refuses adapters without routers as long as the model runs sparse."""

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The adapters that PEFT put on this model, by name. Setting it raises ValueError if one of them has no routers."""
        if "peft_config" not in self.__dict__:
            raise AttributeError("peft_config")
        return self.__dict__["peft_config"]  # type: ignore[no-any-return]

    @peft_config.setter
    def peft_config(self, adapters: dict[str, PeftConfig]) -> None:
        # PEFT sets this last, when its layers are in place
        try:
            _refuse_misfits(self, adapters)
        except ValueError:
            if "peft_config" not in self.__dict__:
                self._hf_peft_config_loaded = False  # the flag of Transformers' own PEFT methods
                _take_out_adapters(self)
            raise
        for config in adapters.values():
            if _holds_routers(config):
                _complete(config, self)
        self.__dict__["peft_config"] = adapters
        if check_adapters not in self._forward_pre_hooks.values():  # type: ignore[attr-defined]
            self.register_forward_pre_hook(check_adapters)  # type: ignore[attr-defined]

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.__dict__["peft_config"]
        hooks: dict[int, Any] = self._forward_pre_hooks  # type: ignore[attr-defined]
        for key in [key for key, hook in hooks.items() if hook is check_adapters]:
            del hooks[key]


def check_adapters(model: Any, _args: Any) -> None:
    """Forward pre-hook of a sparse model with adapters.

    Raises:
        ValueError: an active adapter has no routers, or rows of the batch have adapters of their own.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    if layer is None or layer.disable_adapters:
        return
    _refuse_without_routers(model, {name: model.peft_config[name] for name in layer.active_adapters if name in model.peft_config})
    router = next(module.router for module in model.modules() if isinstance(module, SparseAttentionMixin))  # type: ignore[attr-defined]
    mixed = any("adapter_names" in getattr(hook, "keywords", ()) for hook in router._forward_pre_hooks.values())  # PEFT's hook
    if mixed and model.config._attn_implementation == ATTN_IMPLEMENTATION:
        raise ValueError(
            "adapter_names was passed: sparse attention routes a whole batch by the active adapter's routers. Call the model once for each "
            'adapter, or run dense with model.set_attn_implementation("sdpa")'
        )


def active_routers(model: nn.Module) -> list[SparseRouter]:
    """The routers that run, by layer: those of the active adapter, if there is one."""
    return [active_router(site.router) for site in _sites(model).values()]


def refuse_adapters(model: Any, what: str) -> None:
    """Raise ValueError if ``model`` has adapters, or is a PeftModel."""
    if hasattr(model, "peft_config"):
        raise ValueError(f"{what} cannot change a model with adapters ({', '.join(model.peft_config)}): merge or unload them first")


def raise_for_marked_adapters() -> None:
    """Make an error of PEFT's warning about the mark of an adapter that is loaded on a dense model."""
    warnings.filterwarnings("error", message=f"You have passed exclude_modules=.*{re.escape(MARK.partition('{')[0])}")


def _base(model: Any) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[no-any-return]


def _sites(model: nn.Module) -> dict[str, Any]:
    """Attention layers with a router, by their name in the base model."""
    return {name: module for name, module in _base(model).named_modules() if isinstance(module, SparseAttentionMixin)}


def _matches(target: Any, key: str) -> bool:
    """Whether PEFT takes ``key`` for one of the modules or parameters that ``target`` names."""
    if target is None or target == "all-linear":  # routers have no linear layers
        return False
    if isinstance(target, str):
        return re.fullmatch(target, key) is not None
    return any(key == name or key.endswith(f".{name}") for name in target)


def _holds_routers(config: PeftConfig) -> bool:
    return any(name.rpartition(".")[2] == ROUTER for name in getattr(config, "modules_to_save", None) or ())


def _settings(config: PeftConfig) -> dict[str, Any] | None:
    """The settings of the sparse model that ``config`` was made for, as its mark names them; None without a mark."""
    excluded = getattr(config, "exclude_modules", None)
    found = re.search(re.escape(MARK).replace(r"\{settings\}", r"(\{.*?\})"), excluded) if isinstance(excluded, str) else None
    return None if found is None else ast.literal_eval(found[1])


def _complete(config: Any, model: Any) -> None:
    """Add the routers of ``model`` to what ``config`` saves, and the mark."""
    if not _holds_routers(config):
        config.modules_to_save = [*(config.modules_to_save or ()), ROUTER]
    if hasattr(config, "exclude_modules") and _settings(config) is None:
        default = SparseAttentionConfig().to_dict()
        settings = {k: v for k, v in active_routers(model)[0].config.to_dict().items() if k != "bookkeeping" and v != default[k]}
        own = config.exclude_modules
        if own and not isinstance(own, str):
            own = rf"(.*\.)?({'|'.join(map(re.escape, sorted(own)))})"
        config.exclude_modules = f"{own}|" * bool(own) + f"{ROUTERS}(?#{MARK.format(settings=settings)})"


def _refuse_misfits(model: Any, adapters: Mapping[str, PeftConfig]) -> None:
    """Raise ValueError if ``model`` runs sparse and an adapter has no routers, or routers for blocks of another size."""
    _refuse_without_routers(model, adapters)
    size = active_routers(model)[0].config.block_size
    for name, config in adapters.items():
        settings = _settings(config)
        trained_for = size if settings is None else settings.get("block_size", SparseAttentionConfig().block_size)
        if trained_for != size:
            raise ValueError(
                f"the routers of adapter {name!r} were trained for block_size {trained_for}, those of the model are for {size}: load the "
                f"base with sparse_attention={settings}"
            )


def _refuse_without_routers(model: Any, adapters: Mapping[str, PeftConfig]) -> None:
    without = [name for name, config in adapters.items() if not (_holds_routers(config) or config.is_prompt_learning)]
    if without and model.config._attn_implementation == ATTN_IMPLEMENTATION:
        raise ValueError(
            f"adapter {', '.join(map(repr, without))} has no routers, but {type(model).__name__} runs sparse attention: it belongs to a "
            "dense model, or was made without modules_to_save=['router']. Make it with hf_sparse_attn.lora_config(model, ...), or run the "
            'model dense, with hf_sparse_attn.to_dense(model) or model.set_attn_implementation("sdpa")'
        )


def _take_out_adapters(model: Any) -> None:
    """Put the layers that PEFT replaced back; what it froze stays frozen."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, BaseTunerLayer):
            setattr(model.get_submodule(parent), child, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            setattr(model.get_submodule(parent), child, module.original_module)
