"""The attention of a layer as one operator that torch.compile does not look into.

Documents, summaries and budgets depend on values, at which a compiled graph would break or be compiled anew. So inside
a compiled graph all of it is one operator, which finds its layer and its cache layer by number. Its backward pass
attends again, with gradients: routing is deterministic, so it finds the same selection.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .cache import SparseCacheLayerMixin
from .call import Attention
from .layer import attend
from .object_registry import number, numbered

_ARGUMENTS = """Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor? attention_mask, Tensor? position_ids,
    Tensor? cu_seq_lens, Tensor? filled, Tensor? cache, Tensor site, float scale, bool causal, float? softcap"""


def _attend(query, key, value, sinks, *rest):  # type: ignore[no-untyped-def]
    attention_mask, position_ids, cu_seq_lens, filled, cache, site, scale, causal, softcap = rest
    request = Attention(scale, causal, softcap, sinks, attention_mask, position_ids, cu_seq_lens, filled)
    return attend(numbered(site), query, key, value, request, None if cache is None else numbered(cache))


def _fake_attend(query, key, value, *rest):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _attend_backward(grad, query, key, value, sinks, *rest):  # type: ignore[no-untyped-def]
    attention_mask, position_ids, cu_seq_lens, filled, _, site, scale, causal, softcap = rest
    # without the cache, which the forward pass has filled: keys and values hold all that is attended
    leaves = [x.detach().requires_grad_() for x in (query, key, value, *(() if sinks is None else (sinks,)))]
    request = Attention(
        scale,
        causal,
        softcap,
        leaves[3] if sinks is not None else None,
        attention_mask,
        position_ids,
        cu_seq_lens,
        filled,
    )
    with torch.enable_grad(), _recording():
        out = attend(numbered(site), leaves[0], leaves[1], leaves[2], request)
        grads = torch.autograd.grad(out, leaves, grad)
    # an operator returns tensors only: an empty one stands for None
    return (*grads[:3], query.new_empty(0) if sinks is None else grads[3])


def _recording() -> Any:
    """Lets autograd record inside an operator, below which the dispatcher leaves it out."""
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _fake_backward(grad, query, key, value, sinks, *rest):  # type: ignore[no-untyped-def]
    inputs = (query, key, value, query.new_empty(0) if sinks is None else sinks)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    # the ten tensors of _ARGUMENTS; what follows them are numbers
    ctx.save_for_backward(*inputs[:10])
    ctx.settings = inputs[10:]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors
    *grads, dsinks = torch.ops.hf_sparse_attn.attend_backward(grad.contiguous(), *tensors, *ctx.settings)
    return (*grads, None if tensors[3] is None else dsinks, *(None,) * 9)


@cache
def register() -> None:
    """Tell torch about the operators. Not at import:
    torch looks through all modules for where an operator comes from.
    """
    forward = torch.library.custom_op(
        "hf_sparse_attn::attend", _attend, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
    )
    forward.register_fake(_fake_attend)
    forward.register_autograd(_backward, setup_context=_keep)
    schema = f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
    backward = torch.library.custom_op(
        "hf_sparse_attn::attend_backward", _attend_backward, mutates_args=(), schema=schema
    )
    backward.register_fake(_fake_backward)


def know_layer(module: Any) -> None:
    """Give an attention ``module`` the number by which the operator finds it."""
    register()
    module.sparse_number = number(module)


def attend_opaquely(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    request: Attention,
    cache: SparseCacheLayerMixin | None,
) -> Tensor:
    """`attend` as one operator of the graph that is being compiled."""
    out: Tensor = torch.ops.hf_sparse_attn.attend(
        *(
            query,
            key,
            value,
            request.sinks,
            request.attention_mask,
            request.position_ids,
            request.cu_seq_lens,
            request.filled,
        ),
        *(
            None if cache is None else cache.number,
            module.sparse_number,
            request.scale,
            request.causal,
            request.softcap,
        ),
    )
    return out
