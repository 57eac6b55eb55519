"""Ways to share out keys: the oracle's candidates, budgets by head, and their fits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hf_sparse_attn_kernels import block_mass

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.data.windows import Window
from hf_sparse_attn.evaluation.baselines import Oracle, WindowAndSink
from hf_sparse_attn.evaluation.quality import evaluate_windows
from hf_sparse_attn.evaluation.statistics import loss_above, quality_table
from hf_sparse_attn.experiments.scores.budget_allocation import (
    FITTED,
    THRESHOLD,
    Allocations,
    ByHead,
    fitted_selectors,
    oracle_candidates,
)
from hf_sparse_attn.models.convert import sparse_attention_as
from hf_sparse_attn.router.budget import make_plan
from hf_sparse_attn.training.mass_threshold import AtThreshold, ByThreshold, KeptKeys
from hf_sparse_attn.training.passes import run_sparse


@pytest.fixture(scope="module", params=[(250, 250, 16), (250, 40, 16), (250, 5, 1), (250, 1, 1)], ids=str)
def case(request, routing_inputs):
    kv_len, q_len, tile = request.param
    return routing_inputs(kv_len, q_len, batch=2), tile


@pytest.fixture(scope="module")
def router(make_router):
    return make_router(rotary=True, noise=0.3, min_keys=96, candidate_factor=2.0)


def sets(selection):
    return [{b for b in blocks if b >= 0} for blocks in selection.indices.flatten(0, 2).tolist()]


def test_the_threshold_selector_is_the_routers_own_path(router, case):
    inputs, tile = case
    config = router.config
    got, want = AtThreshold(0.02)(router, inputs, tile), ByThreshold(0.02)(router, inputs, tile)
    assert sets(got) == sets(want) and router.config is config
    torch.testing.assert_close(got.scores[got.indices >= 0], want.scores[want.indices >= 0], equal_nan=True)


def test_the_oracles_candidates_are_all_blocks_with_their_mass(router, case):
    inputs, tile = case
    result = oracle_candidates(router, inputs, tile)
    plan = make_plan(router.config, result.every.grid)
    tiles = torch.arange(plan.grid.tiles)
    mass = block_mass(inputs.q, inputs.k, plan.grid, tiles, inputs.scale)
    assert sets(result.every) == [set(range(int(last) + 1)) for _ in range(4) for last in plan.last]
    there = result.every.indices >= 0
    assert torch.equal(result.every.scores[there], mass.gather(-1, result.every.indices.clamp(min=0).long())[there])
    assert torch.equal(result.free.sum(-1)[0, 0], torch.where(plan.open, plan.eligible, 0))
    best = result.mass.topk(int(plan.free.max()), -1).values
    last = best.gather(-1, (plan.free - 1).clamp(min=0)[:, None].expand(2, 2, -1, 1))
    assert sets(result.keep(result.free & (result.mass >= last))) == sets(Oracle()(router, inputs, tile))


def test_budgets_by_head_are_those_of_the_head(router, case):
    inputs, tile = case
    selection = ByHead({0: torch.tensor([112.0, 90.0], dtype=torch.float64)})(router, inputs, tile)
    plan = make_plan(router.config, selection.grid)
    counts = (selection.indices >= 0).sum(-1)[:, :, plan.open]
    assert bool((counts[:, 0] == 7).all()) and bool((counts[:, 1] == 6).all())


@pytest.fixture(scope="module")
def fitted(sparse_llama, real_budget, token_ids):
    """(model, allocations that were fitted on four rows for 96 and 128 keys)"""
    model = sparse_llama({**real_budget, "candidate_factor": 3.0}, noise=0.2)
    batches = [{"input_ids": token_ids(1, 320, seed=seed)} for seed in range(4)]
    before = model.config.sparse_attention
    created = Allocations(model, batches, [96, 128], 160)
    assert model.config.sparse_attention == before
    return model, batches, created


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("keys", [96, 128])
def test_every_allocation_keeps_the_budget_on_average_where_it_was_fitted(fitted, name, keys):
    model, batches, created = fitted
    meter = KeptKeys(160, selector=created.selectors[name])
    with sparse_attention_as(model, min_keys=keys, max_keys=keys):
        run_sparse(model, batches, meter)
    # a head's budget is whole blocks: of two layers with two heads each off by at most half a block
    assert meter.mean() == pytest.approx(keys, abs=8 if name == "two stages by head" else 0.01 * keys)


def test_a_fit_says_what_it_found(fitted):
    *_, created = fitted
    assert [fit["keys"] for fit in created.fits] == [96, 128]
    for fit in created.fits:
        assert fit["asked"] == fit["keys"] and 0 < fit["threshold"] < 1 and 0 < fit["oracle_threshold"] < 1
        for name in ("kept", "oracle_kept"):
            assert fit[name] == pytest.approx(fit["keys"], rel=0.01)
        assert {layer: len(heads) for layer, heads in fit["kept_by_layer_and_head"].items()} == {0: 2, 1: 2}
    assert created.fits[0]["threshold"] > created.fits[1]["threshold"]


def test_windows_tell_what_they_kept(fitted, token_ids):
    model, _, created = fitted
    windows = [Window(f"a[{i}]", token_ids(1, 320, seed=10 + i)) for i in range(2)]
    chosen = {
        "oracle": Oracle(),
        "window + sink": WindowAndSink(),
        **{name: created.selectors[name] for name in FITTED},
    }
    results = evaluate_windows(model, windows, [96, 128], chosen, decode_tokens=8)
    assert len(results) == 2 * (1 + 2 * 5)
    for r in results:
        if r.keys is None:
            assert (r.kept, r.kept_all, r.kept_decode) == (None, None, None)
        elif r.selection in ("oracle", "window + sink"):
            assert r.kept == r.kept_all == r.keys and r.keys - 16 < r.kept_decode <= r.keys
        else:
            assert 64 < r.kept < 200 and r.kept_decode > 0 and (r.kept != r.keys or r.selection == "two stages by head")
        assert (r.low_mass is None) == (r.keys in (None, 128))
        assert r.low_mass is None or 0 < r.low_mass < np.mean(list(r.mass.values()))
    table = {(row["keys"], row["selection"]): row for row in quality_table(results)}
    assert table[96, "oracle"]["prefill_above_oracle"] == {"mean": 0, "low": 0, "high": 0}
    for keys in (96, 128):
        mine = [r for r in results if r.keys == keys and r.selection == THRESHOLD]
        bound = [r for r in results if r.keys == keys and r.selection == "oracle"]
        row = table[keys, THRESHOLD]
        assert row["kept"] == pytest.approx(np.mean([r.kept for r in mine])) and row["kept_decode"] > 0
        want = np.mean([a.prefill - b.prefill for a, b in zip(mine, bound, strict=True)])
        assert row["prefill_above_oracle"]["mean"] == pytest.approx(want)


def test_the_loss_above_by_hand():
    assert loss_above(np.array([2.0, 2.5]), np.array([1.0, 2.0])) == {"mean": 0.75, "low": 0.5, "high": 1.0}


def test_a_model_shows_its_own_threshold_at_the_budget_it_was_fitted_for():
    config = SparseAttentionConfig(min_keys=512, max_keys=512, mass_threshold=0.01)
    assert fitted_selectors(config, ["oracle"], [1024]) == {}
    assert fitted_selectors(config, ["oracle", THRESHOLD], [512]) == {THRESHOLD: AtThreshold(0.01)}
    with pytest.raises(ValueError, match="'oracle by threshold' must be fitted first"):
        fitted_selectors(config, ["oracle by threshold"], [512])
    for other, requested in (
        (config, [512, 1024]),
        (config.changed(mass_threshold=None), [512]),
        (config.changed(max_keys=None), [512]),
    ):
        with pytest.raises(ValueError, match=r"own mass_threshold at the fixed budget.*fit_mass_threshold"):
            fitted_selectors(other, [THRESHOLD], requested)
