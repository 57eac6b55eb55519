"""Top-k, tiles, the budget arithmetic, kept masks, pooled features and block mass, each against a literal
definition.
"""

from __future__ import annotations

import math

import pytest
import torch
from hf_sparse_attn_kernels import BlockSelection, TileGrid, block_mass, ordered_topk, pooled_features
from hf_sparse_attn_kernels.torch_kernels import scoring as features
from hypothesis import assume, given
from hypothesis import strategies as st

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.router.budget import make_plan, select_by_scores

# -- ordered_topk ---------------------------------------------------------------------------------------------------

SPECIAL = (0.0, -0.0, math.nan, math.inf, -math.inf, 1.0, -1.0, 1.0000001, 1e-45, -1e-45)


def topk_oracle(scores, k):
    """A stable sort: best first, ties to the lower index, NaN as −inf."""
    clean = [-math.inf if math.isnan(s) else s for s in scores]
    return sorted(range(len(clean)), key=lambda i: (-clean[i], i))[:k]


@given(st.lists(st.sampled_from(SPECIAL) | st.floats(width=32), min_size=1, max_size=40), st.data())
def test_ordered_topk_is_a_stable_sort(scores, data):
    k = data.draw(st.integers(0, len(scores)))
    index = ordered_topk(torch.tensor(scores), k)
    assert index.tolist() == topk_oracle(torch.tensor(scores).tolist(), k)  # rounded to float32


def test_ordered_topk_gives_ties_to_the_lower_index_in_long_rows_and_every_row():
    scores = torch.randint(0, 5, (3, 4, 3000), generator=torch.Generator().manual_seed(0)).float()
    index = ordered_topk(scores, 700)
    want = torch.sort(scores, dim=-1, descending=True, stable=True)
    assert torch.equal(index, want.indices[..., :700])


def test_ordered_topk_of_bfloat16_ties():
    scores = torch.tensor([1.0, 1.001, 1.002, 0.5, 1.0]).bfloat16()  # the first three and the last are one bfloat16
    assert ordered_topk(scores, 4).tolist() == [0, 1, 2, 4]


# -- TileGrid -------------------------------------------------------------------------------------------------------


