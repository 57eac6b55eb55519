"""Workloads for ``kernels benchmark``: one operation each, with the result that it must have.

The comparison with other kernels, router included, is ``hf-sparse-attn bench`` of the plugin.
"""

from __future__ import annotations

import torch
from kernels.benchmark import Benchmark


class BlockSparseAttentionBenchmark(Benchmark):
    """Attention over 512 kept keys, and the scores that a router makes, for 24 query and 8 KV heads."""

    seed: int = 0
    length = 2048
    kept = 32  # blocks of 16 keys that a tile keeps

    def _inputs(self, queries: int, query_tile: int) -> None:
        dtype = torch.float32 if str(self.device) == "cpu" else torch.bfloat16
        heads = ((24, queries), (8, self.length), (8, self.length))
        self.q, self.k, self.v = (torch.randn(1, h, n, 128, device=self.device, dtype=dtype) for h, n in heads)
        self.grid = self.kernel.TileGrid(queries, self.length, query_tile, 16)
        last = self.grid.last_positions(self.q.device) // 16
        scores = torch.rand(1, 8, self.grid.tiles, self.grid.blocks, device=self.device, dtype=torch.float32)
        block = torch.arange(self.grid.blocks, device=self.device, dtype=torch.int64)
        scores = scores.masked_fill(block > last[:, None], -1) + (block > last[:, None] - self.grid.own_blocks) * (
            block <= last[:, None]
        )
        best = self.kernel.ordered_topk(scores, self.kept)
        indices = torch.where(scores.gather(-1, best) >= 0, best, -1).sort(-1).values.int()
        self.selection = self.kernel.BlockSelection(indices, self.grid)

    def setup_prefill(self) -> None:
        self._inputs(self.length, 64)

    def benchmark_prefill(self) -> None:
        self.out, _ = self.kernel.block_sparse_attention(self.q, self.k, self.v, self.selection)

    def verify_prefill(self) -> torch.Tensor:
        return self.kernel.block_sparse_attention(self.q, self.k, self.v, self.selection, impl="reference")[0]

    def setup_decode(self) -> None:
        self._inputs(1, 1)

    def benchmark_decode(self) -> None:
        self.benchmark_prefill()

    def verify_decode(self) -> torch.Tensor:
        return self.verify_prefill()

    def setup_teacher(self) -> None:
        self._inputs(self.length, 64)
        self.tiles = torch.arange(0, self.grid.tiles, 4, device=self.device, dtype=torch.int64)

    def benchmark_teacher(self) -> None:
        self.out = self.kernel.block_mass(self.q, self.k, self.grid, self.tiles, 128**-0.5)

    def verify_teacher(self) -> torch.Tensor:
        return self.kernel.block_mass(self.q, self.k, self.grid, self.tiles, 128**-0.5, impl="torch")
