"""Random calls of the C++ operators, right and wrong ones: right ones equal float64, wrong ones raise, and no call
leaves its tensors.

`make test-sanitizers` runs it on a library that AddressSanitizer and UndefinedBehaviorSanitizer watch, where a read or
write next to a tensor ends the process. A case is a number: `python tests/sanitizers/fuzz_kernels.py --first 1234
--cases 1` runs it again.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import math
import random

import torch
from hf_sparse_attn_kernels import (
    BlockSelection,
    TileGrid,
    block_mass,
    block_sparse_attention,
    coarse_scores,
    fine_mass,
    join_documents,
    pooled_features,
)
from hf_sparse_attn_kernels.cpp_kernels import compiling
from hf_sparse_attn_kernels.torch_kernels.scoring import (
    block_mass_torch,
    coarse_scores_torch,
    fine_mass_torch,
    pooled_features_torch,
)

ops = torch.ops.hf_sparse_attn_cpp
TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Case:
    """Random sizes and tensors of one call; the same for the same number."""

    def __init__(self, number):
        self.draw = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)
        self.dtype = self.draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
        self.batch, self.groups, self.per_group = (self.few(3) for _ in range(3))
        self.width = 2 * self.few(20)
        block = self.draw.choice([16, 16, 32, 64, 128])
        tile = self.draw.choice([1, 4, 16, 64, 128])
        tile = tile if tile % block == 0 or block % tile == 0 else block
        kv_len = self.few(300)
        q_len = 1 if self.draw.random() < 0.2 and kv_len else self.draw.randint(min(1, kv_len), kv_len)
        self.grid = TileGrid(q_len, kv_len, tile, block, self.draw.random() < 0.8)

    def few(self, most):
        """A number up to ``most``, now and then 0."""
        return 0 if self.draw.random() < 0.03 else self.draw.randint(1, most)

    def tensor(self, *shape, scale=1.0):
        x = (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)
        return self.laid_out(x)

    def laid_out(self, x):
        """``x`` in memory in another way: at an odd element, with gaps, with another order of dimensions,
        or expanded.
        """
        kind = self.draw.randrange(6)
        if kind == 0:
            room = x.new_empty(x.numel() + 1)
            return room[1:].view(x.shape).copy_(x)
        if kind == 1:
            return torch.cat([x, x], -2)[..., : x.shape[-2], :] if x.shape[-2] else x
        if kind == 2 and x.dim() >= 3:
            return x.transpose(-3, -2).contiguous().transpose(-3, -2)
        if kind == 3:
            return torch.cat([x, x.new_zeros(*x.shape[:-1], 1)], -1)[..., :-1]
        if kind == 4 and x.shape[0]:
            return x[:1].expand(x.shape)
        return x

    def extreme(self, *tensors):
        """Some entries of some tensors are huge, infinite or NaN; none that all must be compared with."""
        value = self.draw.choice([1e3, 1e10, 1e30, -1e30, math.inf, -math.inf, math.nan])
        for x in tensors:
            if self.draw.random() < 0.15 and x.numel():
                x.view(-1)[self.draw.randrange(x.numel())] = (
                    min(max(value, -6e4), 6e4) if x.dtype == torch.float16 else value
                )

    def lists(self, grid, batch):
        """Random lists of every row of a call."""
        block = torch.arange(grid.blocks)
        last = (
            (grid.last_positions() // grid.block_size)[:, None]
            if grid.causal
            else torch.full((grid.tiles, 1), grid.blocks - 1)
        )
        shape = (batch, self.groups, grid.tiles, grid.blocks)
        keep = (torch.rand(shape, generator=self.generator) < self.draw.random()) & (block <= last)
        return torch.where(keep, block, -1).sort(-1).values.int()[..., self.draw.randint(0, grid.blocks) :].contiguous()

    def selection(self):
        """Random lists of every row, or of documents: rows cut at random, with gaps, in any order."""
        if self.draw.random() < 0.5:
            return BlockSelection(self.lists(self.grid, self.batch), self.grid)
        grid, places = self.grid, []
        for row in range(self.batch):
            cuts = sorted(
                {0, grid.kv_len, *(self.draw.randint(0, grid.kv_len) for _ in range(self.draw.randint(0, 4)))}
            )
            places += [(row, first, end) for first, end in itertools.pairwise(cuts) if self.draw.random() < 0.8]
        self.draw.shuffle(places)
        if not places:
            return BlockSelection(
                torch.empty(0, self.groups, 0, 1, dtype=torch.int32), grid, None, torch.empty(0, 3, dtype=torch.int64)
            )
        parts = []
        for _, first, end in places:
            queries = max(end - max(first, grid.q_offset), 0)
            part = TileGrid(queries, end - first, grid.query_tile, grid.block_size, grid.causal)
            parts.append(BlockSelection(self.lists(part, 1), part))
        return join_documents(parts, torch.tensor(places), grid.q_len, grid.kv_len)

    def samples(self):
        """(queries [B, G, m, Hg, r, E], reps, tiles) of some tiles."""
        grid = self.grid
        per_head = self.draw.randint(1, min(grid.query_tile, 6))
        reps = torch.randint(0, grid.query_tile, (self.per_group, per_head), generator=self.generator)
        tiles = torch.arange(grid.tiles)[torch.rand(grid.tiles, generator=self.generator) < 0.7]
        queries = (
            torch.randn(self.batch, self.groups, len(tiles), *reps.shape, self.width, generator=self.generator) * 0.3
        ).to(self.dtype)
        return queries, reps, tiles


def spoiled(case, arguments):
    """The arguments of a call with one or two of them changed so that they (most likely) do not fit."""
    arguments = list(arguments)
    for _ in range(case.draw.randint(1, 2)):
        at = case.draw.randrange(len(arguments))
        x = arguments[at]
        if isinstance(x, torch.Tensor):
            arguments[at] = spoiled_tensor(case, x)
        elif isinstance(x, bool) or x is None:
            continue
        else:
            number = case.draw.choice([-1, 0, 1, 3, 17, 4096, 1 << 31, (1 << 62) + 1])
            arguments[at] = [number] if isinstance(x, list) else type(x)(number)
    return arguments


def spoiled_tensor(case, x):
    kind = case.draw.randrange(7)
    dim = case.draw.randrange(x.dim()) if x.dim() else 0
    if kind <= 1 and x.dim() and x.shape[dim]:
        return x.narrow(dim, 0, case.draw.randrange(x.shape[dim])).contiguous()
    if kind == 2 and x.dim():
        return torch.cat([x, x], dim)
    if kind == 3:
        return x.to(
            case.draw.choice([torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.bool])
        )
    if kind == 4 and not x.is_floating_point() and x.dtype != torch.bool and x.numel():
        x = x.clone().contiguous()
        x.view(-1)[case.draw.randrange(x.numel())] = case.draw.choice(
            [-7, -1, 0, 5, 1 << 20, torch.iinfo(x.dtype).max, torch.iinfo(x.dtype).min]
        )
        return x
    if kind == 5 and x.dim() > 1:
        return x.transpose(0, -1)
    return x[0] if x.dim() and x.shape[0] else x.unsqueeze(0)


def compare(name, got, want, dtype):
    """``got`` equals the float64 result, NaN and infinities included."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, not {tuple(want.shape)}"
    most = torch.finfo(dtype).max
    want = torch.where(want.abs() > most, want * math.inf, want)
    torch.testing.assert_close(
        got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def attention(case, wrong):
    grid, heads = case.grid, case.groups * case.per_group
    q = case.tensor(case.batch, heads, grid.q_len, case.width)
    k, v = (case.tensor(case.batch, case.groups, grid.kv_len, case.width) for _ in range(2))
    selection = case.selection()
    sinks = torch.randn(heads, generator=case.generator) if case.draw.random() < 0.3 else None
    softcap = case.draw.choice([None, None, 2.0])
    scale = case.draw.choice([None, 0.2, -0.3, 0.0])
    if wrong:
        options = (grid.query_tile, grid.block_size, grid.causal, 0.2, softcap or 0.0)
        ops.forward(*spoiled(case, (q, k, v, selection.indices, selection.documents, sinks, *options)))
        return
    spoil = case.draw.random() < 0.3
    if spoil:
        q, k, v = (x.clone().contiguous() for x in (q, k, v))
        case.extreme(q, k, v)
    results = []
    for dtype, impl in ((case.dtype, "cpp"), (torch.float64, "reference")):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        extra = None if sinks is None else sinks.clone().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        out, lse = block_sparse_attention(
            *leaves, selection, scale=scale, softcap=softcap, sinks=extra, impl=impl, return_lse=True
        )
        seen = lse.isfinite()
        loss = out.masked_fill(~seen[..., None], 0).sum() + lse.masked_fill(~seen, 0).sum()
        if loss.requires_grad:  # documents of the reference that have no queries leave no graph
            loss.backward()
        results.append([out, lse, *(leaf.new_zeros(leaf.shape) if leaf.grad is None else leaf.grad for leaf in leaves)])
    for name, got, want in list(zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True))[: 2 if spoil else 5]:
        compare(name, got, want, torch.float32 if name == "lse" and case.dtype == torch.float32 else case.dtype)