@given(
    q_len=st.integers(1, 300),
    past=st.integers(0, 300),
    tiling=st.sampled_from(((64, 16), (16, 64), (1, 16), (128, 128), (32, 16))),
)
def test_tile_grid_counts_tiles_from_the_first_token(q_len, past, tiling):
    tile, size = tiling
    grid = TileGrid(q_len, past + q_len, tile, size)
    members = {}  # content tile -> queries in it
    for position in range(past, past + q_len):
        members.setdefault(position // tile, []).append(position)
    assert grid.q_offset == past and grid.tiles == len(members)
    assert grid.first_positions().tolist() == [t * tile for t in members]
    assert grid.last_positions().tolist() == [queries[-1] for queries in members.values()]
    assert grid.lead == past % tile
    assert grid.blocks == len({position // size for position in range(past + q_len)})
    mine = [{p // size for p in range(t * tile, queries[-1] + 1)} for t, queries in members.items()]
    assert max(map(len, mine)) <= grid.own_blocks


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1, 5, 64, 16), "q_len=-1"),
        ((5, 5, 0, 16), "query_tile=0"),
        ((6, 5, 64, 16), "kv_len=5"),
        ((5, 5, 48, 32), "query_tile=48"),
    ],
)
def test_tile_grid_refuses_impossible_lengths(values, message):
    with pytest.raises(ValueError, match=message):
        TileGrid(*values)


# -- budget and forced links ----------------------------------------------------------------------------------------


@st.composite
def plans(draw):
    """A config, a grid (query tile of the config, or 1) of any past and length."""
    values = {
        "block_size": draw(st.sampled_from((16, 32, 64, 128))),
        "query_tile": draw(st.sampled_from((1, 16, 32, 64, 128))),
        "sink": draw(st.integers(0, 200)),
        "local": draw(st.integers(0, 300)),
        "density": draw(st.floats(0.01, 1)),
        "candidate_factor": draw(st.floats(1, 5)),
    }
    forced = SparseAttentionConfig(**values, min_keys=10**6).forced_keys
    values["min_keys"] = forced + draw(st.integers(0, 300))
    values["max_keys"] = draw(st.none() | st.integers(values["min_keys"], values["min_keys"] + 500))
    config = SparseAttentionConfig(**values)
    q_len, past = draw(st.integers(1, 700)), draw(st.sampled_from((0, 0, 1, 77, 512, 1111)))
    tile = draw(st.sampled_from((1, config.query_tile)))
    assume(q_len // tile < 300)
    return config, TileGrid(q_len, past + q_len, tile, config.block_size)


def literal_tile(config, grid, first, last):
    """Forced blocks, budget and eligible blocks of a tile, word for word from the definition of the terms."""
    size = config.block_size
    visible_blocks = {key // size for key in range(last + 1)}
    sink = {key // size for key in range(config.sink)} & visible_blocks
    mine = {key // size for key in range(first, last + 1)}
    local = {key // size for key in range(max(0, first - config.local), first)}
    forced = sink | mine | local
    keys = max(math.ceil(config.density * (last + 1)), config.min_keys)
    if config.max_keys is not None:
        keys = min(keys, config.max_keys)
    return forced, math.ceil(keys / size), visible_blocks - forced


@given(plans())
def test_tile_plan_matches_the_definition(case):
    config, grid = case
    plan = make_plan(config, grid)
    tiles = torch.arange(grid.tiles)
    forced_blocks, eligible_mask = plan.forced_blocks(tiles), plan.eligible_mask(tiles)
    for i, (first, last) in enumerate(
        zip(grid.first_positions().tolist(), grid.last_positions().tolist(), strict=True)
    ):
        forced, budget, eligible = literal_tile(config, grid, first, last)
        listed = [b for b in forced_blocks[i].tolist() if b >= 0]
        assert sorted(listed) == sorted(forced)  # each once
        assert set(eligible_mask[i].nonzero()[:, 0].tolist()) == eligible
        assert len(forced) <= budget, "forced links never exceed the budget"
        assert int(plan.eligible[i]) == len(eligible)
        assert int(plan.free[i]) == min(len(eligible), budget - len(forced))
        assert int(plan.candidates[i]) == min(len(eligible), math.ceil(config.candidate_factor * budget))
        assert bool(plan.open[i]) == (len(eligible) > budget - len(forced))
        mine = {key // config.block_size for key in range(first, last + 1)} - set(range(plan.sink))
        assert mine <= set(forced_blocks[i, -grid.own_blocks :].tolist())


@given(plans())
def test_forced_keys_bounds_the_forced_links_of_every_tile(case):
    config, _ = case
    size, most = config.block_size, 0
    for tile in (1, config.query_tile):
        for index in range(
            -(-(config.local + config.sink + 3 * size) // tile), -(-(config.local + config.sink + 5 * size) // tile) + 1
        ):
            first, last = index * tile, index * tile + tile - 1
            most = max(most, len(literal_tile(config, None, first, last)[0]) * size)
    assert most <= config.forced_keys


@given(plans(), st.integers(0, 999))
def test_select_by_scores_keeps_the_forced_and_the_best(case, seed):
    config, grid = case
    plan = make_plan(config, grid)
    # many ties
    scores = torch.randint(0, 9, (1, 2, grid.tiles, grid.blocks), generator=torch.Generator().manual_seed(seed)).float()
    selection = select_by_scores(plan, scores)
    kept = selection.kept()
    for i, (first, last) in enumerate(
        zip(grid.first_positions().tolist(), grid.last_positions().tolist(), strict=True)
    ):
        forced, budget, eligible = literal_tile(config, grid, first, last)
        for group in range(2):
            row = scores[0, group, i].tolist()
            best = sorted(eligible, key=lambda b: (-row[b], b))[: budget - len(forced)]
            assert set(kept[0, group, i].nonzero()[:, 0].tolist()) == forced | set(best)
    valid = selection.indices >= 0
    assert torch.equal(selection.scores.isnan(), ~valid)
    gathered = scores.gather(-1, selection.indices.clamp(min=0).long())
    assert torch.equal(selection.scores[valid], gathered[valid])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("q_len", "past"), [(1, 0), (1, 200), (77, 0), (130, 41), (0, 30), (0, 0)])
@pytest.mark.parametrize("tiling", [(64, 16), (16, 64), (1, 16)])
def test_visible_blocks_are_those_with_a_key_that_some_query_of_the_tile_sees(q_len, past, tiling, causal):
    grid = TileGrid(q_len, past + q_len, *tiling, causal)
    lists = grid.visible_blocks()
    assert lists.dtype == torch.int32 and lists.shape == (grid.tiles, grid.blocks)
    for row, last in zip(lists.tolist(), grid.last_positions().tolist(), strict=True):
        seen = [block for block in range(grid.blocks) if not causal or block * grid.block_size <= last]
        assert row == [-1] * (grid.blocks - len(seen)) + seen


def test_kept_marks_exactly_the_listed_blocks():
    grid = TileGrid(100, 100, 64, 16)
    indices = torch.tensor([[[[-1, 0, 3], [1, 2, 6]], [[-1, -1, -1], [-1, -1, 0]]]], dtype=torch.int32)
    kept = BlockSelection(indices, grid).kept()
    assert kept.shape == (1, 2, 2, 7)
    assert [tile.nonzero()[:, 0].tolist() for tile in kept.flatten(0, 2)] == [[0, 3], [1, 2, 6], [], [0]]


def test_a_plan_pads_the_lists_of_all_its_tiles_to_one_width():
    config = SparseAttentionConfig(block_size=16, query_tile=16, sink=16, local=16, min_keys=64)
    plan = make_plan(config, TileGrid(128, 128, 16, 16))
    assert plan.width == 4 and plan.any_open
    chosen = torch.full((1, 1, 2, 3), -1)
    assert plan.assemble(chosen, torch.tensor([0, 1])).tolist() == [[[[-1, -1, -1, 0], [-1, -1, 0, 1]]]]
    chosen[0, 0, 1, 0] = 2
    assert plan.assemble(chosen, torch.tensor([2, 7])).tolist() == [[[[-1, 0, 1, 2], [0, 2, 6, 7]]]]
    assert not make_plan(config, TileGrid(64, 64, 16, 16)).any_open


# -- features and teacher -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "size"), [(64, 16), (100, 16), (15, 16), (300, 128)])
@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooled_features_are_max_min_mean_of_whole_blocks(impl, dtype, length, size):
    k = torch.randn(2, length, 3, 6, generator=torch.Generator().manual_seed(0)).transpose(1, 2).to(dtype)
    if length > 50:
        k[0, 1, 20:23, 2:5] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    out = pooled_features(k, size, impl=impl)
    assert out.shape == (2, 3, length // size, 18) and out.dtype == dtype
    for block in range(length // size):
        part = k[:, :, block * size : (block + 1) * size]
        want = torch.cat([part.max(2).values, part.min(2).values, part.mean(2)], -1)
        torch.testing.assert_close(out[:, :, block], want, equal_nan=True)


@given(
    seed=st.integers(0, 999),
    q_len=st.sampled_from((1, 20, 64, 150)),
    past=st.sampled_from((0, 1, 33, 128)),
    tiling=st.sampled_from(((64, 16), (16, 64), (1, 16), (32, 32))),
    chunk=st.sampled_from((1, 1 << 22)),
)
@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_block_mass_is_the_dense_softmax_summed_by_block(impl, seed, q_len, past, tiling, chunk):
    grid = TileGrid(q_len, past + q_len, *tiling)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 6, q_len, 8, generator=generator)
    k = torch.randn(2, 2, past + q_len, 8, generator=generator)
    picked = torch.randperm(grid.tiles, generator=generator)[:3].sort().values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "MASS_SCORES", chunk)
        mass = block_mass(q, k, grid, picked, 0.7, impl=impl)
    causal = torch.arange(past + q_len) <= torch.arange(past, past + q_len)[:, None]
    p = torch.softmax((q @ k.repeat_interleave(3, 1).transpose(-1, -2) * 0.7).masked_fill(~causal, -torch.inf), -1)
    p = p.unflatten(1, (2, 3)).mean(2)  # over the heads of a group: [B, G, Q, N]
    p = (
        torch.nn.functional.pad(p, (0, grid.blocks * grid.block_size - past - q_len))
        .unflatten(-1, (grid.blocks, -1))
        .sum(-1)
    )
    first, last = grid.first_positions(), grid.last_positions()
    for i, tile in enumerate(picked.tolist()):
        rows = slice(max(int(first[tile]) - past, 0), int(last[tile]) + 1 - past)
        torch.testing.assert_close(mass[:, :, i], p[:, :, rows].mean(2), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mass.sum(-1), torch.ones(mass.shape[:-1]))
