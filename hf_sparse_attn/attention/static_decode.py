"""One token after a static cache, with shapes that do not depend on how much of the cache is filled.

Everywhere else budgets and lists follow the number of keys, which the host has to know. Here it stays on the device: a
step waits for nothing, can be captured in a CUDA graph and is traced by torch.compile into the graph around it. It
keeps what `select_blocks` keeps. The cost is that stage 1 scores all blocks of the cache, filled or not, and that lists
are as long as the longest budget's.

Shape legend: B batch, G KV heads, Hg query heads of one, N slots, S block size, nb blocks, D head dim, L listed blocks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from hf_sparse_attn_kernels import ordered_topk
from torch import Tensor

from ..config import SparseAttentionConfig
from ..router.budget import tile_budget
from ..router.module import RoutingInputs, SparseRouter
from ..router.single_query import coarse_queries, mapped_queries
from .call import Attention


class BudgetTable(NamedTuple):
    """Budgets of a single query by the number of keys.

    ``rows`` int64 [N + 1, 4] holds sink, near, free and candidates (see `TileBudget`) of a query that sees as many keys
    as the row's number; the other fields are the largest of a row: what lists must have room for.
    """

    rows: Tensor
    sinks: int
    close: int
    free: int
    candidates: int


@lru_cache(maxsize=8)  # every layer of a model asks for the same one
def budget_table(config: SparseAttentionConfig, slots: int, device: torch.device) -> BudgetTable:
    """The table for a cache of ``slots`` slots. Below ``dense_below`` keys all blocks are kept."""
    rows, close = [(0, 0, 0, 0)], 0
    # the query at `position` sees position + 1 keys; row 0 is never read
    for position in range(slots):
        budget = tile_budget(config, position, position)
        dense = position + 1 < config.dense_below
        free, candidates = (budget.eligible, budget.eligible) if dense else (budget.free, budget.candidates)
        rows.append((budget.sink, budget.near, free, max(free, candidates)))
        close = max(close, budget.last - budget.near + 1)
    sinks, free, candidates = (max(row[i] for row in rows) for i in (0, 2, 3))
    return BudgetTable(torch.tensor(rows, dtype=torch.int64, device=device), sinks, close, free, candidates)


def wanted(device: torch.device) -> bool:
    """Whether the host should not have to know how much of a cache is filled:
    on an accelerator it would wait for it.
    """
    return device.type != "cpu"


def supports(router: SparseRouter, request: Attention) -> bool:
    """Whether steps can be made this way: causal, without padding, by budgets of the config, in a layer that is not
    dense.
    """
    unmasked = request.attention_mask is None and request.cu_seq_lens is None
    return unmasked and request.causal and router.budgets is None and router.layer not in router.config.dense_layers


def decode(
    router: SparseRouter,
    router_keys: Tensor,
    table: BudgetTable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    request: Attention,
) -> Tensor:
    """Attention of ``query`` [B, H, 1, D] to the kept ones of the first ``request.filled`` keys: [B, H, 1, D].

    ``key`` and ``value`` [B, G, N, D] are all slots of the cache; ``router_keys`` [B, G, nb, R] are written where the
    query's block is.
    """
    size, filled, heads = router.config.block_size, request.filled, router.retrieval_heads
    assert filled is not None
    with torch.no_grad():
        # the budget of this many keys, and the summary of the query's block
        sink, near, free, candidates = table.rows.index_select(0, filled.view(1))[0].unbind()
        last = (filled - 1) // size
        at = filled.view(1, 1) - 1 if request.position_ids is None else request.position_ids[:, -1:]
        _summarise(router, router_keys, key, at, filled, last)
        inputs = RoutingInputs(query, key, at, request.scale)

        # stage 1: s_b = scale · ρ · κ_b, the log-sum-exp over the only run; forced and later blocks are hidden
        queries = (coarse_queries(router, inputs) * request.scale).to(key.dtype).flatten(0, 1)
        coarse = torch.bmm(router_keys.flatten(0, 1), queries.transpose(1, 2))[..., 0].float()
        block = torch.arange(coarse.shape[-1], device=key.device, dtype=torch.int64)
        fine = (mapped_queries(router, inputs) * request.scale).to(key.dtype).flatten(0, 1)
        # retrieval heads have no stage 1: their candidates are the best of all blocks by what stage 2 computes
        whole = {head: _mass_of_all(_of_head(fine, key, head), key[:, head], size, filled) for head in heads}
        for head in heads:
            _of_head(coarse, key, head).copy_(whole[head])
        coarse = coarse.masked_fill((block < sink) | (block >= near), -torch.inf)
        passed, exists = _first(ordered_topk(coarse, min(table.candidates, coarse.shape[-1])), candidates)
        passed, order = torch.where(exists, passed, coarse.shape[-1]).sort(-1)  # ties go to the lower block
        exists = exists.gather(-1, order)
        forced, stays = _forced(table, sink, near, last, len(coarse))
        blocks = torch.cat([passed.clamp(max=coarse.shape[-1] - 1), forced], -1)

        # stage 2: the candidates with most mass, forced blocks in the softmax but not to be chosen
        mass = _mass(fine, key, blocks, torch.cat([exists, stays], -1), size, filled)[:, : passed.shape[-1]]
        for head in heads:
            _of_head(mass, key, head).copy_(whole[head].gather(-1, _of_head(blocks, key, head)[:, : passed.shape[-1]]))
        chosen, keeps = _chosen(
            mass.masked_fill(~exists, -torch.inf), table, free, router.config.mass_threshold, near - sink <= free
        )
        listed = torch.cat([blocks.gather(-1, chosen), forced], -1)
        kept = torch.cat([keeps & exists.gather(-1, chosen), stays], -1)
    return _attend(query, key, value, listed, kept, size, request)


def _first(index: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """``index`` [.., C], and which of them are among the first ``count``."""
    return index, (torch.arange(index.shape[-1], device=index.device, dtype=torch.int64) < count).expand_as(index)


def _summarise(
    router: SparseRouter, router_keys: Tensor, key: Tensor, at: Tensor, filled: Tensor, last: Tensor
) -> None:
    """Write the stage-1 key of the block that the query is in, which holds once the block is full;
    until then nobody reads it.
    """
    size = router.config.block_size
    # the block's slots; their positions are counted from the query's
    slots = last * size + torch.arange(size, device=key.device, dtype=torch.int64)
    summary = router.router_keys(
        key.index_select(2, slots.clamp(max=key.shape[2] - 1)), at + slots - (filled - 1), "torch"
    )
    router_keys.index_copy_(2, last.view(1), summary.to(router_keys.dtype))


def _forced(table: BudgetTable, sink: Tensor, near: Tensor, last: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(the forced blocks [rows, F], which of these exist): sinks, then those up to the query's own, each once."""
    sinks = torch.arange(table.sinks, device=last.device, dtype=torch.int64)
    close = last - torch.arange(table.close - 1, -1, -1, device=last.device, dtype=torch.int64)
    # a sink block that is also near stands among the near ones
    exist = torch.cat([(sinks < sink) & (sinks < near), close >= near])
    return torch.cat([sinks, close.clamp(min=0)]).expand(rows, -1), exist.expand(rows, -1)


