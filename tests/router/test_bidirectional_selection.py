"""Selection without causality: forced links on both sides, blocks after the tile, a partial last block."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import tiny_models
from hf_sparse_attn_kernels import block_mass, block_sparse_attention
from hf_sparse_attn_kernels import select_blocks as kernel_select

from hf_sparse_attn import distill, sparsify
from hf_sparse_attn.evaluation.baselines import Oracle, WindowAndSink
from hf_sparse_attn.router.budget import make_plan
from hf_sparse_attn.router.selection import FeatureMaker, select_blocks
from hf_sparse_attn.training.router_loss import kept_mass

LENGTHS = (208, 205, 193, 40, 7)


@pytest.fixture
def two_sided(routing_inputs):
    def make(length, **options):
        return replace(routing_inputs(length, batch=2, **options), causal=False)

    return make


@pytest.fixture
def exact(make_router):
    """A router whose second stage is the oracle: every block is a candidate, every query is scored, at full rank."""
    return make_router(min_keys=112, candidate_factor=100.0, query_samples=16, index_dim=16)


def distances(grid):
    """Tokens between each block and each tile, [n, nb]: 0 where they touch."""
    first, last = grid.first_positions()[:, None], grid.last_positions()[:, None]
    block = torch.arange(grid.blocks) * grid.block_size
    ahead, behind = block - last, first - (block + grid.block_size - 1)
    return torch.maximum(torch.maximum(ahead, behind), torch.zeros(()))


@pytest.mark.parametrize("length", LENGTHS)
def test_forced_links_lie_on_both_sides_and_the_budget_holds(two_sided, exact, length):
    inputs, config = two_sided(length), exact.config
    selection = select_blocks(exact, inputs)
    kept, grid = selection.kept(), selection.grid
    assert not grid.causal
    forced = distances(grid) <= config.local
    forced[:, : -(-config.sink // config.block_size)] = True
    if length % config.block_size:
        forced[:, -1] = True  # it has no summary
    assert bool((kept | ~forced).all())
    budget = max(config.budget_blocks(length), int(forced.sum(-1).max()))
    assert int(kept.sum(-1).max()) <= budget
    assert int(kept.sum(-1).min()) == min(config.budget_blocks(length), grid.blocks)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("tile", [16, 1])
def test_an_exact_router_selects_what_the_oracle_selects(two_sided, exact, length, tile):
    inputs = two_sided(length)
    got, want = (select(exact, inputs, tile) for select in (select_blocks, Oracle()))
    assert torch.equal(got.indices, want.indices)


@pytest.mark.parametrize("length", [208, 205])
def test_the_teacher_is_the_softmax_mass_of_all_keys(two_sided, length):
    inputs = two_sided(length)
    grid = inputs.grid(16, 16)
    mass = block_mass(inputs.q, inputs.k, grid, torch.arange(grid.tiles), inputs.scale)
    p = torch.softmax(inputs.q @ inputs.k.repeat_interleave(2, 1).transpose(-1, -2) * inputs.scale, -1)
    p = torch.nn.functional.pad(p, (0, -length % 16)).unflatten(-1, (-1, 16)).sum(-1).unflatten(1, (2, 2)).mean(2)
    want = torch.stack([part.mean(2) for part in p.split(16, 2)], 2)
    torch.testing.assert_close(mass, want, rtol=1e-5, atol=1e-6)


def test_window_and_sink_keeps_the_nearest_blocks_of_both_sides(two_sided, exact):
    inputs = two_sided(208)
    selection = WindowAndSink()(exact, inputs, 16)
    kept, middle = selection.kept()[0, 0, 6], torch.arange(13)
    assert torch.equal(kept, (middle == 0) | ((middle >= 3) & (middle <= 8)) | ((middle >= 4) & (middle <= 9)) & kept)
    assert int(kept.sum()) == 7


def test_selection_beats_the_window_where_the_mass_is_far_away(two_sided, make_router):
    inputs = two_sided(400, seed=3)
    inputs.k[:, :, 320:336] = inputs.q[:, ::2, :1] * 2  # all heads' first queries look far ahead
    router = make_router(min_keys=112, query_samples=16, index_dim=16)
    plan, tiles = make_plan(router.config, inputs.grid(16, 16)), torch.arange(25)
    mass = block_mass(inputs.q, inputs.k, plan.grid, tiles, inputs.scale)
    ours, theirs = (
        kept_mass(mass, select(router, inputs, 16).indices)[:, :, 0].mean()
        for select in (select_blocks, WindowAndSink())
    )
    assert ours > theirs + 0.05


@pytest.mark.parametrize("impl", ["cpp", "triton"])
def test_compiled_scores_that_are_named_are_refused(two_sided, exact, impl):
    inputs = two_sided(205)
    grid = inputs.grid(16, 16)
    plan, tiles = make_plan(exact.config, grid), torch.arange(grid.tiles)
    features = FeatureMaker(exact, inputs, grid).features(tiles)
    with pytest.raises(ValueError, match=f'impl="{impl}": bidirectional attention is not supported.*impl="torch"'):
        kernel_select(features, plan, tiles, impl=impl)


def test_the_attention_over_a_selection_equals_the_reference(two_sided, exact):
    inputs = two_sided(205)
    selection = select_blocks(exact, inputs)
    v = torch.randn(inputs.k.shape, generator=torch.Generator().manual_seed(5))
    got, want = (block_sparse_attention(inputs.q, inputs.k, v, selection, impl=impl)[0] for impl in (None, "reference"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_min_keys_must_hold_what_a_bidirectional_layer_forces(real_budget):
    settings = {**real_budget, "local": 32, "min_keys": 96}  # enough for a causal layer
    sparsify(tiny_models.tiny_model("llama"), settings)
    with pytest.raises(ValueError, match="min_keys is 96: must be >= 112 for a bidirectional model"):
        sparsify(tiny_models.tiny_model("bert"), settings)


@pytest.mark.parametrize("model_type", ["modernbert", "bert"])
def test_a_bidirectional_model_is_distilled(model_type, real_budget):
    model = sparsify(tiny_models.tiny_model(model_type), {**real_budget, "min_keys": 112})
    batch = {"input_ids": torch.randint(3, 95, (2, 400), generator=torch.Generator().manual_seed(0))}
    report = distill(model, [batch] * 12)
    loss = [row["kl_coarse"] + row["kl_fine"] for row in report.log]
    assert sum(loss[-3:]) < 0.95 * sum(loss[:3])
    assert report.log[-1]["recovered_share"] > 0.3
