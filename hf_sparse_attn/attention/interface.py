"""The attention function that Transformers calls, and the thin subclass of its attention modules."""

# Shape legend: B batch, H query heads, G KV heads, N keys, Q queries, D head dim.

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from ..architectures import SUPPORTED
from ..architectures.cache_arguments import CACHE_ARGUMENTS, is_cache
from ..architectures.class_factory import MadeMixin
from ..config import ATTN_IMPLEMENTATION
from ..router.module import active_router
from .cache import SparseCacheLayerMixin
from .cache_adoption import adopt, filled, found
from .call import Attention, SparseCall, is_causal
from .call_context import ambient_call
from .checks import EXPORT, check_call, check_mask, refuse_export, refuse_without_router
from .custom_op import attend_opaquely, know_layer
from .dense import attend_without_router
from .gradients import leave_routers
from .layer import attend, made_on_the_device


class SparseAttentionMixin(MadeMixin):
    """In front of a stock attention class: hands the layer's cache on to the attention function, nothing else."""

    sparse_number: Tensor  # by which an operator of a compiled graph finds this module
    # names of the arguments of the stock `forward`, those of its parameters first, in their order
    accepted: tuple[str, ...]
    keeps_positions: bool  # whether the stock `forward` takes position_ids as a parameter: it need not hand them on

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        know_layer(self)  # a copy is not its original

    def __prepare_scriptable__(self) -> Any:
        raise ValueError(EXPORT)  # torch.jit.script asks for this before it reads any code

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation == ATTN_IMPLEMENTATION:  # type: ignore[attr-defined]
            refuse_export()
            cache = self.taken_cache((hidden_states, *args), kwargs)
            if cache is not None:
                # a graph cannot replace the objects in a cache, which adopting does
                take = found if torch.compiler.is_compiling() else adopt
                kwargs["sparse_cache_layer"] = take(cache, self.layer_idx)  # type: ignore[attr-defined]
            # keys are un-rotated by them before they are pooled
            if self.keeps_positions:
                kwargs["sparse_position_ids"] = kwargs.get("position_ids")
        elif kwargs.pop("sparse_call", None) is not None:
            implementation = self.config._attn_implementation  # type: ignore[attr-defined]
            raise ValueError(
                f"sparse_call was passed, but attn_implementation is {implementation!r}: "
                f'call model.set_attn_implementation("{ATTN_IMPLEMENTATION}") first'
            )
        with _onloaded(self.router):  # type: ignore[attr-defined]
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]

    def taken_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The cache among the arguments of a call, None if there is none.

        Raises:
            ValueError: there is a cache under a name that the stock `forward` does not take it by: it would run
                without.
        """
        cache = None
        for name, value in (*zip(self.accepted, args, strict=False), *kwargs.items()):
            if name in CACHE_ARGUMENTS and name in self.accepted:
                if cache is not None and value is not None and value is not cache:
                    raise ValueError(
                        f"{type(self).__name__} was called with two caches, one of them as {name}: pass one"
                    )
                cache = value if cache is None else cache
            elif is_cache(name, value):
                names = (
                    " or ".join(known for known in CACHE_ARGUMENTS if known in self.accepted) or "nothing, it has none"
                )
                raise ValueError(
                    f"{type(self).__name__} was called with a cache ({type(value).__name__}) under the name {name!r}, "
                    "by which sparse "
                    "attention does not know it, and would run without it. In Transformers "
                    f"{transformers.__version__} its cache is called "
                    f"{names}: pass it by that name, or none with use_cache=False"
                )
        return cache


def _onloaded(router: nn.Module) -> AbstractContextManager[None]:
    """Accelerate loads offloaded weights when a module is called, but a router is asked through its methods."""
    router = active_router(router)
    if not hasattr(router, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(router)  # type: ignore[no-any-return]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside_graphs(*arguments: Any) -> Tensor:
    """`attend` where a model is compiled: what a `SparseCall` observes or selects is Python, for which it leaves its
    graph.
    """
    return attend(*arguments)


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sparse_call: SparseCall | None = None,
    sparse_cache_layer: CacheLayerMixin | None = None,
    sparse_position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function registered as ``attn_implementation="hf_sparse"``.

    ``query`` [B, H, Q, D], ``key`` and ``value`` [B, G, N, D] after RoPE and cache update; returns ([B, Q, H, D],
    None).

    Raises:
        ValueError: the layer has no router, or something is asked for that sparse attention cannot give.
    """
    router = getattr(module, "router", None)
    # a layer that keeps its own attention, such as a sliding window
    if router is None:
        refuse_without_router(module, kwargs)
        return attend_without_router(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    if torch.is_autocast_enabled(query.device.type):  # queries and keys were rotated in float32, values were not
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    # such a model drops unknown arguments on the way to its attention modules
    if not SUPPORTED[module.config.model_type].hands_on:  # type: ignore[union-attr, index]
        sparse_call = ambient_call()
    check_call(router, module, query, key, value, dropout, kwargs)
    check_mask(attention_mask)
    if sparse_cache_layer is None and key.shape[2] > query.shape[2]:
        raise ValueError(
            f"{type(module).__name__} attends to {key.shape[2]} keys with {query.shape[2]} queries, but handed no "
            "cache on: it keeps keys "
            'in a way that sparse attention does not know. Run dense with model.set_attn_implementation("sdpa")'
        )
    request = Attention(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=is_causal(module, kwargs),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        attention_mask=attention_mask,
        position_ids=kwargs.get("position_ids", sparse_position_ids),
        cu_seq_lens=kwargs.get("cu_seq_lens_q"),
        filled=None if sparse_cache_layer is None else filled(sparse_cache_layer),
    )
    # inside a graph the layer may be one that was never adopted: it has no summaries
    cache = sparse_cache_layer if isinstance(sparse_cache_layer, SparseCacheLayerMixin) else None
    if sparse_call is None and (out := made_on_the_device(module, query, key, value, request, cache)) is not None:
        return out, None
    if torch.compiler.is_compiling():
        if sparse_call is None:
            return attend_opaquely(module, query, key, value, request, cache), None
        return _outside_graphs(module, query, key, value, request, cache, sparse_call), None
    out = attend(module, query, key, value, request, cache, sparse_call)
    # no router learns from this call
    if sparse_call is None and module.training and torch.is_grad_enabled():
        out = leave_routers(router, out)
    return out, None
