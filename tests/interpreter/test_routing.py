"""Features, tile scores and block mass in Triton against the plain torch code."""

from __future__ import annotations

import hf_sparse_attn_kernels as plain
import pytest
import torch
from helpers.agreement import assert_same_up_to_ties
from hf_sparse_attn_kernels import TileGrid, implementations
from hf_sparse_attn_kernels.triton_kernels import routing

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.router.budget import make_plan
from hf_sparse_attn.router.module import RoutingInputs, SparseRouter
from hf_sparse_attn.router.selection import FeatureMaker, select_blocks


def make_router(device, tile, size, heads=6, groups=2, head_dim=16, min_keys=512):
    config = SparseAttentionConfig(
        block_size=size,
        query_tile=max(tile, 16),
        sink=16,
        local=size,
        dense_below=0,
        query_samples=8,
        index_dim=8,
        min_keys=min_keys,
        density=0.3,
    )
    router = SparseRouter(config, heads, groups, head_dim, None, layer=0)
    router.init_weights()
    with torch.no_grad():
        for weight in router.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return router.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("length", "size", "head_dim"), [(250, 16, 80), (128, 128, 64), (111, 32, 16), (15, 16, 16)])
def test_pooled_features(inputs, length, size, head_dim, dtype):
    _, k, _ = inputs(TileGrid(length, length, 64, 16), head_dim=head_dim, dtype=dtype)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    got = plain.pooled_features(k, size, impl="triton")
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(got, plain.pooled_features(k, size, impl="torch"), rtol=rounding, atol=rounding)


