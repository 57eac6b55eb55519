"""The selections without weights, recall against the oracle, and how far predictions move from dense ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_sparse_attn import SparseCall, set_sparse_attention
from hf_sparse_attn.data.windows import Window
from hf_sparse_attn.evaluation.baselines import MinMax, Oracle, RandomBlocks, WindowAndSink, key_bounds, make_selectors
from hf_sparse_attn.evaluation.divergence import predictions
from hf_sparse_attn.evaluation.quality import MassObserver, WindowResult, evaluate_windows, recall
from hf_sparse_attn.evaluation.statistics import quality_table, worst_head
from hf_sparse_attn.router.budget import make_plan

N = 250


def chosen(selection, plan):
    """The selected blocks that are not forced, of every row, KV head and tile: list of sets."""
    eligible = plan.eligible_mask(torch.arange(plan.grid.tiles))
    rows = selection.indices.flatten(0, 1)
    return [[{b for b in tile.tolist() if b >= 0 and eligible[t, b]} for t, tile in enumerate(row)] for row in rows]


@pytest.mark.parametrize(("q_len", "tile"), [(N, 16), (40, 16), (5, 1)])
def test_min_max_is_the_literal_bound(q_len, tile, make_router, routing_inputs, monkeypatch):
    monkeypatch.setattr(key_bounds, "QUERY_SCORES", 1000)  # one tile at a time
    router, inputs = make_router(rotary=True), routing_inputs(N, q_len, batch=2)
    plan = make_plan(router.config, inputs.grid(tile, 16))
    result = chosen(MinMax()(router, inputs, tile), plan)
    blocks = inputs.k[:, :, : N // 16 * 16].unflatten(2, (-1, 16))
    most, least = blocks.amax(3), blocks.amin(3)
    first = (N - q_len) // tile
    for row in range(2):
        for group in range(2):
            for t in plan.open.nonzero()[:, 0].tolist():
                tokens = [i for i in range(q_len) if (N - q_len + i) // tile == first + t]
                bounds = []
                for b in range(N // 16):
                    terms = [
                        float(torch.maximum(q * most[row, group, b], q * least[row, group, b]).sum() * inputs.scale)
                        for head in (2 * group, 2 * group + 1)
                        for q in inputs.q[row, head, tokens]
                    ]
                    bounds.append(math.log(sum(map(math.exp, terms))))
                eligible = range(plan.sink, int(plan.near[t]))
                best = sorted(eligible, key=lambda b: bounds[b], reverse=True)[: int(plan.free[t])]
                assert result[2 * row + group][t] == set(best)


def test_random_blocks_are_the_same_for_a_layer_and_a_position_only(make_router, routing_inputs):
    router, other, inputs = make_router(), make_router(), routing_inputs(N)
    other.layer = 1
    first = RandomBlocks()(router, inputs, 16).indices
    assert torch.equal(first, RandomBlocks()(router, routing_inputs(N, seed=5), 16).indices)
    assert not torch.equal(first, RandomBlocks()(other, inputs, 16).indices)
    assert not torch.equal(first[:, :, -1:], RandomBlocks()(router, routing_inputs(N, 10), 16).indices[:, :, -1:])


def test_random_blocks_meet_the_oracle_at_prevalence(make_router, routing_inputs):
    """Each eligible block is kept with probability free / eligible, whatever the oracle keeps."""
    hits = wanted = expected = 0
    for layer in range(40):
        router, inputs = make_router(), routing_inputs(N, seed=layer)
        router.layer = layer
        plan = make_plan(router.config, inputs.grid(16, 16))
        mine, best = (chosen(select(router, inputs, 16), plan) for select in (RandomBlocks(), Oracle()))
        for t in plan.open.nonzero()[:, 0].tolist():
            for expected_own, true in zip(mine, best, strict=True):
                hits, wanted = hits + len(expected_own[t] & true[t]), wanted + len(true[t])
                expected += len(true[t]) * int(plan.free[t]) / int(plan.eligible[t])
    error = math.sqrt(expected * (1 - expected / wanted))
    assert abs(hits - expected) < 3 * error and wanted > 1000


def test_recall_by_hand():
    kept = torch.tensor([[[[-1, 2, 5, 7], [1, 3, 4, 6]], [[0, 1, 2, 3], [4, 5, 6, 7]]]])
    wanted = torch.tensor([[[[7, 5, 4], [6, -1, -1]], [[9, 8, 4], [4, 5, 6]]]])
    assert recall(kept, wanted).tolist() == [3 / 4, 3 / 6]
    assert recall(kept, torch.full((1, 2, 2, 1), -1)).tolist() == [0.0, 0.0]


def test_the_oracle_recalls_all_that_it_wants(make_router, routing_inputs):
    router, inputs = make_router(rotary=True), routing_inputs(N)
    observer = MassObserver({"oracle": Oracle(), "window": WindowAndSink()})
    observer.on_document(router, inputs)
    assert observer.recall["oracle"] == {0: [1.0, 1.0]} and max(observer.recall["window"][0]) < 0.9
    assert np.mean(observer.by_head["window"][0]) == pytest.approx(observer.mass["window"][0])


@pytest.fixture(scope="module")
def measured(sparse_llama, real_budget, token_ids):
    """(model, window, results by selection)"""
    model = sparse_llama(real_budget, noise=0.1)
    text = Window("a[0]", token_ids(1, 163))
    chosen = make_selectors()
    results = evaluate_windows(model, [text], [80], chosen, decode_tokens=0)
    return model, text, {r.selection: r for r in results}


@torch.no_grad()
def logits(model, ids, call):
    return model(ids, use_cache=False, sparse_call=call).logits[0].float()


def test_predictions_are_those_of_literal_logits(measured):
    model, text, results = measured
    ids = text.ids
    dense, sparse = (
        logits(model, ids, call).log_softmax(-1)
        for call in (SparseCall(dense=True), SparseCall(selector=WindowAndSink()))
    )
    result = results["window + sink"]
    kl = (dense.exp() * (dense - sparse)).sum(-1)[81:].mean()
    assert result.kl == pytest.approx(float(kl), rel=1e-4) and result.kl > 1e-3
    losses = F.nll_loss(sparse[:-1], ids[0, 1:], reduction="none")
    assert result.by_position == pytest.approx(
        [float(part.mean()) for part in np.array_split(losses.numpy(), 8)], abs=1e-5
    )
    with torch.no_grad():
        states = [
            model.base_model(ids, use_cache=False, sparse_call=call).last_hidden_state[0, 81:]
            for call in (SparseCall(selector=WindowAndSink()), SparseCall(dense=True))
        ]
    error = ((states[0] - states[1]).norm(dim=-1) / states[1].norm(dim=-1)).mean()
    assert result.output_error == pytest.approx(float(error), rel=1e-4) and result.output_error > 1e-2


def test_dense_predictions_are_no_distance_from_themselves(measured, sparse_llama, every_block):
    _, text, results = measured
    assert results["dense"].kl == results["dense"].output_error == 0.0
    assert all(result.kl > 0 and result.output_error > 0 for name, result in results.items() if name != "dense")
    model = sparse_llama(every_block)
    set_sparse_attention(model, min_keys=256)
    whole = evaluate_windows(
        model, [text], [256], {"window + sink": WindowAndSink(), "oracle": Oracle()}, decode_tokens=0
    )
    assert all(result.kl < 1e-6 and result.output_error < 1e-5 for result in whole)


def test_predictions_do_not_depend_on_how_many_logits_are_held(measured, monkeypatch):
    model, text, _ = measured
    states = [torch.randn(1, 163, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    whole = predictions(model, text.ids, *states)
    monkeypatch.setattr("hf_sparse_attn.evaluation.divergence.LOGIT_POSITIONS", 7)
    parts = predictions(model, text.ids, *states)
    assert (parts.kl, parts.output_error) == pytest.approx((whole.kl, whole.output_error), rel=1e-5)
    assert parts.by_position == pytest.approx(whole.by_position, rel=1e-5)


def test_every_figure_is_in_the_table(measured):
    _, _, results = measured
    rows = {row["selection"]: row for row in quality_table(list(results.values()))}
    for name, row in rows.items():
        for figure in ("kl", "output_error", "by_position"):
            assert row[figure] == pytest.approx(getattr(results[name], figure)), (name, figure)
    assert rows["oracle"]["recall"] == 1.0 and rows["oracle"]["worst_head"]["share"] == pytest.approx(1.0)
    assert rows["two stages"]["head_mass"] == {
        str(layer): values for layer, values in results["two stages"].head_mass.items()
    }
    assert rows["two stages"]["recall"] == pytest.approx(np.mean(list(results["two stages"].recall.values())))
    assert "recall" not in rows["dense"] and "head_mass" not in rows["dense"]


def test_the_worst_head_by_hand():
    low, high = {0: np.array([0.2, 0.4]), 1: np.array([0.5, 0.5])}, {0: np.array([0.6, 0.8]), 1: np.array([0.51, 0.9])}
    kept = {0: np.array([0.5, 0.5]), 1: np.array([0.1, 0.8])}  # head 0 of layer 1 has the least share, but hardly a gap
    assert worst_head(kept, low, high) == {"share": pytest.approx(0.25), "layer": 0, "head": 1}
    assert worst_head(kept, low, low) is None


def test_means_of_heads_are_over_windows_that_have_the_layer():
    mass = {"window + sink": [[0.2, 0.4]], "oracle": [[0.6, 0.8]], "two stages": [[0.4, 0.8], [0.6, 0.4]]}
    results = [WindowResult(d, 512, None, "dense", 1.0, None) for d in "ab"]
    for name, values in mass.items():
        for document, heads in zip("ab", [values[0], values[-1]], strict=True):
            results.append(
                WindowResult(document, 512, 64, name, 1.0, None, mass={0: 0.5}, head_mass={0: heads}, recall={0: heads})
            )
    row = next(r for r in quality_table(results) if r["selection"] == "two stages")
    assert row["head_mass"] == {"0": pytest.approx([0.5, 0.6])} and row["recall"] == pytest.approx(0.55)
    assert row["worst_head"] == {"share": pytest.approx(0.5), "layer": 0, "head": 1}