def gradients(case, wrong):
    """The backward operator by itself."""
    grid, heads = case.grid, case.groups * case.per_group
    q = case.tensor(case.batch, heads, grid.q_len, case.width)
    k, v = (case.tensor(case.batch, case.groups, grid.kv_len, case.width) for _ in range(2))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    options = (grid.query_tile, grid.block_size, grid.causal, 0.2, 0.0)
    selection = case.selection()
    lists = (selection.indices, selection.documents)
    out, lse = ops.forward(q, k, v, *lists, None, *options)
    arguments = (torch.randn_like(out), lse.new_zeros(lse.shape), q, k, v, out, lse, *lists, *options)
    ops.backward(*(spoiled(case, arguments) if wrong else arguments))


def features(case, wrong):
    k = case.tensor(case.batch, case.groups, case.grid.kv_len, case.width)
    if wrong:
        ops.pooled_features(*spoiled(case, (k, case.grid.block_size)))
        return
    compare(
        "features",
        pooled_features(k, case.grid.block_size, impl="cpp"),
        pooled_features_torch(k.double(), case.grid.block_size),
        case.dtype,
    )


def coarse(case, wrong):
    tiles, runs, blocks = case.few(40), case.draw.choice([1, 2, 8]), case.few(200)
    queries = case.tensor(case.batch, case.groups, tiles, runs, case.width, scale=0.3)
    keys = case.tensor(case.batch, case.groups, blocks, case.width)
    real = torch.rand(tiles, runs, generator=case.generator) < 0.8
    real[:, 0] |= runs == 1
    if wrong:
        ops.coarse_scores(*spoiled(case, (queries.contiguous(), real, keys)))
        return
    want = coarse_scores_torch(queries.double(), real, keys.double(), 1.0)
    compare("coarse", coarse_scores(queries, real, keys, 1.0, impl="cpp"), want, case.dtype)


