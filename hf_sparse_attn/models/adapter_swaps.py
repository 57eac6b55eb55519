"""Ways of PEFT to change an adapter in place: routers change with it, or the call is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..router.module import SparseRouter
from .adapter_settings import holds_routers
from .adapter_states import base_model, refuse_misfits, router_sites

if TYPE_CHECKING:
    from peft import PeftConfig

# fields of LoraConfig that its scale follows from
SCALES = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


@cache
def guard_peft() -> None:
    """Make PEFT's functions that know LoRA's weights only do what is right for a sparse model.
    Others they serve as before.
    """
    from peft.tuners.ia3 import IA3Model
    from peft.tuners.lora import LoraModel
    from peft.utils import hotswap

    # the kinds of adapters that PEFT can mix
    for tuner in (LoraModel, IA3Model):
        setattr(tuner, "add_weighted_adapter", _refusing(tuner.add_weighted_adapter))  # noqa: B010
    hotswap.hotswap_adapter_from_state_dict = _swapping(hotswap.hotswap_adapter_from_state_dict)


def _refusing(add_weighted_adapter: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(add_weighted_adapter)
    def refuse(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        if router_sites(tuner.model):
            raise ValueError(
                "add_weighted_adapter cannot mix the adapters of a sparse model: the new adapter would run with the "
                "routers of the base "
                "model, which were trained with neither. Mix them on the dense model, merge, and distil routers anew"
            )
        return add_weighted_adapter(tuner, *args, **kwargs)

    return refuse


def _swapping(hotswap: Callable[..., None]) -> Callable[..., None]:
    """`hotswap_adapter_from_state_dict` that swaps the routers, too."""

    @wraps(hotswap)
    def swap(
        model: nn.Module,
        state_dict: dict[str, Tensor],
        adapter_name: str,
        config: Any,
        parameter_prefix: str = "lora_",
        **kwargs: Any,
    ) -> None:
        refuse_swap(model, adapter_name, config)
        # torch.compile puts _orig_mod. before the names of a model, saved adapters have none
        wrappers = {
            name.removeprefix("_orig_mod."): module
            for name, module in model.named_modules()
            if isinstance(getattr(module, "original_module", None), SparseRouter)
            and adapter_name in module.modules_to_save
        }
        if not wrappers:
            return hotswap(model, state_dict, adapter_name, config, parameter_prefix, **kwargs)
        weights = {
            f"{name}.{weight}": parameter
            for name, module in wrappers.items()
            for weight, parameter in module.modules_to_save[adapter_name].named_parameters()
        }
        # routers are checked before PEFT changes the first weight: a swap is not left half done
        wrong = [
            name for name, weight in weights.items() if getattr(state_dict.get(name), "shape", None) != weight.shape
        ]
        if wrong:
            raise ValueError(
                "the adapter that is to be swapped in lacks routers, or has others than the model's: "
                f"{', '.join(wrong[:3])}"
            )
        try:
            hotswap(
                model,
                {k: v for k, v in state_dict.items() if k not in weights},
                adapter_name,
                config,
                parameter_prefix,
                **kwargs,
            )
        except KeyError as error:  # before anything was changed
            raise ValueError(
                f"PEFT cannot hot-swap {error}: of what an adapter saves whole only routers can be. Use "
                "delete_adapter and load_adapter"
            ) from error
        # in place: a compiled model goes on with the same tensors
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(state_dict[name])
        _note_scales(model, adapter_name)

    return swap


def refuse_swap(model: Any, name: str, config: PeftConfig) -> None:
    """Raise ValueError if an adapter of this ``config`` cannot take the place of adapter ``name`` of ``model``, sparse
    or not.
    """
    base: Any = base_model(model)
    if not router_sites(base):
        return
    if holds_routers(config) != holds_routers(base.peft_config[name]):
        raise ValueError(
            f"adapter {name!r} and the one that is to be swapped in for it do not both have routers: one of them "
            "belongs to a dense model. "
            "Use delete_adapter and load_adapter"
        )
    refuse_misfits(base, {name: config})


def refuse_other_scale(model: Any, name: str, config: Any) -> None:
    """Raise ValueError if an adapter of this ``config`` has another scale than adapter ``name``, which
    keeps its own.
    """
    for field in SCALES:
        ours, theirs = getattr(model.peft_config[name], field, None), getattr(config, field, None)
        if ours != theirs:
            raise ValueError(
                f"the adapter that is to be swapped in for {name!r} has {field} {theirs}, the old one {ours}: "
                "Transformers swaps weights "
                "only. Use peft.utils.hotswap.hotswap_adapter, or delete_adapter and load_adapter"
            )


# alpha = scale · r, with rsLoRA scale · √r: the inverse of what PEFT computes its scale by
def _note_scales(model: nn.Module, name: str) -> None:
    """Tell LoRA's layers that their scale is that of the adapter that was swapped in:
    PEFT leaves the old alpha in them.
    """
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and name in layer.scaling:
            rank: float = layer.r[name]
            layer.lora_alpha[name] = float(layer.scaling[name]) * (rank**0.5 if layer.use_rslora.get(name) else rank)
