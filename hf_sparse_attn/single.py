"""Routing of one query per row, the decode step: the same stages in as few tensor operations as it takes.

A tile of 64 spreads the cost of many small operations over 64 queries; a decode step cannot. Everything that does not
depend on data is plain integers here, nothing is masked, and what all layers share is computed once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from hf_sparse_attn_kernels import BlockSelection, TileGrid, gather_visible, hide_after, ordered_topk
from torch import Tensor

from .plan import TileBudget, tile_budget
from .router import RoutingInputs, SparseRouter


def select_single(router: SparseRouter, inputs: RoutingInputs, grid: TileGrid) -> BlockSelection:
    """`select_blocks` for the one query per row of a call with tiles of 1."""
    budget = tile_budget(router.config, grid.kv_len - 1, grid.kv_len - 1)
    rows = (inputs.k.shape[0], router.groups, 1)
    device = inputs.k.device
    if budget.eligible <= budget.free:
        blocks = torch.arange(grid.blocks, device=device, dtype=torch.int32).expand(*rows, -1)
        return BlockSelection(blocks.contiguous(), grid, torch.full(blocks.shape, torch.nan, device=device))
    coarse = _coarse(router, inputs, budget)
    candidates = (ordered_topk(coarse, budget.candidates) + budget.sink).sort(-1).values
    forced, always = _constants(budget, len(candidates), device)
    blocks = torch.cat([candidates, forced], -1)
    mass = _fine(router, inputs, blocks)
    chosen = ordered_topk(mass[:, : budget.candidates], budget.free)
    kept = torch.cat([chosen, always], -1)
    indices, order = blocks.gather(-1, kept).sort(-1)
    scores = mass.gather(-1, kept.gather(-1, order))
    return BlockSelection(indices.int().view(*rows, -1), grid, scores.view(*rows, -1))


@lru_cache(maxsize=16)  # every layer of a step asks for the same ones
def _constants(budget: TileBudget, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The forced blocks, and the columns where they stand behind the candidates: int64 [rows, forced] each."""
    forced = torch.cat([torch.arange(budget.sink, device=device), torch.arange(budget.near, budget.last + 1, device=device)])
    columns = torch.arange(len(forced), device=device) + budget.candidates
    return forced.expand(rows, -1), columns.expand(rows, -1)


def _coarse(router: SparseRouter, inputs: RoutingInputs, budget: TileBudget) -> Tensor:
    """Stage-1 scores of the eligible blocks: float32 [B·G, eligible]."""
    batch, groups = inputs.k.shape[:2]
    q = inputs.q[:, :, 0].float()
    at = inputs.positions[:, -1:]
    if router.rotary is not None:
        q = q @ router.rotary.unrotation(at, router.head_dim)
    queries = torch.bmm(q.view(batch, groups, -1).transpose(0, 1), router.wq.float().transpose(1, 2)).transpose(0, 1)
    if router.rotary is not None:
        queries = queries @ router.rotary.rotation(at, queries.shape[-1])
    keys = router.router_keys(inputs.k, inputs.positions).to(inputs.k.dtype) if inputs.router_keys is None else inputs.router_keys
    queries = (queries * inputs.scale).to(keys.dtype).reshape(batch * groups, 1, -1)
    eligible = keys.flatten(0, 1)[:, budget.sink : budget.near]
    if keys.dtype == torch.float32:  # a vector times a matrix is fast from the left in float32, from the right in bfloat16
        return torch.bmm(queries, eligible.transpose(1, 2))[:, 0]
    return torch.bmm(eligible, queries.transpose(1, 2))[..., 0]


def _fine(router: SparseRouter, inputs: RoutingInputs, blocks: Tensor) -> Tensor:
    """Stage-2 mass of ``blocks`` [B·G, L], the last of which is the query's own: float32 [B·G, L], sums to 1."""
    batch, groups, n, d = inputs.k.shape
    size = router.config.block_size
    q = inputs.q.float().view(batch, groups, -1, d)
    queries = (q @ router.wq_index.float().transpose(1, 2) @ router.wk_index.float() * inputs.scale).to(inputs.k.dtype)
    keys = gather_visible(inputs.k, blocks, size)
    scores = torch.bmm(queries.view(batch * groups, -1, d), keys.transpose(1, 2))
    hide_after(scores, n, size)
    return torch.softmax(scores, -1, dtype=torch.float32).mean(1).view(*blocks.shape, size).sum(-1)
