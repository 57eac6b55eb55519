"""Selections at equal budget, losses of windows, shares and the quality table."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hf_sparse_attn_kernels import block_mass

from hf_sparse_attn import SparseCall, routers
from hf_sparse_attn.data.windows import Window
from hf_sparse_attn.evaluation import divergence, quality
from hf_sparse_attn.evaluation.baselines import Oracle, StageOne, WindowAndSink, make_selectors
from hf_sparse_attn.evaluation.baselines.router_selectors import untrained_router
from hf_sparse_attn.evaluation.quality import MassObserver, WindowResult, evaluate_windows, window_losses
from hf_sparse_attn.evaluation.statistics import loss_share, quality_table, shares_by_layer
from hf_sparse_attn.router.budget import make_plan
from hf_sparse_attn.training.router_loss import kept_mass

NAMES = (
    "oracle",
    "two stages",
    "stage 1 alone",
    "untrained",
    "mean-pool",
    "min-max",
    "mean-std",
    "window + sink",
    "random",
)
N = 250  # the last tile and the last block are partial


@pytest.fixture(scope="module")
def router(make_router):
    return make_router(rotary=True, noise=0.3)


@pytest.fixture(scope="module")
def selectors():
    return make_selectors()


@pytest.fixture(scope="module", params=[(N, N, 16), (N, 40, 16), (N, 5, 1)], ids=["prefill", "chunk", "decode"])
def case(request, routing_inputs):
    kv_len, q_len, tile = request.param
    return routing_inputs(kv_len, q_len, batch=2), tile


def blocks_of(selection, row, group, tile):
    kept = selection.indices[row, group, tile].tolist()
    kept = [b for b in kept if b >= 0]
    assert len(kept) == len(set(kept))
    return set(kept)


def every_tile(plan, batch=2, groups=2):
    return [(b, g, t) for b in range(batch) for g in range(groups) for t in range(plan.grid.tiles)]


def plan_of(router, inputs, tile):
    return make_plan(router.config, inputs.grid(tile, router.config.block_size))


# -- selections -----------------------------------------------------------------------------------------------------


def test_the_table_rows_come_in_order(selectors):
    assert tuple(selectors) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_selection_keeps_the_budget_and_the_forced_links(name, selectors, router, case):
    inputs, tile = case
    plan, selection = plan_of(router, inputs, tile), selectors[name](router, inputs, tile)
    size, config = router.config.block_size, router.config
    for b, g, t in every_tile(plan):
        first = ((N - inputs.q.shape[2]) // tile + t) * tile  # tiles are counted from the first token of the document
        last = min(first + tile, N) - 1
        kept = blocks_of(selection, b, g, t)
        # 16 sink tokens are one block
        forced = {0} | set(range(max(0, first - config.local) // size, last // size + 1))
        assert forced <= kept <= set(range(last // size + 1))
        assert len(kept) == min(config.budget_blocks(last + 1), last // size + 1)


def test_the_window_keeps_the_nearest_blocks(router, case):
    inputs, tile = case
    plan, selection = plan_of(router, inputs, tile), WindowAndSink()(router, inputs, tile)
    for b, g, t in every_tile(plan):
        last = int(plan.last[t])
        count = min(router.config.budget_blocks(int(plan.grid.last_positions()[t]) + 1), last + 1)
        assert blocks_of(selection, b, g, t) == {0} | set(range(last - count + 2, last + 1))


def literal_mass(inputs, plan, tile):
    """Softmax mass per block by the formula: [B, G, tiles, blocks]."""
    q_len, kv_len = inputs.q.shape[2], inputs.k.shape[2]
    hg = inputs.q.shape[1] // inputs.k.shape[1]
    scores = inputs.q.double() @ inputs.k.double().repeat_interleave(hg, 1).mT * inputs.scale
    future = torch.arange(kv_len) > torch.arange(kv_len - q_len, kv_len)[:, None]
    p = F.pad(scores.masked_fill(future, -torch.inf).softmax(-1), (0, plan.grid.blocks * 16 - kv_len))
    p = p.unflatten(-1, (-1, 16)).sum(-1).unflatten(1, (-1, hg)).mean(2)  # [B, G, Q, blocks]
    of_query = torch.arange(kv_len - q_len, kv_len) // tile
    return torch.stack([p[:, :, of_query == t].mean(2) for t in of_query.unique()], 2)


def test_the_oracle_is_a_literal_dense_top_k(router, case):
    inputs, tile = case
    plan, selection = plan_of(router, inputs, tile), Oracle()(router, inputs, tile)
    mass = literal_mass(inputs, plan, tile)
    for b, g, t in every_tile(plan):
        eligible = torch.arange(plan.grid.blocks)
        eligible = eligible[(eligible >= plan.sink) & (eligible < plan.near[t])]
        best = eligible[mass[b, g, t, eligible].argsort(descending=True)[: int(plan.free[t])]]
        forced = set(range(int(plan.last[t]) + 1)) - set(eligible.tolist())
        assert blocks_of(selection, b, g, t) == set(best.tolist()) | forced


def test_the_oracle_keeps_the_largest_mass(selectors, router, case):
    inputs, tile = case
    plan = plan_of(router, inputs, tile)
    mass = literal_mass(inputs, plan, tile)
    kept = {name: kept_mass(mass, selector(router, inputs, tile).indices) for name, selector in selectors.items()}
    for name in NAMES[1:]:
        assert bool((kept["oracle"] >= kept[name] - 1e-6).all()), name
        assert kept["oracle"].mean() > kept[name].mean() + 1e-3, name
    ours = block_mass(inputs.q, inputs.k, plan.grid, torch.arange(plan.grid.tiles), inputs.scale)
    torch.testing.assert_close(ours.double(), mass, rtol=1e-4, atol=1e-5)


def test_all_selections_are_equal_when_everything_fits(selectors, make_router, every_block, case):
    inputs, tile = case
    router = make_router(rotary=True, noise=0.3, **every_block)
    plan = plan_of(router, inputs, tile)
    for name, selector in selectors.items():
        selection = selector(router, inputs, tile)
        for b, g, t in every_tile(plan):
            assert blocks_of(selection, b, g, t) == set(range(int(plan.last[t]) + 1)), name


def test_other_routers_follow_the_budget_of_the_model(selectors, router, make_router, routing_inputs):
    inputs = routing_inputs(N)
    wider = make_router(rotary=True, min_keys=128, max_keys=128)
    for name in ("untrained", "mean-pool"):
        assert selectors[name](router, inputs, 16).indices.shape[-1] == 5
        assert selectors[name](wider, inputs, 16).indices.shape[-1] == 8


def test_the_untrained_rows_do_not_depend_on_the_trained_weights(selectors, router, make_router, routing_inputs):
    inputs, other = routing_inputs(N), make_router(rotary=True, noise=1.0)
    for name in ("untrained", "mean-pool"):
        assert torch.equal(selectors[name](router, inputs, 16).indices, selectors[name](other, inputs, 16).indices)
    assert not torch.equal(StageOne()(router, inputs, 16).indices, StageOne()(other, inputs, 16).indices)


def test_untrained_routers_are_those_of_a_new_model(sparse_llama, real_budget):
    trained, new = sparse_llama(real_budget, noise=0.5), sparse_llama(real_budget)
    for noisy, start in zip(routers(trained), routers(new), strict=True):
        twin = untrained_router(noisy)
        for name, weight in start.named_parameters():
            assert torch.equal(dict(twin.named_parameters())[name], weight)
            assert not torch.equal(dict(noisy.named_parameters())[name], weight)


# -- losses of windows ----------------------------------------------------------------------------------------------


@torch.no_grad()
def literal_loss(model, ids, start, **options):
    """Mean cross-entropy of the tokens from ``start`` on, from one uncached pass."""
    logits = model(ids, use_cache=False, **options).logits[0, start - 1 : -1].float()
    return float(F.cross_entropy(logits, ids[0, start:]))


def test_a_dense_window_has_the_cross_entropy_of_the_stock_model(sparse_llama, stock_llama, real_budget, token_ids):
    model, stock, ids = sparse_llama(real_budget, noise=0.1), stock_llama(), token_ids(1, 209)
    prefill, decode, tail = window_losses(model, ids, SparseCall(dense=True), 32)
    assert prefill == pytest.approx(literal_loss(stock, ids, 104), abs=1e-5)
    assert decode == pytest.approx(literal_loss(stock, ids, 177), abs=1e-5)
    assert window_losses(model, ids, SparseCall(dense=True), 0) == (pytest.approx(prefill, abs=1e-6), None, None)
    assert tail == pytest.approx(decode, abs=1e-5)  # dense attention knows no tiles


@pytest.mark.parametrize("selector", [None, Oracle(), WindowAndSink()], ids=["router", "oracle", "window"])
def test_losses_of_a_selection_equal_uncached_passes(selector, sparse_llama, real_budget, token_ids):
    model, ids = sparse_llama(real_budget, noise=0.1), token_ids(1, 209)
    options = {} if selector is None else {"selector": selector}
    prefill, decode, _ = window_losses(model, ids, SparseCall(**options), 32)
    assert prefill == pytest.approx(literal_loss(model, ids, 104, sparse_call=SparseCall(**options)), abs=1e-5)
    # the first decoded query is token 176, on a tile boundary, so that the tiles before it are whole in both
    assert decode == pytest.approx(
        literal_loss(model, ids, 177, sparse_call=SparseCall(decode_from=176, **options)), abs=1e-4
    )
    assert abs(decode - literal_loss(model, ids, 177, sparse_call=SparseCall(dense=True))) > 1e-3


def test_losses_with_more_positions_than_are_held_at_a_time(sparse_llama, real_budget, token_ids, monkeypatch):
    model, ids = sparse_llama(real_budget), token_ids(1, 209)
    whole = window_losses(model, ids, SparseCall(), 16)
    monkeypatch.setattr(divergence, "LOGIT_POSITIONS", 10)
    assert window_losses(model, ids, SparseCall(), 16) == pytest.approx(whole, abs=1e-6)


def test_decoding_is_measured_for_tiles_of_one(sparse_llama, real_budget, token_ids):
    model, ids = sparse_llama({**real_budget, "query_tile": 1}, noise=0.1), token_ids(1, 150)
    prefill, decode, tail = window_losses(model, ids, SparseCall(), 8)
    assert tail == pytest.approx(decode, abs=1e-4)  # tiles of one in both
    assert prefill == pytest.approx(literal_loss(model, ids, 75), abs=1e-5)
    assert decode == pytest.approx(literal_loss(model, ids, 142), abs=1e-4)


def test_the_observer_measures_every_fourth_open_tile(router, routing_inputs):
    inputs = routing_inputs(N)
    observer = MassObserver({"oracle": Oracle(), "window": WindowAndSink()})
    observer.on_document(router, inputs)
    plan = plan_of(router, inputs, 16)
    mass = literal_mass(inputs, plan, 16)
    tiles = plan.open.nonzero()[:, 0][::4]
    assert tiles.tolist() == [5, 9, 13]
    for name, selector in (("oracle", Oracle()), ("window", WindowAndSink())):
        want = kept_mass(mass, selector(router, inputs, 16).indices)[:, :, tiles].mean()
        assert observer.mass[name] == {0: pytest.approx(float(want), abs=1e-5)}


def test_the_observer_skips_decoding_and_short_calls(router, routing_inputs):
    observer = MassObserver({"window": WindowAndSink()})
    observer.on_document(router, routing_inputs(N, 5))
    observer.on_document(router, routing_inputs(60))
    assert observer.mass == {"window": {}}


# -- evaluating windows ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(sparse_llama, real_budget, token_ids):
    """(model, windows, budgets, selectors, results)"""
    model = sparse_llama(real_budget, noise=0.1)
    windows = [Window(name, token_ids(1, 160, seed=i)) for i, name in enumerate(("a[0]", "b[0]"))]
    chosen = make_selectors(["oracle", "two stages", "window + sink"])
    before = model.config.sparse_attention
    results = evaluate_windows(model, windows, [80, 112], chosen, decode_tokens=8)
    assert model.config.sparse_attention == before
    return model, windows, [80, 112], chosen, results


def by_key(results):
    return {(r.document, r.keys, r.selection): r.to_dict() for r in results}


def test_every_window_is_measured_once_under_everything(evaluated):
    *_, chosen, results = evaluated
    names = [(None, "dense"), *[(80, n) for n in chosen], *[(112, n) for n in chosen]]
    assert [(r.document, r.keys, r.selection) for r in results] == [(d, *n) for d in ("a[0]", "b[0]") for n in names]
    assert all(r.decode is not None and r.length == 160 for r in results)
    assert all(sorted(r.mass) == ([0, 1] if r.keys == 80 else []) for r in results)


def test_results_are_those_of_the_window_at_that_budget(evaluated, sparse_llama, real_budget):
    _, windows, _, _, results = evaluated
    other = sparse_llama({**real_budget, "min_keys": 112, "max_keys": 112}, noise=0.1)
    result = by_key(results)["b[0]", 112, "two stages"]
    assert (result["prefill"], result["decode"], result["prefill_of_decoded"]) == pytest.approx(
        window_losses(other, windows[1].ids, SparseCall(), 8), abs=1e-6
    )
    assert result["prefill"] != by_key(results)["b[0]", 80, "two stages"]["prefill"]


@pytest.mark.parametrize("kept", [0, 1, 3, 5, 9, 14])
def test_an_interrupted_evaluation_continues_without_computing_again(evaluated, kept, monkeypatch):
    model, windows, budgets, chosen, results = evaluated
    calls, new = Counter(), []

    def counted(model, ids, call, decode_tokens, on_hidden):
        calls["dense" if call.dense and decode_tokens else "again" if call.dense else "sparse"] += 1
        return window_losses(model, ids, call, decode_tokens, on_hidden)

    monkeypatch.setattr(quality, "window_losses", counted)
    again = evaluate_windows(
        model, windows, budgets, chosen, decode_tokens=8, done=results[:kept], on_result=new.append
    )
    assert len(new) == 14 - kept and again[:kept] == results[:kept] and again[kept:] == new
    assert calls["sparse"] == sum(r.keys is not None for r in new) and calls["dense"] == sum(
        r.keys is None for r in new
    )
    # what is missing is compared with a dense pass, which is done once more
    assert calls["again"] == (kept in (1, 3, 5, 9))
    result, want = by_key(again), by_key(results)
    assert result.keys() == want.keys()
    for key in want:
        assert (result[key]["prefill"], result[key]["decode"]) == pytest.approx(
            (want[key]["prefill"], want[key]["decode"]), abs=1e-6
        )
        for name in ("mass", "kl", "output_error", "by_position"):
            assert result[key][name] == pytest.approx(want[key][name], abs=1e-6), name


def test_results_survive_json(evaluated):
    *_, results = evaluated
    read = [WindowResult(**r) for r in json.loads(json.dumps([r.to_dict() for r in results]))]
    assert [r.to_dict() for r in read] == [r.to_dict() for r in results]
    assert quality_table(read) == quality_table(results)


# -- shares ---------------------------------------------------------------------------------------------------------


def test_the_loss_share_by_hand():
    result = loss_share(np.array([2.0, 2.0]), np.array([1.5, 1.25]), np.array([1.0, 1.0]))
    assert result == {"share": 0.625, "low": 0.5, "high": 0.75}


def test_the_loss_share_is_exact_at_both_ends():
    generator = np.random.default_rng(1)
    low, high = 3 + generator.random(12), 4 + generator.random(12)
    assert loss_share(high, high, low) == {"share": 0.0, "low": 0.0, "high": 0.0}
    assert loss_share(high, low, low) == {"share": 1.0, "low": 1.0, "high": 1.0}
    between = loss_share(high, low + 0.3 * generator.random(12), low)
    assert 0 < between["low"] < between["share"] < between["high"] < 1


def test_the_interval_of_a_paired_difference_is_narrow():
    """Windows differ far more than selections do: unpaired resampling would give a wide interval."""
    level = np.linspace(1, 9, 16)
    result = loss_share(level + 1, level + 0.25, level)
    assert result == {"share": pytest.approx(0.75), "low": pytest.approx(0.75), "high": pytest.approx(0.75)}


def test_without_a_gap_the_share_is_zero():
    same = np.array([1.0, 2.0])
    assert loss_share(same, same, same) == {"share": 0.0, "low": 0.0, "high": 0.0}


def test_the_shares_by_layer_by_hand():
    kept, near, best = {0: 0.8, 1: 0.5, 2: 0.88}, {0: 0.6, 1: 0.4, 2: 0.895}, {0: 0.9, 1: 0.6, 2: 0.905}
    result = shares_by_layer(kept, near, best)
    assert result["share"] == pytest.approx((0.2 + 0.1 - 0.015) / (0.3 + 0.2 + 0.01))
    # layer 2 has the lowest share, but a gap below 0.02
    assert result["worst"] == pytest.approx(0.5) and result["worst_layer"] == 1
    assert result["by_layer"] == {"0": pytest.approx(2 / 3), "1": pytest.approx(0.5)}


def test_the_worst_layer_needs_a_gap_of_at_least_two_hundredths():
    result = shares_by_layer({0: 0.25, 1: 0.5}, {0: 0.25, 1: 0.5}, {0: 0.28125, 1: 0.515625})
    assert result["worst_layer"] == 0 and list(result["by_layer"]) == ["0"]
    none = shares_by_layer({0: 0.5}, {0: 0.5}, {0: 0.515625})
    assert none == {"share": 0.0, "worst": None, "worst_layer": None, "by_layer": {}}
    assert shares_by_layer({0: 0.5}, {0: 0.5}, {0: 0.5})["share"] == 0.0


def result(document, selection, prefill, keys=64, decode=None, mass=None):
    return WindowResult(document, 512, keys, selection, prefill, decode, mass=mass or {})


def test_the_table_pairs_only_windows_that_every_selection_has():
    results = [result(d, "dense", loss, keys=None) for d, loss in (("a", 1.0), ("b", 2.0), ("c", 60.0))]
    results += [result(d, "window + sink", loss) for d, loss in (("a", 2.0), ("b", 4.0), ("c", 70.0))]
    results += [result(d, "oracle", loss) for d, loss in (("b", 3.0), ("a", 1.5), ("c", 65.0))]
    results += [result(d, "two stages", loss) for d, loss in (("b", 3.5), ("a", 1.75))]
    rows = {row["selection"]: row for row in quality_table(results)}
    assert {name: (row["n"], row["prefill"]) for name, row in rows.items()} == {
        "dense": (2, 1.5),
        "window + sink": (2, 3.0),
        "oracle": (2, 2.25),
        "two stages": (2, 2.625),
    }
    assert rows["two stages"]["prefill_share"] == {"share": 0.5, "low": 0.5, "high": 0.5}
    assert (
        "prefill_share" not in rows["dense"]
        and "decode" not in rows["two stages"]
        and "kept_mass" not in rows["two stages"]
    )


def test_a_cell_without_common_windows_or_bounds_is_left_out():
    dense = [result(d, "dense", 1.0, keys=None) for d in "ab"]
    assert quality_table([]) == [] and quality_table(dense) == []
    assert quality_table([*dense, result("a", "oracle", 1.0), result("b", "window + sink", 1.0)]) == []
    assert quality_table([*dense, result("a", "oracle", 1.0), result("a", "two stages", 1.0)]) == []


def test_kept_mass_is_the_mean_over_windows_and_layers():
    masses = {"window + sink": (0.2, 0.4), "oracle": (0.6, 0.8), "two stages": (0.5, 0.5)}
    results = [result(d, "dense", 1.0, keys=None, decode=1.0) for d in "ab"]
    for name, (first, second) in masses.items():
        results += [
            result(d, name, 1.0, decode=2.0, mass={0: first + shift, 1: second + shift})
            for d, shift in (("a", -0.1), ("b", 0.1))
        ]
    row = next(r for r in quality_table(results) if r["selection"] == "two stages")
    assert row["kept_mass"] == {
        "mean": pytest.approx(0.5),
        "by_layer": {"0": pytest.approx(0.5), "1": pytest.approx(0.5)},
    }
    assert row["recovered_share"]["share"] == pytest.approx((0.3 + 0.1) / 0.8)
    assert row["recovered_share"]["worst"] == pytest.approx(0.25) and row["recovered_share"]["worst_layer"] == 1
    assert row["decode"] == 2.0 and "decode_share" in row
