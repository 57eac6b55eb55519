"""Operands that do not fit each other, hold nothing, or leave the range of numbers:
refused, empty, or equal to float64.
"""

from __future__ import annotations

import dataclasses
import math

import hf_sparse_attn_kernels as kernels
import pytest
import torch
from hf_sparse_attn_kernels import BlockSelection, TileGrid, block_sparse_attention
from hf_sparse_attn_kernels.cpp_kernels import compiling

from hf_sparse_attn.router.budget import make_plan
from hf_sparse_attn.router.selection import FeatureMaker

ops = torch.ops.hf_sparse_attn_cpp
IMPLEMENTATIONS = ["reference", "torch", "cpp"]
GRID = TileGrid(40, 60, 16, 16)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    assert compiling.unavailable() is None


def every_block(grid, batch=1, groups=1):
    block, last = torch.arange(grid.blocks), grid.last_positions()[:, None] // grid.block_size
    kept = torch.where(block <= last, block, -1).sort(-1).values.int()
    return BlockSelection(kept.expand(batch, groups, -1, -1).contiguous(), grid)


def qkv(grid, batch=2, heads=4, groups=2, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, grid.q_len, width), *(((batch, groups, grid.kv_len, width),) * 2))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


# -- operands that do not fit ------------------------------------------------------------------------------------------

