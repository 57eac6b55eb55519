"""Features, tile scores and block mass in Triton against the plain torch code."""

from __future__ import annotations

import hf_sparse_attn_kernels as plain
import pytest
import torch
from hf_sparse_attn_kernels import TileGrid
from hf_sparse_attn_kernels.triton_kernels import routing

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.plan import TilePlan
from hf_sparse_attn.router import RoutingInputs, SparseRouter
from hf_sparse_attn.selecting import TwoStageScorer


def make_router(device, tile, size, heads=6, groups=2, head_dim=16):
    config = SparseAttentionConfig(
        block_size=size,
        query_tile=max(tile, 16),
        sink=16,
        local=size,
        dense_below=0,
        query_samples=8,
        index_dim=8,
        min_keys=512,
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
    got = routing.pooled_features(k, size)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(got, plain.pooled_features(k, size), rtol=rounding, atol=rounding)


@pytest.mark.parametrize(
    ("q_len", "past", "tile", "size"), [(250, 0, 64, 16), (63, 111, 16, 32), (3, 200, 1, 16), (100, 37, 128, 16), (1, 15, 64, 16)]
)
def test_coarse_scores(inputs, device, q_len, past, tile, size):
    grid = TileGrid(q_len, past + q_len, tile, size)
    router = make_router(device, tile, size)
    q, k, _ = inputs(grid)
    positions = torch.arange(grid.kv_len, device=device)[None]
    tiles = torch.arange(grid.tiles, device=device)
    features = router.query_features(plain.to_tiles(q, grid, 2), positions, grid, tiles)
    router_keys = router.router_keys(k, positions).detach()
    want = router.coarse_scores(features, router_keys, 0.25).detach()
    got = routing.coarse_scores(features[0].detach(), features[1], router_keys, 0.25)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("q_len", "past", "tile", "size"), [(250, 0, 64, 16), (63, 111, 16, 32), (3, 200, 1, 16), (100, 37, 64, 128)])
def test_fine_mass(inputs, device, q_len, past, tile, size):
    grid = TileGrid(q_len, past + q_len, tile, size)
    router = make_router(device, tile, size)
    q, k, _ = inputs(grid)
    scorer = TwoStageScorer(
        router, RoutingInputs(q, k, torch.arange(grid.kv_len, device=device)[None], 0.25), TilePlan.make(router.config, grid, device)
    )
    tiles = torch.arange(grid.tiles, device=device)
    candidates = scorer.plan.best(scorer.coarse(tiles), tiles, scorer.plan.candidates[tiles])
    blocks = torch.cat([candidates, scorer.plan.forced_blocks(tiles).expand(2, 2, -1, -1)], -1).flatten(0, 1)
    assert bool((blocks < 0).any()) or tile == 1 or size == 128
    reps = router.representatives(grid, device)
    heads = torch.arange(3, device=device)[:, None]
    queries = router.index_queries(scorer.q_tiles[:, tiles[:, None, None], heads, reps], scorer.fold).detach() * 0.25
    keys = scorer.keys.detach()
    want = router.fine_mass(queries, keys, scorer.plan, tiles, blocks, reps)
    got = routing.fine_mass(queries, keys, grid, tiles, blocks, reps)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]))
    again = routing.fine_mass(queries, keys, grid, tiles, blocks, reps)
    assert torch.equal(got, again)


@pytest.mark.parametrize(("q_len", "past", "tile", "size"), [(250, 0, 64, 16), (63, 111, 16, 32), (3, 200, 1, 16), (100, 37, 64, 128)])
@pytest.mark.parametrize("head_dim", [16, 80])
def test_block_mass(inputs, device, q_len, past, tile, size, head_dim):
    grid = TileGrid(q_len, past + q_len, tile, size)
    q, k, _ = inputs(grid, head_dim=head_dim)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    tiles = torch.randperm(grid.tiles, generator=torch.Generator().manual_seed(0))[:3].to(device)
    want = plain.block_mass(q, k, grid, tiles, 0.5)
    torch.testing.assert_close(routing.block_mass(q, k, grid, tiles, 0.5), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_block_mass_in_half_precision_is_as_exact_as_in_torch(inputs, device, dtype):
    grid = TileGrid(111, 150, 64, 16)
    q, k, _ = inputs(grid, head_dim=64, dtype=dtype)
    tiles = torch.arange(grid.tiles, device=device)
    exact = plain.block_mass(q.double(), k.double(), grid, tiles, 0.3)
    error, allowed = ((f(q, k, grid, tiles, 0.3) - exact).square().mean().sqrt().item() for f in (routing.block_mass, plain.block_mass))
    assert error <= 1.1 * allowed + 1e-6


def test_the_operators_pass_opcheck(inputs, device):
    grid = TileGrid(63, 63, 16, 16)
    q, k, _ = inputs(grid)
    names = ("test_schema", "test_faketensor")
    torch.library.opcheck(routing.pooled_features, (k, 16), test_utils=names)
    queries = torch.randn(2, 2, 3, 8, 16, device=device)
    real = torch.ones(3, 8, dtype=torch.bool, device=device)
    torch.library.opcheck(routing.coarse_scores, (queries, real, torch.randn(2, 2, 5, 16, device=device), 0.5), test_utils=names)
    tiles, reps = torch.arange(2, device=device), torch.arange(16, device=device).repeat(3)
    sampled = plain.to_tiles(q, grid, 2)[:, tiles].flatten(2, 3)
    for blocks in (None, torch.zeros(4, 2, 3, dtype=torch.int64, device=device)):
        torch.library.opcheck(routing.candidate_mass, (sampled, k, blocks, tiles, reps, 63, 16, 16, 0.5), test_utils=names)