def _slots(blocks: Tensor, size: int, slots: int) -> Tensor:
    """The slots of ``blocks`` [B·G, L]: [B·G, L·S]; beyond the cache its last one, which the caller hides."""
    inside = torch.arange(size, device=blocks.device, dtype=torch.int64)
    return (blocks[..., None] * size + inside).flatten(1).clamp(max=slots - 1)


def _hidden(blocks: Tensor, real: Tensor, size: int, filled: Tensor) -> Tensor:
    """Boolean [B·G, 1, L·S]: the slot holds no key, or its block is not real."""
    slots = blocks[..., None] * size + torch.arange(size, device=blocks.device, dtype=torch.int64)
    return ((slots >= filled) | ~real[..., None]).flatten(1)[:, None]


def _gathered(x: Tensor, slots: Tensor) -> Tensor:
    """Rows ``slots`` [B·G, M] of ``x`` [B, G, N, D]: [B·G, M, D]."""
    return x.flatten(0, 1).gather(1, slots[..., None].expand(-1, -1, x.shape[-1]))


# m_b = mean over the heads of Σ_{j ∈ b} softmax_j(scale · (U q) · (V k_j)); queries hold scale, U and V.
def _mass(queries: Tensor, key: Tensor, blocks: Tensor, real: Tensor, size: int, filled: Tensor) -> Tensor:
    """Stage 2: softmax mass of each block, averaged over the ``queries`` [B·G, Hg, D]: float32 [B·G, L]."""
    scores = torch.bmm(queries, _gathered(key, _slots(blocks, size, key.shape[2])).transpose(1, 2))
    scores = scores.masked_fill(_hidden(blocks, real, size, filled), -torch.inf)
    mass = torch.softmax(scores, -1, dtype=torch.float32).mean(1)
    return mass.view(*blocks.shape, size).sum(-1)


