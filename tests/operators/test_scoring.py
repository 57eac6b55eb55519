"""Scores of the two stages against literal definitions, by every way that computes them."""

from __future__ import annotations

import pytest
import torch
from hf_sparse_attn_kernels import Scratch, TileGrid, coarse_scores, fine_mass
from hf_sparse_attn_kernels.torch_kernels import scoring as features

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def case(q_len, past, tile, size, seed=0, dtype=torch.float32, spread=1.0):
    """(queries, keys, grid, tiles, blocks, reps) with empty entries, a partial last block and an incomplete
    first tile.
    """
    grid = TileGrid(q_len, past + q_len, tile, size)
    generator = torch.Generator().manual_seed(seed)
    rows, hg = 4, 3
    count = min(tile, 8)
    reps = torch.arange(count) * tile // count + torch.arange(hg)[:, None] * (tile // count) // hg
    tiles = torch.arange(grid.tiles)
    last = (grid.last_positions() // size)[:, None]
    block = torch.arange(grid.blocks)
    keep = (torch.rand(rows, grid.tiles, grid.blocks, generator=generator) < 0.5) & (block <= last - grid.own_blocks)
    listed = torch.where(keep, block, -1).sort(-1).values
    mine = last - torch.arange(grid.own_blocks - 1, -1, -1)
    blocks = torch.cat([listed, mine.clamp(min=-1).expand(rows, -1, -1)], -1)
    queries = torch.randn(rows, grid.tiles, hg, count, 16, generator=generator) * spread
    keys = torch.randn(rows, grid.kv_len, 16, generator=generator)
    return queries.to(dtype), keys.to(dtype), grid, tiles, blocks, reps


def literal_mass(queries, keys, grid, tiles, blocks, reps):
    mass = torch.zeros(blocks.shape, dtype=torch.float64)
    first = grid.first_positions()
    for row, tile in torch.cartesian_prod(torch.arange(len(queries)), torch.arange(len(tiles))).tolist():
        seen = 0
        for head, rep in torch.cartesian_prod(torch.arange(reps.shape[0]), torch.arange(reps.shape[1])).tolist():
            position = int(first[tiles[tile]] + reps[head, rep])
            if not grid.q_offset <= position < grid.kv_len:
                continue
            seen += 1
            columns, weights = [], []
            for column, b in enumerate(blocks[row, tile].tolist()):
                for key in range(b * grid.block_size, min((b + 1) * grid.block_size, grid.kv_len)):
                    if b >= 0 and key <= position:
                        columns.append(column)
                        weights.append(queries[row, tile, head, rep].double() @ keys[row, key].double())
            p = torch.stack(weights).softmax(0)
            mass[row, tile].index_add_(0, torch.tensor(columns), p)
        mass[row, tile] /= seen
    return mass


WAYS = [("torch", False), ("torch", True), ("cpp", False)]
SIZES = [(100, 0, 64, 16), (40, 50, 16, 32), (3, 60, 1, 16), (90, 37, 64, 16)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("impl", "scratch"), WAYS)
def test_fine_mass_is_the_mean_softmax_mass_of_the_listed_blocks(sizes, impl, scratch):
    arguments = case(*sizes)
    got = fine_mass(*arguments, scratch=Scratch() if scratch else None, impl=impl)
    torch.testing.assert_close(got.double(), literal_mass(*arguments), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]))


@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_scores_beyond_the_range_of_an_exponential_are_shifted(spread, monkeypatch):
    """The mass is the same whether or not the unshifted exponentials overflow or vanish."""
    arguments = case(100, 0, 64, 16, spread=spread)
    created = []
    original = features._unshifted_mass
    monkeypatch.setattr(features, "_unshifted_mass", lambda *args: created.append(original(*args)) or created[-1])
    got = fine_mass(*arguments, scratch=Scratch(), impl="torch")
    assert [x is None for x in created] == [spread > 1]
    for impl in ("torch", "cpp"):
        torch.testing.assert_close(got, fine_mass(*arguments, impl=impl), rtol=1e-4, atol=1e-6)
    assert bool(torch.isfinite(got).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fine_mass_in_low_precision_stays_near_the_exact_one(dtype):
    arguments = case(100, 0, 64, 16, dtype=dtype)
    exact = fine_mass(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments))
    for impl, scratch in WAYS:
        got = fine_mass(*arguments, scratch=Scratch() if scratch else None, impl=impl)
        torch.testing.assert_close(got.double(), exact.double(), rtol=0.05, atol=2e-3)


def test_unlisted_and_later_keys_never_contribute_to_fine_mass():
    queries, keys, grid, tiles, blocks, reps = case(100, 0, 64, 16)
    blocks = torch.where(blocks == 2, -1, blocks)  # no tile lists block 2
    for impl, lent in WAYS:
        scratch = Scratch() if lent else None
        want = fine_mass(queries, keys, grid, tiles, blocks, reps, scratch=scratch, impl=impl)
        poisoned = keys.clone()
        poisoned[:, 32:48] = torch.nan
        poisoned[:, int(reps.max()) + 1 : 64] = torch.nan  # later than every sampled query of tile 0
        got = fine_mass(queries[:, :1], poisoned, grid, tiles[:1], blocks[:, :1], reps, scratch=scratch, impl=impl)
        torch.testing.assert_close(got, want[:, :1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("runs", [1, 8])
@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_coarse_scores_are_the_log_sum_exp_over_the_runs_that_have_tokens(impl, dtype, runs):
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(*s, 16, generator=generator).to(dtype) for s in ((2, 2, 3, runs), (2, 2, 5)))
    real = torch.ones(3, runs, dtype=torch.bool)
    real[0, 1:] = False
    got = coarse_scores(queries, real, keys, 0.5, impl=impl)
    products = torch.einsum("bgmre,bgne->bgmrn", queries.double(), keys.double()) * 0.5
    want = products.masked_fill(~real[..., None], -torch.inf).logsumexp(3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), want, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-5 if dtype == torch.float32 else 0.03
    )