WRONG = {
    "v shorter": lambda q, k, v, i: (q, k, v[:, :, :40], i),
    "v of fewer rows": lambda q, k, v, i: (q, k, v[:1], i),
    "v of fewer heads": lambda q, k, v, i: (q, k, v[:, :1], i),
    "k narrower": lambda q, k, v, i: (q, k[..., :4], v, i),
    "q of fewer rows": lambda q, k, v, i: (q[:1], k, v, i),
    "q of more rows": lambda q, k, v, i: (torch.cat([q, q]), k, v, i),
    "q of fewer queries": lambda q, k, v, i: (q[:, :, :9], k, v, i),
    "q of three dimensions": lambda q, k, v, i: (q[0], k, v, i),
    "k of another dtype": lambda q, k, v, i: (q, k.double(), v, i),
    "indices of fewer tiles": lambda q, k, v, i: (q, k, v, i[:, :, :1]),
    "indices of fewer rows": lambda q, k, v, i: (q, k, v, i[:1]),
    "indices of fewer heads": lambda q, k, v, i: (q, k, v, i[:, :1]),
    "indices in int64": lambda q, k, v, i: (q, k, v, i.long()),
    "a block that does not exist": lambda q, k, v, i: (q, k, v, torch.where(i == 3, 4, i)),
    "blocks out of order": lambda q, k, v, i: (q, k, v, i.flip(-1)),
    "a block twice": lambda q, k, v, i: (q, k, v, torch.where(i == 1, 0, i)),
    "a block of the future": lambda q, k, v, i: (q, k, v, torch.where(i == 1, 3, i).sort(-1).values),
    "integers": lambda q, k, v, i: (q.int(), k.int(), v.int(), i),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", WRONG)
def test_attention_refuses_operands_that_do_not_fit_each_other(impl, name):
    q, k, v, indices = WRONG[name](*qkv(GRID), every_block(GRID, 2, 2).indices)
    with pytest.raises(ValueError):
        block_sparse_attention(q, k, v, BlockSelection(indices, GRID), impl=impl)


@pytest.mark.parametrize("name", WRONG)
def test_the_operator_itself_refuses_them_too(name):
    q, k, v, indices = WRONG[name](*qkv(GRID), every_block(GRID, 2, 2).indices)
    with pytest.raises(ValueError):
        ops.forward(q, k, v, indices.contiguous(), None, None, 16, 16, True, 0.3, 0.0)


def test_an_operand_that_does_not_fit_is_named_with_what_would():
    q, k, v = qkv(GRID)
    indices = every_block(GRID, 2, 2).indices
    with pytest.raises(ValueError, match=r"v is Float \[2, 2, 40, 8\] on cpu: must be Float \[2, 2, 60, \*\] on cpu"):
        ops.forward(q, k, v[:, :, :40], indices, None, None, 16, 16, True, 0.3, 0.0)
    with pytest.raises(ValueError, match=r"v \(2, 2, 40, 8\): must be \[B, H, Q, D\] and twice \[B, G, N, D\]"):
        block_sparse_attention(q, k, v[:, :, :40], BlockSelection(indices, GRID))
    for change, message in (
        ({"query_tile": 0}, "query_tile is 0"),
        ({"block_size": 8}, "block_size is 8"),
        ({"sinks": torch.zeros(3)}, r"sinks is Float \[3\]"),
        ({"sinks": torch.zeros(4).double()}, r"sinks is Double \[4\]"),
    ):
        sizes = {"sinks": None, "query_tile": 16, "block_size": 16, **change}
        with pytest.raises(ValueError, match=message):
            ops.forward(q, k, v, indices, None, **sizes, causal=True, scale=0.3, softcap=0.0)
    with pytest.raises(ValueError, match="the last dimension must be contiguous"):
        ops.forward(q, k, v.transpose(2, 3).contiguous().transpose(2, 3), indices, None, None, 16, 16, True, 0.3, 0.0)


def test_the_backward_operator_refuses_what_does_not_fit():
    q, k, v = qkv(GRID)
    indices, options = every_block(GRID, 2, 2).indices, (16, 16, True, 0.3, 0.0)
    out, lse = ops.forward(q, k, v, indices, None, None, *options)
    good = {"grad_out": out, "grad_lse": lse, "q": q, "k": k, "v": v, "out": out, "lse": lse, "indices": indices}
    ops.backward(*good.values(), None, *options)
    for name in ("grad_out", "grad_lse", "out", "lse", "indices"):
        with pytest.raises(ValueError, match=f"^{name} is"):
            ops.backward(*{**good, name: good[name][:, :, :1].contiguous()}.values(), None, *options)


@pytest.fixture
def features(make_router, routing_inputs):
    """(features of every tile, plan, tiles) of a call with tiles that select."""
    router, inputs = make_router(min_keys=64, density=0.05), routing_inputs(600, batch=1)
    plan = make_plan(router.config, inputs.grid(16, 16), None)
    tiles = torch.arange(plan.grid.tiles)
    assert plan.any_open
    with torch.no_grad():
        return FeatureMaker(router, inputs, plan.grid).features(tiles), plan, tiles


CHANGES = {
    "router_keys of fewer blocks": lambda f: {"router_keys": f.router_keys[:, :, :3]},
    "router_keys narrower": lambda f: {"router_keys": f.router_keys[..., :4]},
    "router_keys of another dtype": lambda f: {"router_keys": f.router_keys.double()},
    "coarse_queries of fewer tiles": lambda f: {"coarse_queries": f.coarse_queries[:, :, :2]},
    "queries of fewer tiles": lambda f: {"queries": f.queries[:, :, :2]},
    "queries narrower": lambda f: {"queries": f.queries[..., :4]},
    "keys of fewer tokens": lambda f: {"keys": f.keys[:, :, :64]},
    "keys of fewer heads": lambda f: {"keys": f.keys[:, :1]},
    "reps of more queries": lambda f: {"reps": f.reps.repeat(1, 50)},
    "reps outside of the tile": lambda f: {"reps": f.reps + 16},
    "reps in int32": lambda f: {"reps": f.reps.int()},
    "real of fewer tiles": lambda f: {"real": f.real[:2]},
    "real of numbers": lambda f: {"real": f.real.float()},
    "exhaustive beyond the heads": lambda f: {"exhaustive": (2,)},
    "exhaustive below the heads": lambda f: {"exhaustive": (-1, 0)},
}


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_selection_refuses_features_that_do_not_fit_the_plan(features, impl, name):
    good, plan, tiles = features
    kernels.select_blocks(good, plan, tiles, impl=impl)
    with pytest.raises(ValueError, match=name.split()[0] + "|queries|dtype"):
        kernels.select_blocks(dataclasses.replace(good, **CHANGES[name](good)), plan, tiles, impl=impl)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_tiles_that_do_not_exist_or_are_out_of_order_are_refused(features, impl):
    good, plan, tiles = features
    for wrong in (tiles + 1, tiles - 1, tiles.flip(0), tiles.int(), torch.zeros_like(tiles)):
        with pytest.raises(ValueError, match="tiles"):
            kernels.select_blocks(good, plan, wrong, impl=impl)
    part = good.part(slice(0, 1))
    for wrong in (torch.tensor([len(tiles)]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="tiles"):
            kernels.select_blocks(part, plan, wrong, impl=impl)


def test_budgets_that_leave_the_blocks_are_refused_by_the_operator(features):
    f, plan, tiles = features
    tensors = (f.coarse_queries, f.real, f.router_keys, f.queries, f.reps, f.keys, tiles, [1], 600, 16, 16)
    ops.select(*tensors, plan.sink, plan.columns, plan.width, None)
    for row, value in ((1, -1), (1, 10**12), (2, 38), (2, -(10**12)), (4, -1), (5, 10**12), (5, -3)):
        columns = plan.columns.clone()
        columns[row, -1] = value
        with pytest.raises(ValueError, match=r"budgets|router_keys|blocks of its list"):
            ops.select(*tensors, plan.sink, columns, plan.width, None)
    with pytest.raises(ValueError, match="sink is -1"):
        ops.select(*tensors, -1, plan.columns, plan.width, None)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_scores_refuse_what_does_not_fit(features, impl):
    f, plan, tiles = features
    grid, q, k = plan.grid, torch.randn(1, 4, 600, 16), torch.randn(1, 2, 600, 16)
    blocks = torch.zeros(2, len(tiles), 4, dtype=torch.int64)
    queries, keys = f.queries.flatten(0, 1), f.keys.flatten(0, 1)
    with pytest.raises(ValueError, match="real is"):
        kernels.coarse_scores(f.coarse_queries, f.real[:2], f.router_keys, 1.0, impl=impl)
    with pytest.raises(ValueError, match="router_keys is"):
        kernels.coarse_scores(f.coarse_queries, f.real, f.router_keys[:, :1], 1.0, impl=impl)
    for changed in (
        (q[:, :3], k),
        (q[:, :, :300], k),
        (q, k[:, :, :300]),
        (q[..., :8], k),
        (q.expand(2, -1, -1, -1), k),
    ):
        with pytest.raises(ValueError, match=r"k is|q is|cannot share"):
            kernels.block_mass(*changed, grid, tiles, 0.25, impl=impl)
    kernels.fine_mass(queries, keys, grid, tiles, blocks, f.reps, impl=impl)
    for wrong in (blocks[:, :3], blocks[:1], blocks + 38, blocks - 2, blocks.int()):
        with pytest.raises(ValueError, match="blocks"):
            kernels.fine_mass(queries, keys, grid, tiles, wrong, f.reps, impl=impl)
    with pytest.raises(ValueError, match="queries is"):
        kernels.fine_mass(queries[:, :3], keys, grid, tiles, blocks, f.reps, impl=impl)
    with pytest.raises(ValueError, match=r"k is .*block_size=0|block_size"):
        kernels.pooled_features(k, 0, impl=impl)


# -- nothing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "width", "q_len", "kv_len"),
    [
        (0, 4, 2, 8, 40, 60),
        (2, 0, 0, 8, 40, 60),
        (2, 0, 2, 8, 40, 60),
        (2, 4, 2, 0, 40, 60),
        (2, 4, 2, 8, 0, 60),
        (2, 4, 2, 8, 0, 0),
    ],
)
def test_attention_over_nothing_is_empty_and_has_gradients(impl, batch, heads, groups, width, q_len, kv_len):
    grid = TileGrid(q_len, kv_len, 16, 16)
    leaves = [x.requires_grad_() for x in qkv(grid, batch, heads, groups, width)]
    out, lse = block_sparse_attention(*leaves, every_block(grid, batch, groups), impl=impl, return_lse=True)
    assert out.shape == leaves[0].shape and lse.shape == out.shape[:3] and not out.numel()
    out.sum().backward()
    assert all(leaf.grad.shape == leaf.shape and not leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("sinks", [None, torch.zeros(4)])
def test_empty_lists_give_zeros(impl, sinks):
    q, k, v = (x.requires_grad_() for x in qkv(GRID))
    nothing = BlockSelection(every_block(GRID, 2, 2).indices[..., :0], GRID)
    out, lse = block_sparse_attention(q, k, v, nothing, impl=impl, sinks=sinks, return_lse=True)
    assert out.shape == q.shape and not out.any() and bool((lse == (-torch.inf if sinks is None else 0.0)).all())
    out.sum().backward()
    assert not any(x.grad.any() for x in (q, k, v))


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize(("batch", "groups", "length"), [(0, 2, 60), (2, 0, 60), (2, 2, 0), (2, 2, 7)])
def test_features_and_scores_of_nothing_are_empty(impl, batch, groups, length):
    k, tiles = torch.randn(batch, groups, length, 8), torch.arange(-(-length // 16))
    grid = TileGrid(length, length, 16, 16)
    assert kernels.pooled_features(k, 16, impl=impl).shape == (batch, groups, length // 16, 24)
    assert kernels.block_mass(k, k, grid, tiles, 1.0, impl=impl).shape == (batch, groups, len(tiles), len(tiles))
    assert kernels.block_mass(k, k, grid, tiles[:0], 1.0, impl=impl).shape == (batch, groups, 0, len(tiles))
    queries, real = torch.randn(batch, groups, 3, 2, 8), torch.ones(3, 2, dtype=torch.bool)
    assert kernels.coarse_scores(queries, real, k, 1.0, impl=impl).shape == (batch, groups, 3, length)
    none = torch.zeros(batch * groups, 0, 3, dtype=torch.int64)
    queries, reps = torch.randn(batch * groups, 0, 2, 4, 8), torch.zeros(2, 4, dtype=torch.int64)
    assert kernels.fine_mass(queries, k.flatten(0, 1), grid, tiles[:0], none, reps, impl=impl).shape == none.shape


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_a_selection_of_no_tiles_is_empty(features, impl):
    f, plan, tiles = features
    indices, scores = kernels.select_blocks(f.part(slice(0, 0)), plan, tiles[:0], impl=impl)
    assert indices.shape == scores.shape == (1, 2, 0, plan.width) and indices.dtype == torch.int32


# -- the ends of the range ---------------------------------------------------------------------------------------------


def assert_as_in_float64(q, k, v, impl, tolerance=1e-4, grid=GRID, **options):
    selection = every_block(grid, *k.shape[:2])
    got, got_lse = block_sparse_attention(q, k, v, selection, impl=impl, return_lse=True, **options)
    want, want_lse = block_sparse_attention(
        *(x.double() for x in (q, k, v)), selection, impl="reference", return_lse=True, **options
    )
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance, equal_nan=True)
    most = torch.finfo(torch.float32).max
    want_lse = torch.where(want_lse.abs() > most, want_lse * torch.inf, want_lse)
    torch.testing.assert_close(got_lse.double(), want_lse, rtol=tolerance, atol=tolerance, equal_nan=True)


TILES = [GRID, TileGrid(1, 60, 1, 16)]


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("grid", TILES, ids=["prompt", "one query"])
@pytest.mark.parametrize("size", [1e3, 1e7, 1e9, 3e9, 1e10, 1e20, 1e37, 1e38])
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_any_size_weigh_as_in_float64(impl, grid, size, sign):
    q, k, v = qkv(grid)
    q, k = torch.full_like(q, sign * size), torch.ones_like(k)
    k[:, :, ::3] += 0.5  # some keys are ahead by far, the others equal
    assert_as_in_float64(q, k, v, impl, grid=grid)
    assert_as_in_float64(q, torch.ones_like(k), v, impl, grid=grid)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("grid", TILES, ids=["prompt", "one query"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30, -1e30])
def test_values_beyond_numbers_show_where_they_are_seen_and_only_there(impl, grid, value):
    for at in range(3):
        tensors = qkv(grid)
        tensors[at][0, 0, -1 if at == 0 else 17, 3] = value
        assert_as_in_float64(*tensors, impl, grid=grid)
    assert_as_in_float64(*qkv(grid), impl, grid=grid, sinks=torch.tensor([value, 0.0, 1.0, -2.0]))


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_products_that_leave_float32_are_weighed_all_the_same(impl):
    q, k, v = qkv(GRID)
    assert_as_in_float64(q * 1e30, k * 1e30, v, impl)
    assert_as_in_float64(q, k, torch.full_like(v, 3e38), impl)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("grid", TILES, ids=["prompt", "one query"])
@pytest.mark.parametrize("size", [100.0, 300.0, 6e4])
def test_products_beyond_float16_are_weighed_all_the_same(impl, grid, size):
    q, k, v = qkv(grid, dtype=torch.float16)
    assert_as_in_float64(torch.full_like(q, size), torch.full_like(k, size), v, impl, 5e-3, grid)
    assert_as_in_float64(torch.full_like(q, -size), torch.full_like(k, size), v, impl, 5e-3, grid)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("scale", [0.0, 1e-30, -1e-20, 1e12, -1e12])
def test_scales_of_any_size_weigh_as_in_float64(impl, scale):
    assert_as_in_float64(*qkv(GRID), impl, scale=scale)


def test_gradients_beyond_float16_are_those_of_float64():
    q, k, v = qkv(GRID, dtype=torch.float16)
    result = []
    for dtype, impl in ((torch.float16, "torch"), (torch.float16, "cpp"), (torch.float64, "reference")):
        leaves = [
            x.to(dtype, copy=True).requires_grad_() for x in (torch.full_like(q, 300), torch.full_like(k, 300), v)
        ]
        block_sparse_attention(*leaves, every_block(GRID, 2, 2), impl=impl)[0].sum().backward()
        result.append(leaves[2].grad.double())
    for got in result[:2]:
        torch.testing.assert_close(got, result[2], rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("size", [1e4, 1e12, 1e30])
def test_mass_and_scores_of_any_size_equal_float64(impl, size):
    q, k, _ = qkv(GRID)
    tiles = torch.arange(GRID.tiles)
    want = kernels.block_mass((q * size).double(), k.double(), GRID, tiles, 1.0, impl="torch")
    torch.testing.assert_close(kernels.block_mass(q * size, k, GRID, tiles, 1.0, impl=impl), want, rtol=1e-4, atol=1e-4)
    queries, real = q[:, :2, :12].unflatten(2, (3, 4)) * size, torch.ones(3, 4, dtype=torch.bool)
    want = kernels.coarse_scores(queries.double(), real, k.double(), 1.0, impl="torch")
    torch.testing.assert_close(kernels.coarse_scores(queries, real, k, 1.0, impl=impl), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -1e30])
def test_a_score_beyond_numbers_is_that_of_torch(value):
    queries, real, keys = (
        torch.ones(1, 1, 3, 2, 8),
        torch.tensor([[True, True], [True, False], [False, False]]),
        torch.ones(1, 1, 5, 8),
    )
    keys[0, 0, 2] = value
    want = kernels.coarse_scores(queries, real, keys, 1.0, impl="torch")
    torch.testing.assert_close(kernels.coarse_scores(queries, real, keys, 1.0, impl="cpp"), want, equal_nan=True)


def test_bfloat16_that_starts_at_an_odd_element_is_read_where_it_stands():
    q, k, v = qkv(GRID, dtype=torch.bfloat16)
    want = block_sparse_attention(q, k, v, every_block(GRID, 2, 2), impl="cpp")[0]
    odd = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, v)]
    assert torch.equal(block_sparse_attention(*odd, every_block(GRID, 2, 2), impl="cpp")[0], want)
