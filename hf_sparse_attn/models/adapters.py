"""PEFT adapters of sparse models: an adapter holds the routers it was trained with, and goes on no other kind of model.

PEFT itself ignores routers that a model lacks, and a model's routers that an adapter lacks. A sparse model notices when
PEFT sets its ``peft_config`` and when it runs. A dense model runs none of this library's code, so the config of an
adapter names the settings of its base, and PEFT's function that puts adapters into models reads them (`peft_hooks`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from ..router.module import active_router
from .adapter_settings import ADVICE, complete, holds_routers, matches, settings_of
from .adapter_states import active_routers as active_routers
from .adapter_states import base_model, check_adapters, refuse_misfits, router_sites
from .adapter_swaps import guard_peft, refuse_other_scale, refuse_swap
from .attach import ROUTER, check_places, is_of_router, no_routers
from .config_dispatch import write_settings
from .layer_numbers import number_layers

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel

# of the options of a load those that say where the config is
HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token")


def lora_config(model: nn.Module, **options: Any) -> LoraConfig:
    """A `peft.LoraConfig` with these ``options`` for a sparse ``model``: routers are trained whole and saved with the
    adapter.

    PEFT's ``unload`` leaves the adapter's routers in the model, as ``merge_and_unload`` does; ``delete_adapter`` first
    restores all.

    Raises:
        ValueError: the model has no routers, or ``target_modules`` or ``target_parameters`` take in a router.
    """
    from peft import LoraConfig  # heavy, and only adapters need it

    sites = router_sites(model)
    if not sites:
        raise ValueError(f"{no_routers(model)}, or use peft.LoraConfig")
    config: LoraConfig = LoraConfig(**options)
    for name, site in sites.items():
        router = f"{name}.{ROUTER}"
        weights = [f"{router}.{weight}" for weight, _ in active_router(site.router).named_parameters()]
        for field, keys in (("target_modules", [router]), ("target_parameters", weights)):
            target = getattr(config, field)
            hit = next((key for key in keys if matches(target, key)), None)
            if hit is not None:
                raise ValueError(
                    f"{field} {target!r} takes in {hit}: routers are trained whole and saved with the adapter, leave "
                    "them out"
                )
    complete(config, active_routers(model)[0].config)
    return config


def load_adapter(
    model: nn.Module, adapter: str | os.PathLike[str], adapter_name: str = "default", **options: Any
) -> PeftModel:
    """As `PeftModel.from_pretrained` (`PeftModel.load_adapter` if ``model`` is one), but refuses an adapter of the
    other kind.

    Returns:
        The PeftModel.

    Raises:
        ValueError: the adapter was trained on a sparse model and ``model`` is dense, or the other way round.
    """
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(
        os.fspath(adapter), **{name: options[name] for name in HUB_OPTIONS if name in options}
    )
    base = base_model(model)
    settings = settings_of(config)
    if router_sites(base):
        refuse_misfits(base, {adapter_name: config})
    # a dense mixture of experts may have a module called router of its own, which an adapter may save
    elif settings is not None or (
        holds_routers(config) and not any(name.endswith(ROUTER) for name, _ in base.named_modules())
    ):
        raise ValueError(
            f"{adapter} cannot go on the dense {type(base).__name__}: "
            f"{ADVICE.format(settings='{...}' if settings is None else settings)}"
        )
    if isinstance(model, PeftModel):
        model.load_adapter(adapter, adapter_name, **options)
        return model
    return PeftModel.from_pretrained(model, adapter, adapter_name, **options)


def _take_retrieval_heads(model: Any, settings: Mapping[str, Any]) -> None:
    """Give a model that names none the heads that were found with the routers of an adapter with these settings."""
    layer_routers = active_routers(model)
    if settings.get("retrieval_heads") and not layer_routers[0].config.retrieval_heads:
        known = layer_routers[0].config.changed(retrieval_heads=settings["retrieval_heads"])
        check_places(known, layer_routers)
        write_settings(model, known)


class SparseAdapterMixin:
    """In front of a stock model class: refuses adapters without routers as long as the model runs sparse."""

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The adapters that PEFT put on this model, by name.
        Setting it raises ValueError if one of them has no routers.
        """
        # libraries ask with hasattr() whether a model has adapters
        if "peft_config" not in self.__dict__:
            raise AttributeError("peft_config")
        return self.__dict__["peft_config"]  # type: ignore[no-any-return]

    @peft_config.setter
    def peft_config(self, adapters: dict[str, PeftConfig]) -> None:
        guard_peft()
        # PEFT sets this last, when its layers are in place
        try:
            # a model that is refused must be as before: PEFT's layers are taken out again below
            refuse_misfits(self, adapters)
        except ValueError:
            if "peft_config" not in self.__dict__:
                self._hf_peft_config_loaded = False  # the flag of Transformers' own PEFT methods
                _take_out_adapters(self)
            raise
        for config in adapters.values():
            if holds_routers(config):
                complete(config, active_routers(cast(nn.Module, self))[0].config)
        number_layers(self)  # layer_replication
        for config in adapters.values():
            _take_retrieval_heads(self, settings_of(config) or {})
        self.__dict__["peft_config"] = adapters
        if check_adapters not in self._forward_pre_hooks.values():  # type: ignore[attr-defined]
            self.register_forward_pre_hook(check_adapters)  # type: ignore[attr-defined]

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.__dict__["peft_config"]
        hooks: dict[int, Any] = self._forward_pre_hooks  # type: ignore[attr-defined]
        for key in [key for key, hook in hooks.items() if hook is check_adapters]:
            del hooks[key]

    def enable_adapters(self) -> None:
        """As the stock method, which leaves off what an adapter saves whole: routers, classifiers."""
        from peft.utils.other import ModulesToSaveWrapper

        super().enable_adapters()  # type: ignore[misc]
        # Transformers' own method switches on PEFT's layers only, not the wrappers of modules that are saved whole
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, ModulesToSaveWrapper):
                module.enable_adapters(True)

    def load_adapter(
        self, peft_model_id: Any = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the stock method.

        Raises:
            ValueError: the adapter is to be swapped in for another that it does not fit, or its weights lack the
                routers.
        """
        from peft import PeftConfig

        name = adapter_name or "default"
        if name in getattr(self, "peft_config", {}):  # to be swapped in, or refused by the stock method
            config = kwargs.get("peft_config") or PeftConfig.from_pretrained(peft_model_id)
            refuse_swap(self, name, config)
            refuse_other_scale(self, name, config)
        # Transformers reports weights that a file lacks, and goes on with those that PEFT made
        info = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)  # type: ignore[misc]
        missing = [key for key in getattr(info, "missing_keys", ()) if is_of_router(key)]
        if missing:
            raise ValueError(
                f"{peft_model_id} says that it holds routers, but lacks weights of them: "
                f"{', '.join(sorted(missing)[:3])}"
            )
        return info


def refuse_adapters(model: Any, what: str) -> None:
    """Raise ValueError if ``model`` has adapters, or is a PeftModel."""
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"{what} cannot change a model with adapters ({', '.join(model.peft_config)}): merge or unload them first"
        )


def _take_out_adapters(model: Any) -> None:
    """Put the layers that PEFT replaced back; what it froze stays frozen."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    # a list: modules are replaced on the way
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, BaseTunerLayer):
            setattr(model.get_submodule(parent), child, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            setattr(model.get_submodule(parent), child, module.original_module)