@pytest.mark.parametrize(
    ("q_len", "past", "tile", "size"),
    [(250, 0, 64, 16), (63, 111, 16, 32), (3, 200, 1, 16), (100, 37, 128, 16), (1, 15, 64, 16)],
)
def test_coarse_scores(inputs, device, q_len, past, tile, size):
    grid = TileGrid(q_len, past + q_len, tile, size)
    router = make_router(device, tile, size)
    q, k, _ = inputs(grid)
    positions = torch.arange(grid.kv_len, device=device)[None]
    tiles = torch.arange(grid.tiles, device=device)
    features = router.query_features(plain.to_tiles(q, grid, 2), positions, grid, tiles)
    router_keys = router.router_keys(k, positions).detach()
    queries, real = features[0].detach(), features[1]
    want, got = (plain.coarse_scores(queries, real, router_keys, 0.25, impl=impl) for impl in ("torch", "triton"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    # as a bfloat16 model keeps them; only `torch` rounds the products
    low = (queries.bfloat16(), real, router_keys.bfloat16(), 0.25)
    exact = plain.coarse_scores(low[0].double(), real, low[2].double(), 0.25, impl="torch")
    torch.testing.assert_close(plain.coarse_scores(*low, impl="triton").double(), exact.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("q_len", "past", "tile", "size"), [(250, 0, 64, 16), (63, 111, 16, 32), (3, 200, 1, 16), (100, 37, 64, 128)]
)
def test_fine_mass(inputs, device, q_len, past, tile, size):
    grid = TileGrid(q_len, past + q_len, tile, size)
    router = make_router(device, tile, size)
    q, k, _ = inputs(grid)
    call = RoutingInputs(q, k, torch.arange(grid.kv_len, device=device)[None], 0.25)
    tiles, plan = torch.arange(grid.tiles, device=device), make_plan(router.config, grid, device)
    with torch.no_grad():
        features = FeatureMaker(router, call, grid).features(tiles)
    candidates = plan.best(plain.stage_one_scores(features, plan, tiles), tiles, plan.candidates[tiles])
    blocks = torch.cat([candidates, plan.forced_blocks(tiles).expand(2, 2, -1, -1)], -1).flatten(0, 1)
    assert bool((blocks < 0).any()) or tile == 1 or size == 128
    queries, keys, reps = features.queries.flatten(0, 1), features.keys.flatten(0, 1), features.reps
    want, got = (plain.fine_mass(queries, keys, grid, tiles, blocks, reps, impl=impl) for impl in ("torch", "triton"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]))
    again = plain.fine_mass(queries, keys, grid, tiles, blocks, reps, impl="triton")
    assert torch.equal(got, again)


@pytest.mark.parametrize(
    ("q_len", "past", "tile", "size"), [(250, 0, 64, 16), (63, 111, 16, 32), (3, 200, 1, 16), (100, 37, 64, 128)]
)
@pytest.mark.parametrize("head_dim", [16, 80])
def test_block_mass(inputs, device, q_len, past, tile, size, head_dim):
    grid = TileGrid(q_len, past + q_len, tile, size)
    q, k, _ = inputs(grid, head_dim=head_dim)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    tiles = torch.randperm(grid.tiles, generator=torch.Generator().manual_seed(0))[:3].sort().values.to(device)
    want, got = (plain.block_mass(q, k, grid, tiles, 0.5, impl=impl) for impl in ("torch", "triton"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_block_mass_in_half_precision_is_as_exact_as_in_torch(inputs, device, dtype):
    grid = TileGrid(111, 150, 64, 16)
    q, k, _ = inputs(grid, head_dim=64, dtype=dtype)
    tiles = torch.arange(grid.tiles, device=device)
    exact = plain.block_mass(q.double(), k.double(), grid, tiles, 0.3, impl="torch")
    mass = (plain.block_mass(q, k, grid, tiles, 0.3, impl=impl) for impl in ("triton", "torch"))
    error, allowed = ((x - exact).square().mean().sqrt().item() for x in mass)
    assert error <= 1.1 * allowed + 1e-6


@pytest.mark.parametrize("retrieval_heads", [(), ((0, 1),)])
@pytest.mark.parametrize(("q_len", "past", "tile", "size"), [(600, 0, 64, 16), (130, 470, 64, 32), (5, 595, 1, 16)])
def test_a_router_keeps_the_same_blocks_up_to_ties_whoever_scores(
    inputs, device, monkeypatch, q_len, past, tile, size, retrieval_heads
):
    """Blocks that only one implementation keeps have a score within 1e-5 relative of the tile's threshold."""
    grid = TileGrid(q_len, past + q_len, tile, size)
    router = make_router(device, tile, size, min_keys=128)
    router.config = router.config.changed(retrieval_heads=retrieval_heads, candidate_factor=1.0)
    q, k, _ = inputs(grid)
    call = RoutingInputs(q, k, torch.arange(grid.kv_len, device=device)[None], 0.25)
    selections = {}
    for impl in ("torch", "triton"):
        monkeypatch.setattr(implementations, "default_choice", lambda device_type, impl=impl: (impl, ""))
        selections[impl] = select_blocks(router, call, tile)
    assert_same_up_to_ties(selections["triton"], selections["torch"], make_plan(router.config, grid, device))


@pytest.mark.parametrize(("q_len", "past", "tile", "size"), [(600, 0, 64, 16), (5, 595, 1, 16)])
def test_a_threshold_keeps_the_same_blocks_whoever_scores_and_attention_takes_such_lists(
    inputs, device, monkeypatch, q_len, past, tile, size
):
    grid = TileGrid(q_len, past + q_len, tile, size)
    router = make_router(device, tile, size, min_keys=256)
    q, k, v = inputs(grid)
    call = RoutingInputs(q, k, torch.arange(grid.kv_len, device=device)[None], 0.25)
    monkeypatch.setattr(implementations, "default_choice", lambda device_type: ("torch", ""))
    router.config = router.config.changed(mass_threshold=1e-37)
    every = select_blocks(router, call, tile)
    masses = every.scores[every.indices >= 0].nan_to_num(1.0).sort().values
    middle = masses[len(masses) // 4 : len(masses) // 2].log()
    at = int(middle.diff().argmax())  # a threshold that is far from the mass of any block
    router.config = router.config.changed(mass_threshold=float((middle[at] + middle[at + 1]).div(2).exp()))
    want = select_blocks(router, call, tile)
    monkeypatch.setattr(implementations, "default_choice", lambda device_type: ("triton", ""))
    got = select_blocks(router, call, tile)
    assert torch.equal(got.indices, want.indices) and len((got.indices >= 0).sum(-1).unique()) > 2
    outputs = [plain.block_sparse_attention(q, k, v, got, impl=impl)[0] for impl in ("triton", "reference")]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_scores_of_triton_are_refused_by_name_where_a_gradient_is_wanted(inputs, device):
    _, k, _ = inputs(TileGrid(64, 64, 64, 16))
    with pytest.raises(ValueError, match="scores have no gradient"):
        plain.pooled_features(k.requires_grad_(), 16, impl="triton")
    with pytest.raises(ValueError, match=r"width 300.*up to 256"):
        plain.pooled_features(torch.zeros(1, 1, 16, 300, device=device), 16, impl="triton")
    with pytest.raises(ValueError, match=r"'reference'.*torch, cpp, triton"):
        plain.pooled_features(k, 16, impl="reference")


def test_the_operators_pass_opcheck(inputs, device):
    grid = TileGrid(63, 63, 16, 16)
    q, k, _ = inputs(grid)
    names = ("test_schema", "test_faketensor")
    torch.library.opcheck(routing.pooled_features, (k, 16), test_utils=names)
    queries = torch.randn(2, 2, 3, 8, 16, device=device)
    real = torch.ones(3, 8, dtype=torch.bool, device=device)
    torch.library.opcheck(
        routing.coarse_scores, (queries, real, torch.randn(2, 2, 5, 16, device=device), 0.5), test_utils=names
    )
    tiles, reps = torch.arange(2, device=device), torch.arange(16, device=device).repeat(3)
    sampled = plain.to_tiles(q, grid, 2)[:, tiles].flatten(2, 3)
    for blocks in (None, torch.zeros(4, 2, 3, dtype=torch.int64, device=device)):
        torch.library.opcheck(
            routing.candidate_mass, (sampled, k, blocks, tiles, reps, 63, 16, 16, 0.5), test_utils=names
        )