def fine(case, wrong):
    grid = case.grid = TileGrid(case.grid.q_len, case.grid.kv_len, case.grid.query_tile, case.grid.block_size)
    queries, reps, tiles = case.samples()
    keys = case.tensor(case.batch, case.groups, grid.kv_len, case.width)
    last = (grid.last_positions() // grid.block_size)[tiles][:, None]
    listed = case.lists(grid, case.batch)[:, :, tiles].long()
    listed = torch.where(listed <= last - grid.own_blocks, listed, -1).sort(-1).values
    mine = (last - torch.arange(grid.own_blocks - 1, -1, -1)).clamp(min=-1).expand(case.batch, case.groups, -1, -1)
    blocks = torch.cat([listed, mine], -1).flatten(0, 1)
    if wrong:
        ops.block_mass(
            *spoiled(case, (queries, reps, keys, tiles, blocks, grid.q_len, grid.query_tile, grid.block_size))
        )
        return
    inputs = (queries.flatten(0, 1), keys.flatten(0, 1))
    got = fine_mass(*inputs, grid, tiles, blocks, reps, impl="cpp")
    if got.numel():
        compare("fine", got, fine_mass_torch(*(x.double() for x in inputs), grid, tiles, blocks, reps), case.dtype)


def teacher(case, wrong):
    grid = case.grid = TileGrid(case.grid.q_len, case.grid.kv_len, case.grid.query_tile, case.grid.block_size)
    queries, reps, tiles = case.samples()
    q = case.tensor(case.batch, case.groups * case.per_group, grid.q_len, case.width)
    k = case.tensor(case.batch, case.groups, grid.kv_len, case.width)
    if wrong:
        ops.block_mass(*spoiled(case, (queries, reps, k, tiles, None, grid.q_len, grid.query_tile, grid.block_size)))
        return
    got = block_mass(q, k, grid, tiles, 0.2, impl="cpp")
    if got.numel() and case.per_group:
        compare("teacher", got, block_mass_torch(q.double(), k.double(), grid, tiles, 0.2), case.dtype)


def select(case, wrong):
    """Both stages; of a right call the lists are ascending, hold what is forced, and keep what the budgets say."""
    grid = case.grid = TileGrid(case.grid.q_len, case.grid.kv_len, case.grid.query_tile, case.grid.block_size)
    queries, reps, tiles = case.samples()
    keys = case.tensor(case.batch, case.groups, grid.kv_len, case.width)
    runs, sink, m = case.draw.choice([1, 4]), case.draw.randint(0, 2), len(tiles)
    coarse_queries = (torch.randn(case.batch, case.groups, m, runs, case.width, generator=case.generator) * 0.3).to(
        case.dtype
    )
    router_keys = case.tensor(case.batch, case.groups, grid.blocks, case.width)
    last = (grid.last_positions() // grid.block_size)[tiles]
    near = ((grid.first_positions() - case.draw.randint(0, 64)).clamp(min=0) // grid.block_size)[tiles]
    eligible = (near - sink).clamp(min=0)
    free = torch.minimum(eligible, torch.randint(0, 4, (m,), generator=case.generator))
    budgets = torch.stack([torch.full_like(near, sink), near, last, eligible, free, torch.minimum(eligible, free * 2)])
    width = int((last + 1 - eligible + budgets[5]).max()) if m else 0
    threshold = case.draw.choice([None, 0.05])
    exhaustive = [head for head in range(case.groups) if case.draw.random() < 0.3]
    sizes = (exhaustive, grid.q_len, grid.query_tile, grid.block_size, sink)
    arguments = (
        coarse_queries,
        torch.ones(m, runs, dtype=torch.bool),
        router_keys,
        queries,
        reps,
        keys,
        tiles,
        *sizes,
        budgets,
        width,
    )
    if wrong:
        ops.select(*spoiled(case, arguments), threshold)
        return
    indices, _ = ops.select(*(x.contiguous() if isinstance(x, torch.Tensor) else x for x in arguments), threshold)
    assert bool(((indices[..., 1:] > indices[..., :-1]) | (indices[..., 1:] < 0)).all()), "lists are not ascending"
    kept, block = (indices[..., None] == torch.arange(grid.blocks)).any(-2), torch.arange(grid.blocks)
    forced = ((block < sink) & (block <= last[:, None])) | ((block >= near[:, None]) & (block <= last[:, None]))
    assert bool((kept | ~forced).all()), "a forced block is missing"
    if threshold is None and case.per_group:
        assert bool(((kept & ~forced).sum(-1) == free).all()), "the budget is not what was kept"


KINDS = (attention, attention, gradients, features, coarse, fine, teacher, select)


def run(number):
    """One case; returns what it was and how it ended."""
    case = Case(number)
    kind = KINDS[number % len(KINDS)]
    wrong = case.draw.random() < 0.5
    try:
        kind(case, wrong)
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        if not wrong or (
            not isinstance(error, ValueError) and "Expected" not in str(error) and "memory" not in str(error)
        ):
            raise
        return kind.__name__, "refused"
    return kind.__name__, "fits after all" if wrong else "right"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    reason = compiling.unavailable()
    assert reason is None, reason
    ended = collections.Counter()
    for number in range(options.first, options.first + options.cases):
        try:
            ended[run(number)] += 1
        except BaseException:
            print(f"case {number}", flush=True)
            raise
    for (kind, how), count in sorted(ended.items()):
        print(f"{kind:10} {how:15} {count}")


if __name__ == "__main__":
    main()
