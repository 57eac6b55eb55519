"""What sparse attention is compared with: the exact kernels that a device has, and compiled flex attention."""

# shapes: B batch, H query heads, G KV heads, N tokens, D head dim, K listed blocks of a tile

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from hf_sparse_attn_kernels import BlockSelection
from torch import Tensor

from .layer_shape import Layer

MATH_LENGTH = 8192  # the plain kernel holds all scores at once: 9 GB here for 32 heads


def dense_peers(layer: Layer) -> dict[str, Callable[[], Tensor]]:
    """Exact causal attention of the layer's q, k and v by every kernel that is there: out [B, H, N, D]."""
    q, k, v = layer.q, layer.k, layer.v

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1])

    if layer.shape.device == "cpu":
        return {"sdpa": sdpa}
    peers: dict[str, Callable[[], Tensor]] = {}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
    if layer.shape.length <= MATH_LENGTH:
        backends["sdpa math"] = SDPBackend.MATH
    for name, backend in backends.items():
        # bound as a default: a closure would see the last backend of the loop
        def with_backend(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa()

        peers[name] = with_backend
    for name, module in (("FA2", "flash_attn"), ("FA3", "flash_attn_interface")):
        if find_spec(module) is not None:
            peers[name] = _flash(module, q, k, v)
    return {name: peer for name, peer in peers.items() if _runs(peer)}


def _flash(module: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    function: Callable[..., Any] = import_module(module).flash_attn_func

    def run() -> Tensor:
        # flash-attn has [B, N, H, D]; some versions return the log-sum-exp beside the output
        out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
        attended: Tensor = out[0] if isinstance(out, tuple) else out
        return attended.transpose(1, 2)

    return run


def sparse_peers(layer: Layer, selection: BlockSelection) -> dict[str, Callable[[], Tensor]]:
    """Sparse attention of the packages that are installed on a machine with a GPU: out [B, H, N, D].

    "NSA" (flash-linear-attention) attends to the links of ``selection`` and has to give our output. "AdaSplash" and
    "flash-sparse-attn" choose their own links, by entmax and by a threshold: their outputs are others.
    """
    q, k, v = layer.q, layer.k, layer.v
    heads = q.shape[1] // k.shape[1]
    peers: dict[str, Callable[[], Tensor]] = {}
    if layer.shape.device == "cpu":
        return peers
    # the ratios that its kernel is made for
    if find_spec("fla") is not None and heads >= 16 and heads & (heads - 1) == 0:
        peers["NSA"] = _native_sparse_attention(layer, selection)
    if find_spec("adasplash") is not None:
        entmax: Callable[..., Tensor] = import_module("adasplash").adasplash
        repeated = [x.repeat_interleave(heads, 1) for x in (k, v)]
        peers["AdaSplash"] = lambda: entmax(q, *repeated, alpha=1.5, is_causal=True)
    if find_spec("flash_sparse_attn") is not None:
        threshold: Callable[..., Tensor] = import_module("flash_sparse_attn").flash_sparse_attn_func
        rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        peers["flash-sparse-attn"] = lambda: threshold(*rows, is_causal=True, softmax_threshold=0.01).transpose(1, 2)
    return peers


def _native_sparse_attention(layer: Layer, selection: BlockSelection) -> Callable[[], Tensor]:
    function: Callable[..., Tensor] = import_module("fla.ops.nsa.parallel").parallel_nsa
    grid = selection.grid
    listed = selection.indices.sort(-1, descending=True).values  # its lists have the empty entries last
    # selections list blocks by tile, this kernel takes lists by query
    tile = torch.arange(grid.q_len, device=listed.device, dtype=torch.int64) // grid.query_tile
    blocks = listed.clamp(min=0)[:, :, tile].transpose(1, 2).long()  # [B, N, G, K]
    counts = (listed >= 0).sum(-1)[:, :, tile].transpose(1, 2)
    rows = [x.transpose(1, 2).contiguous() for x in (layer.q, layer.k, layer.v)]

    def run() -> Tensor:
        out = function(*rows, block_indices=blocks, block_counts=counts, block_size=grid.block_size)
        return out.transpose(1, 2)

    return run


def _runs(peer: Callable[[], object]) -> bool:
    try:
        peer()
    except RuntimeError:  # this kernel is not made for these sizes, this dtype or this device
        return False
    return True


def flex_peer(layer: Layer, selection: BlockSelection) -> Callable[[], Tensor]:
    """Compiled `flex_attention` over the same links, forward only (on a CPU it has no backward pass)."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    grid = selection.grid
    # a BlockMask lists blocks by query head, a selection by KV head
    indices = selection.indices.repeat_interleave(layer.q.shape[1] // layer.k.shape[1], 1)
    count = (indices >= 0).sum(-1).int()
    first = (indices.shape[-1] - count)[..., None]  # empty entries come first here and last there
    # shifting a list by the number of its empty entries brings the kept blocks to its front
    order = (torch.arange(indices.shape[-1], device=indices.device, dtype=torch.int64) + first) % indices.shape[-1]

    def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx >= kv_idx

    # the compiled kernel takes the width of the lists for the number of blocks
    listed = F.pad(indices.gather(-1, order.long()).clamp(min=0).int(), (0, grid.blocks - indices.shape[-1]))
    lengths = (grid.q_len, grid.kv_len)
    # a cell of the mask is a query tile and a key block; lists by key block would serve a backward pass only
    mask = BlockMask.from_kv_blocks(
        count,
        listed,
        BLOCK_SIZE=(grid.query_tile, grid.block_size),
        mask_mod=causal,
        seq_lengths=lengths,
        compute_q_blocks=False,
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    def run() -> Tensor:
        return compiled(layer.q, layer.k, layer.v, block_mask=mask, enable_gqa=True)

    return run
