"""One attention layer of random inputs, with its router: what the benchmarks of a layer run, verify and count."""

# shapes: B batch, H query heads, G KV heads, Hg = H / G, Q queries, D head dim, t queries of one tile

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from hf_sparse_attn_kernels import BlockSelection, TileGrid, block_sparse_attention
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..config import SparseAttentionConfig, fixed_budget
from ..router.module import RoutingInputs, SparseRouter
from ..router.rotary import Rotary
from ..router.selection import select_blocks
from .timing import BenchmarkError

VERIFY_TILES = 3  # tiles of a benchmarked output that are computed again in float64


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a benchmarked layer. ``keys`` fixes the budget;
    if it is None, ``density`` of the visible keys is kept.
    """

    length: int
    keys: int | None = 1024
    density: float = 0.125
    dtype: str = "bfloat16"
    heads: int = 9
    groups: int = 3
    head_dim: int = 64
    batch: int = 1
    block_size: int = 16
    device: str = "cpu"

    @property
    def config(self) -> SparseAttentionConfig:
        if self.keys is not None:
            return SparseAttentionConfig(**fixed_budget(self.keys), block_size=self.block_size)
        return SparseAttentionConfig(density=self.density, block_size=self.block_size)

    @property
    def dense_pairs(self) -> int:
        """Pairs of a query and a key that causal attention reads, per head."""
        return self.length * (self.length + 1) // 2

    @cached_property
    def kept_pairs(self) -> int:
        """The same pairs within the budget (those of a tile's own blocks that are later than the query included)."""
        config = self.config
        pairs = 0
        for first in range(0, self.length, config.query_tile):
            last = min(first + config.query_tile, self.length)
            budget = config.budget_blocks(last) * config.block_size
            # query i sees i + 1 keys, and reads its tile's budget at most
            pairs += sum(min(i + 1, budget) for i in range(first, last))
        return pairs

    @property
    def flops(self) -> int:
        """Useful floating-point operations of the sparse forward pass: two products over the kept pairs."""
        # q·k and p·v: D multiplications and D additions each, 4 · D a pair and head
        return 4 * self.batch * self.heads * self.head_dim * self.kept_pairs


class Layer:
    """Random q, k, v after RoPE and an untrained router: ``q`` are the last ``queries`` of the tokens;
    a single one decodes.
    """

    def __init__(
        self, shape: LayerShape, queries: int | None = None, seed: int = 0, config: SparseAttentionConfig | None = None
    ) -> None:
        self.shape = shape
        queries = shape.length if queries is None else queries
        generator = torch.Generator(device=shape.device).manual_seed(seed)
        dtype = getattr(torch, shape.dtype)
        sizes = ((shape.heads, queries), (shape.groups, shape.length), (shape.groups, shape.length))
        drawn = (
            torch.randn(
                shape.batch, h, n, shape.head_dim, generator=generator, device=shape.device, dtype=torch.float32
            )
            for h, n in sizes
        )
        self.q, self.k, self.v = (x.to(dtype) for x in drawn)
        rope = LlamaRotaryEmbedding(
            LlamaConfig(
                hidden_size=shape.heads * shape.head_dim, num_attention_heads=shape.heads, head_dim=shape.head_dim
            )
        )
        self.router = SparseRouter(config or shape.config, shape.heads, shape.groups, shape.head_dim, Rotary(rope), 0)
        self.router.init_weights()
        self.router.to(shape.device)
        positions = torch.arange(shape.length, device=shape.device, dtype=torch.int64)[None]
        decoding = queries == 1
        with torch.no_grad():  # while decoding, a cache holds the stage-1 keys
            router_keys = self.router.router_keys(self.k, positions).to(dtype) if decoding else None
        self.inputs = RoutingInputs(self.q, self.k, positions, shape.head_dim**-0.5, router_keys)
        self.query_tile = 1 if decoding else self.router.config.query_tile

    def random_gradient(self) -> Tensor:
        """A gradient of the output, [B, H, Q, D]."""
        generator = torch.Generator(device=self.shape.device).manual_seed(1)
        return torch.randn(self.q.shape, generator=generator, device=self.shape.device, dtype=torch.float32).to(
            self.q.dtype
        )

    def select(self) -> BlockSelection:
        return select_blocks(self.router, self.inputs, self.query_tile)

    def attend(self, selection: BlockSelection) -> Tensor:
        return block_sparse_attention(self.q, self.k, self.v, selection)[0]

    def sparse(self) -> Tensor:
        """Selection and attention."""
        return self.attend(self.select())

    def verify(
        self, out: Tensor, selection: BlockSelection, grad_out: Tensor | None = None, dq: Tensor | None = None
    ) -> None:
        """Raise BenchmarkError unless some tiles of ``out``, and of ``dq`` if given, agree with float64 over the
        selected keys.
        """
        hg = self.router.heads // self.router.groups
        for row, group in itertools.product(range(out.shape[0]), range(self.router.groups)):
            # tiles at equal distances, the first and the last among them
            for t in (
                torch.linspace(0, selection.grid.tiles - 1, VERIFY_TILES, dtype=torch.float32, device="cpu")
                .long()
                .tolist()
            ):
                queries = _queries(selection.grid, t)
                at = (row, slice(group * hg, (group + 1) * hg), queries - selection.grid.q_offset)
                want, want_dq = self._exact(
                    at, selection.indices[row, group, t], queries, None if grad_out is None else grad_out[at]
                )
                self._compare("output", out[at], want, t)
                if dq is not None and want_dq is not None:
                    self._compare("gradient of q", dq[at], want_dq, t)

    # p = softmax(scale · q kᵀ) over selected keys up to the query, o = p v, dp = do vᵀ,
    # dq = scale · (p ∘ (dp − Σ_j p ∘ dp)) k: the backward pass of FlashAttention (arXiv:2205.14135)
    def _exact(
        self, at: tuple[int, slice, Tensor], blocks: Tensor, queries: Tensor, do: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Output [Hg, t, D] of the queries at content positions ``queries`` [t], and dq for its gradient ``do``, in
        float64.
        """
        row, heads, _ = at
        size = self.router.config.block_size
        keys = (
            blocks[blocks >= 0].long()[:, None] * size + torch.arange(size, device=blocks.device, dtype=torch.int64)
        ).flatten()
        # the last block may reach beyond the last key
        keys = keys[keys < self.k.shape[2]]
        group = heads.start // (heads.stop - heads.start)
        k, v = (x[row, group, keys].double() for x in (self.k, self.v))
        scores = self.q[at].double() @ k.T * self.inputs.scale
        p = scores.masked_fill(keys > queries.to(keys.device)[:, None], -torch.inf).softmax(-1)
        if do is None:
            return p @ v, None
        dp = do.double() @ v.T
        return p @ v, p * (dp - (p * dp).sum(-1, keepdim=True)) @ k * self.inputs.scale

    def _compare(self, name: str, got: Tensor, want: Tensor, tile: int) -> None:
        error = float((got.double() - want).abs().max())
        # relative to the largest value: an output is a weighted mean of values
        allowed = 32 * torch.finfo(got.dtype).eps * float(self.v.abs().max())
        if not error <= allowed:
            raise BenchmarkError(
                f"the sparse {name} differs from the float64 one by {error:.3g} (allowed {allowed:.3g}) in tile {tile}"
            )


def _queries(grid: TileGrid, tile: int) -> Tensor:
    """Content positions of the queries of a tile."""
    first = int(grid.first_positions()[tile])
    return torch.arange(
        max(first, grid.q_offset), min(first + grid.query_tile, grid.kv_len), dtype=torch.int64, device="cpu"
    )