def _of_head(rows: Tensor, key: Tensor, head: int) -> Tensor:
    """What ``rows`` [B·G, ...] hold of a KV head, [B, ...]: a view."""
    by_row: Tensor = rows.unflatten(0, key.shape[:2])
    return by_row[:, head]


def _mass_of_all(queries: Tensor, keys: Tensor, size: int, filled: Tensor) -> Tensor:
    """The same of every block, filled or not, for ``keys`` [r, N, D]: float32 [r, nb]."""
    slot = torch.arange(keys.shape[1], device=keys.device, dtype=torch.int64)
    scores = torch.bmm(queries, keys.transpose(1, 2)).masked_fill(slot >= filled, -torch.inf)
    mass = torch.softmax(scores, -1, dtype=torch.float32).mean(1)
    by_block: Tensor = torch.nn.functional.pad(mass, (0, -keys.shape[1] % size)).unflatten(-1, (-1, size))
    return by_block.sum(-1)


def _chosen(
    mass: Tensor, table: BudgetTable, free: Tensor, threshold: float | None, all_kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Columns of ``mass`` [B·G, C] that stage 2 decides for, and which of them count; ``all_kept``:
    there is nothing to decide.
    """
    if threshold is None:
        return _first(ordered_topk(mass, min(table.free, mass.shape[-1])), free)
    return torch.arange(mass.shape[-1], device=mass.device, dtype=torch.int64).expand_as(mass), (
        mass >= threshold
    ) | all_kept


# out = Σ_j softmax_j(s_j) · v_j with s_j = scale · q · k_j, or softcap · tanh(s_j / softcap).
def _attend(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, real: Tensor, size: int, request: Attention
) -> Tensor:
    """Softmax attention to the keys of the ``blocks`` [B·G, L] that are ``real``."""
    assert request.filled is not None
    slots = _slots(blocks, size, key.shape[2])
    grouped = query[:, :, 0].reshape(len(blocks), -1, query.shape[-1])
    scores = torch.bmm(grouped, _gathered(key, slots).transpose(1, 2)).float() * request.scale
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    scores = scores.masked_fill(_hidden(blocks, real, size, request.filled), -torch.inf)
    if request.sinks is not None:
        # a sink is one more logit, which takes its share of the weights and has no value
        sinks = request.sinks.float().view(1, key.shape[1], -1, 1).expand(len(query), -1, -1, -1).flatten(0, 1)
        weights = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    return torch.bmm(weights.to(value.dtype), _gathered(value, slots)).reshape(query.shape)
