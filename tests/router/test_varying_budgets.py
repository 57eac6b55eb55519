"""Budgets that vary: a threshold on estimated mass in every path, lists of unequal length, fitting, and what is
refused.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers.calls import Watching
from hf_sparse_attn_kernels import BlockSelection, TileGrid, block_sparse_attention
from hf_sparse_attn_kernels.routing import stage_one_scores, stage_two_mass
from hf_sparse_attn_kernels.torch_kernels import chunks
from transformers import AutoModelForCausalLM

import hf_sparse_attn
from hf_sparse_attn import KeptKeys, SparseCall, SparseTrainingConfig, fit_mass_threshold, routers, set_sparse_attention
from hf_sparse_attn.benchmarks import bench_budgets
from hf_sparse_attn.models.convert import sparse_attention_as
from hf_sparse_attn.router.budget import make_plan
from hf_sparse_attn.router.selection import FeatureMaker, select_blocks
from hf_sparse_attn.training import mass_threshold
from hf_sparse_attn.training.objective import SparseObjective
from hf_sparse_attn.training.passes import run_sparse

# keys, queries, tile
CASES = {"prefill": (250, 250, 16), "chunk": (250, 40, 16), "tiles of one": (250, 5, 1), "decode": (250, 1, 1)}
MANY = {"min_keys": 96, "density": 0.05, "candidate_factor": 2.0}  # 12 candidates a tile


@pytest.fixture(scope="module")
def router(make_router):
    return make_router(rotary=True, noise=0.3, **MANY)


@torch.no_grad()
def estimated(router, inputs, tile):
    """(plan, mass [B, G, n, nb] of each tile's candidates and forced blocks, −inf elsewhere), a tile at a time."""
    plan = make_plan(router.config, inputs.grid(tile, router.config.block_size))
    maker = FeatureMaker(router, inputs, plan.grid)
    parts = []
    for at in range(plan.grid.tiles):
        features, one = maker.features(torch.tensor([at])), torch.tensor([at])
        parts.append(stage_two_mass(features, plan, one, stage_one_scores(features, plan, one, "torch"), impl="torch"))
    return plan, torch.cat(parts, 2)


def threshold_in_a_gap(plan, mass):
    """A threshold that about half of the candidates reach, far from the mass of any of them."""
    result = (
        mass[(mass > -torch.inf) & plan.eligible_mask(torch.arange(plan.grid.tiles)) & plan.open[:, None]].sort().values
    )
    middle = result[len(result) // 3 : 2 * len(result) // 3].log()
    at = int(middle.diff().argmax())
    return float(((middle[at] + middle[at + 1]) / 2).exp())


def literal(plan, mass, threshold):
    """Kept blocks [B, G, n] as sets, word for word: the forced blocks, and the candidates that reach the threshold."""
    eligible = plan.eligible_mask(torch.arange(plan.grid.tiles))
    kept = {}
    for at in torch.cartesian_prod(*map(torch.arange, mass.shape[:3])).tolist():
        tile = at[2]
        seen = range(int(plan.last[tile]) + 1) if plan.grid.causal else range(plan.grid.blocks)
        cut = {b for b in seen if plan.open[tile] and eligible[tile, b] and not mass[(*at, b)] >= threshold}
        kept[tuple(at)] = set(seen) - cut
    return kept


def as_sets(selection):
    shape = selection.indices.shape[:3]
    lists = {
        tuple(at): selection.indices[tuple(at)].tolist()
        for at in torch.cartesian_prod(*map(torch.arange, shape)).tolist()
    }
    assert all(blocks == sorted(blocks) for blocks in lists.values())
    return {at: {b for b in blocks if b >= 0} for at, blocks in lists.items()}


# -- selecting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("case", CASES)
def test_a_tile_keeps_the_candidates_that_reach_the_threshold(case, impl, router, routing_inputs):
    kv_len, q_len, tile = CASES[case]
    inputs = routing_inputs(kv_len, q_len, batch=2)
    plan, mass = estimated(router, inputs, tile)
    threshold = threshold_in_a_gap(plan, mass)
    varying = copy.copy(router)
    varying.config = router.config.changed(mass_threshold=threshold)
    result = select_blocks(varying, inputs, tile, impl=impl)
    assert as_sets(result) == literal(plan, mass, threshold)
    counts = (result.indices >= 0).sum(-1)[:, :, plan.open]
    assert len(counts.unique()) > 2 and counts.amin() < counts.amax() <= make_plan(varying.config, result.grid).width
    result.check(inputs.q, inputs.k, values=True)
    scored = (result.indices >= 0) & plan.open[:, None]
    torch.testing.assert_close(
        result.scores[scored], mass.gather(-1, result.indices.clamp(min=0).long())[scored], rtol=1e-4, atol=1e-7
    )
    assert bool(result.scores[~scored].isnan().all())


def test_a_bidirectional_tile_keeps_the_candidates_that_reach_the_threshold(make_router, routing_inputs):
    router = make_router(rotary=True, noise=0.3, **{**MANY, "min_keys": 112})
    inputs = replace(routing_inputs(250, batch=2), causal=False)
    plan, mass = estimated(router, inputs, 16)
    threshold = threshold_in_a_gap(plan, mass)
    router.config = router.config.changed(mass_threshold=threshold)
    assert as_sets(select_blocks(router, inputs)) == literal(plan, mass, threshold)


@pytest.mark.parametrize(
    ("q_len", "past", "tile", "size"), [(900, 0, 64, 16), (700, 200, 64, 128), (5, 895, 1, 16), (1, 899, 1, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_most_that_is_kept_are_all_candidates_and_the_least_the_forced_blocks(
    make_router, routing_inputs, q_len, past, tile, size, dtype
):
    sizes = {"block_size": size, "query_tile": 64, "local": size, "min_keys": 512, "candidate_factor": 1.2}
    router, inputs = make_router(noise=0.1, **sizes), routing_inputs(past + q_len, q_len)
    inputs = replace(inputs, q=inputs.q.to(dtype), k=inputs.k.to(dtype))
    plan = make_plan(router.config, inputs.grid(tile, size))
    seen = plan.last + 1 - plan.eligible
    for threshold, more in ((1e-37, plan.candidates), (0.999, 0)):
        router.config = router.config.changed(mass_threshold=threshold)
        want = seen + torch.where(plan.open, more, plan.eligible)
        for impl in ("torch", "cpp"):
            counts = (select_blocks(router, inputs, tile, impl=impl).indices >= 0).sum(-1)
            assert torch.equal(counts, want.expand_as(counts))


def test_without_a_threshold_a_tile_keeps_the_best_of_its_budget(router, routing_inputs):
    inputs = routing_inputs(250, batch=2)
    plan, mass = estimated(router, inputs, 16)
    result = as_sets(select_blocks(router, inputs, impl="torch"))
    eligible = plan.eligible_mask(torch.arange(plan.grid.tiles))
    for (b, g, t), blocks in result.items():
        best = mass[b, g, t].masked_fill(~eligible[t], -torch.inf).topk(int(plan.free[t])).indices.tolist()
        if plan.open[t]:
            assert {block for block in blocks if eligible[t, block]} == set(best)


# -- a whole model --------------------------------------------------------------------------------------------------


@pytest.fixture
def varying(sparse_llama, real_budget):
    return sparse_llama({**real_budget, **MANY, "mass_threshold": 0.03}, noise=0.3)


@torch.no_grad()
def test_packed_documents_keep_what_they_keep_alone(varying, token_ids):
    first, second = token_ids(1, 180, seed=1), token_ids(1, 139, seed=2)
    positions = torch.cat([torch.arange(180), torch.arange(139)])[None]
    packed = varying(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    alone = torch.cat([varying(ids, use_cache=False).logits for ids in (first, second)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    with sparse_attention_as(varying, mass_threshold=None):
        assert (varying(first, use_cache=False).logits - alone[:, :180]).abs().max() > 1e-2


@torch.no_grad()
def test_cached_decoding_equals_the_uncached_forward(varying, token_ids):
    ids, kept = token_ids(2, 230), []

    def note(router, inputs, selection):
        kept.append((selection.indices >= 0).sum(-1).flatten())

    want = varying(ids, use_cache=False, sparse_call=SparseCall(decode_from=192)).logits[:, 192:]
    cache = varying(ids[:, :192]).past_key_values
    steps = [
        varying(ids[:, at : at + 1], past_key_values=cache, sparse_call=Watching(selection=note)).logits
        for at in range(192, 230)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-4, atol=1e-4)
    assert len(torch.cat(kept).unique()) > 2


# -- attention over lists of unequal length -------------------------------------------------------------------------


def attended(selection, impl, dtype=torch.float32, poisoned=False):
    """Output, log-sum-exp and all gradients, those of the sinks among them."""
    grid, generator = selection.grid, torch.Generator().manual_seed(3)
    q = torch.randn(2, 6, grid.q_len, 16, generator=generator)
    k, v = (torch.randn(2, 2, grid.kv_len, 16, generator=generator) for _ in range(2))
    if poisoned:
        v[:, :, :16] = torch.nan
    leaves = [x.to(dtype).requires_grad_(not poisoned) for x in (q, k, v, torch.randn(6, generator=generator))]
    out, lse = block_sparse_attention(*leaves[:3], selection, sinks=leaves[3], softcap=4.0, impl=impl, return_lse=True)
    if poisoned:
        return [out, lse]
    grads = torch.autograd.grad(out.sin().sum() + lse.cos().sum(), leaves)
    return [x.detach().to(torch.float64) for x in (out, lse, *grads)]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("scores", [1 << 10, 1 << 21])
@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize(
    "grid", [TileGrid(333, 333, 64, 16), TileGrid(100, 361, 64, 32), TileGrid(1, 250, 1, 16)], ids=str
)
def test_lists_of_unequal_length_have_the_results_and_gradients_of_the_reference(
    grid, impl, scores, random_selection, monkeypatch
):
    monkeypatch.setattr(chunks, "CHUNK_SCORES", scores)
    selection = random_selection(5, 2, 2, grid, 0.4)
    counts = (selection.indices >= 0).sum(-1)
    assert bool((counts != counts[:1, :1]).any())
    for got, want in zip(attended(selection, impl), attended(selection, "reference", torch.float64), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_an_empty_entry_never_reads_the_value_of_block_0(impl, random_selection):
    grid = TileGrid(1, 250, 1, 16)
    lists = torch.tensor([[2, 5, 9, 15], [-1, -1, 3, 15], [-1, 4, 7, 15], [1, 2, 3, 15]]).view(2, 2, 1, 4).int()
    out, lse = attended(BlockSelection(lists, grid), impl, poisoned=True)
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())


@pytest.mark.parametrize("growing", [False, True])
def test_lists_of_a_fixed_budget_are_cut_along_the_sequence_all_rows_together(growing, random_selection, monkeypatch):
    grid = TileGrid(640, 640, 64, 16)
    counts = torch.arange(10) + 4 if growing else torch.full((10,), 4)
    index = torch.where(torch.arange(13).flip(0) < counts[:, None], torch.arange(13), -1).int().expand(4, -1, -1)
    monkeypatch.setattr(chunks, "CHUNK_SCORES", 3 * 4 * 64 * 13 * 16)
    cut = list(chunks.tile_chunks(index, grid, 64))
    assert [(chunk.rows, chunk.tiles) for chunk in cut] == [
        (slice(None), slice(at, min(at + 3, 10))) for at in (0, 3, 6, 9)
    ]
    for chunk in cut:
        assert torch.equal(chunk.lists, index[:, chunk.tiles, -int(counts[chunk.tiles].max()) :])


def test_lists_of_unequal_length_are_cut_by_length_and_each_tile_is_in_one_chunk(random_selection, monkeypatch):
    index = random_selection(1, 2, 2, TileGrid(640, 640, 64, 16), 0.4).indices.flatten(0, 1)
    monkeypatch.setattr(chunks, "CHUNK_SCORES", 3 * 64 * 10 * 16)
    seen = torch.zeros(4, 10, dtype=torch.long)
    for rows, tiles, part in chunks.tile_chunks(index, TileGrid(640, 640, 64, 16), 64):
        seen[rows, tiles] += 1
        assert torch.equal(part, index[rows, tiles, -part.shape[-1] :]) and bool(
            (index[rows, tiles, : -part.shape[-1]] < 0).all()
        )
        assert part.numel() * 64 * 16 <= 3 * 64 * 10 * 16 or len(tiles) == 1
    assert bool((seen == 1).all())


# -- keys that are kept ---------------------------------------------------------------------------------------------


def test_kept_keys_are_those_of_the_blocks(random_selection):
    for grid in (TileGrid(333, 333, 64, 16), TileGrid(1, 250, 1, 16)):
        selection = random_selection(2, 2, 2, grid, 0.5)
        assert torch.equal(selection.kept_keys(), _literal_keys(selection))
    documents = torch.tensor([[0, 0, 120], [0, 120, 333], [1, 5, 300]])
    parts = [
        random_selection(i, 1, 2, TileGrid(end - at, end - at, 64, 16), 0.5)
        for i, (_, at, end) in enumerate(documents.tolist())
    ]
    width, tiles = max(p.indices.shape[3] for p in parts), max(p.indices.shape[2] for p in parts)
    padded = [
        torch.nn.functional.pad(p.indices, (width - p.indices.shape[3], 0, 0, tiles - p.indices.shape[2]), value=-1)
        for p in parts
    ]
    whole = BlockSelection(torch.cat(padded), TileGrid(333, 333, 64, 16), documents=documents)
    for row, part in zip(whole.kept_keys(), parts, strict=True):
        assert torch.equal(row[:, : part.grid.tiles], _literal_keys(part)[0]) and not row[:, part.grid.tiles :].any()


def _literal_keys(selection):
    sizes = torch.tensor([min(16, selection.grid.kv_len - 16 * b) for b in range(selection.grid.blocks)])
    return (selection.kept() * sizes).sum(-1)


def test_a_uniform_budget_keeps_what_it_asks_for(sparse_llama, real_budget, token_ids):
    model, meter = sparse_llama({**real_budget, "min_keys": 96, "max_keys": 96}), KeptKeys(96)
    assert meter.mean() is None
    with torch.no_grad():
        model(token_ids(2, 160), use_cache=False, sparse_call=meter)
    assert meter.mean() == 96 and {layer: kept.tolist() for layer, kept in meter.by_layer().items()} == {
        0: [96, 96],
        1: [96, 96],
    }
    assert meter.tiles == {0: 8, 1: 8}  # of the ten tiles of a row the last four start at 96 or later


# -- fitting --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batches(token_ids):
    return [{"input_ids": token_ids(2, 400, seed=seed), "labels": None} for seed in range(4)]


@pytest.fixture
def model(sparse_llama, real_budget):
    return sparse_llama({**real_budget, "candidate_factor": 4.0}, noise=0.3)


def kept_on(model, batches, first=0):
    meter = KeptKeys(first)
    run_sparse(model, batches, meter)
    return meter.mean()


@pytest.mark.parametrize("first", [0, 200])
def test_a_fit_keeps_the_asked_average_within_one_percent(model, batches, first):
    weights = {name: p.clone() for name, p in model.named_parameters()}
    fit = fit_mass_threshold(model.train(), batches, keys=128, first=first)
    assert model.training and all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    stored = model.config.sparse_attention
    assert (stored["mass_threshold"], stored["min_keys"], stored["max_keys"]) == (fit.threshold, 128, 128)
    assert fit.asked == 128 and fit.kept == pytest.approx(128, rel=0.01) and fit.to_dict()["tiles"] == fit.tiles
    assert kept_on(model, batches, first) == pytest.approx(128, rel=0.01)
    with sparse_attention_as(model, mass_threshold=None):
        assert kept_on(model, batches, first) == 128


def test_a_fit_without_a_number_keeps_the_average_of_the_present_budget(model, batches):
    set_sparse_attention(model, density=0.4)
    uniform = kept_on(model, batches)
    fit = fit_mass_threshold(model, batches)
    assert model.config.sparse_attention["density"] == 0.4 and model.config.sparse_attention["max_keys"] is None
    assert fit.asked == pytest.approx(uniform, rel=0.01) and kept_on(model, batches) == pytest.approx(uniform, rel=0.01)


def test_a_histogram_finds_the_threshold_of_a_sort(router, routing_inputs):
    result = mass_threshold.candidates(router, routing_inputs(250, batch=2), 16)
    histogram = mass_threshold.Histogram()
    for _ in range(2):
        histogram.add(result, result.mass)
    values = result.mass[result.free].sort(descending=True).values
    forced = int((result.every.indices >= 0)[:, :, result.counted].sum()) - len(values)
    rows = 4 * int(result.counted.sum())
    for keys in (80, 96, 130):
        most = int(keys * rows / 16 - forced)
        threshold = histogram.threshold(keys)
        kept = int((values >= threshold).sum())
        lower = (torch.tensor(threshold).view(torch.int32) - (1 << mass_threshold.BITS)).view(torch.float32)
        assert kept <= most < int((values >= lower).sum()) and lower > 0.999 * threshold
        assert histogram.kept_keys(threshold) == pytest.approx(16 * (forced + kept) / rows)
    assert histogram.asked_keys() == pytest.approx(16 * (forced + int(result.asked[result.counted].sum()) * 4) / rows)


def test_a_threshold_is_saved_with_the_model_and_read_again(model, batches, token_ids, tmp_path):
    fit = fit_mass_threshold(model, batches, keys=112)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (
        routers(again)[0].config == routers(model)[0].config
        and again.config.sparse_attention["mass_threshold"] == fit.threshold
    )
    ids = token_ids(1, 300)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_what_has_nothing_to_select_cannot_be_fitted(model, token_ids, stock_llama):
    before = dict(model.config.sparse_attention)
    with pytest.raises(ValueError, match=r"nothing to select from position 100 on.*min_keys \(128\)"):
        fit_mass_threshold(model, [{"input_ids": token_ids(1, 100)}], keys=128, first=100)
    with pytest.raises(ValueError, match=r"min_keys is 10: must be >= "):
        fit_mass_threshold(model, [{"input_ids": token_ids(1, 300)}], keys=10)
    assert model.config.sparse_attention == before and routers(model)[0].config.to_dict() == before
    with pytest.raises(ValueError, match="LlamaForCausalLM has no routers"):
        fit_mass_threshold(stock_llama(), [], keys=128)


# -- settings, training and timing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 1, 1.5, -0.1, "half", True, float("nan")])
def test_an_impossible_threshold_is_refused(value):
    with pytest.raises(ValueError, match=r"sparse_attention\.mass_threshold is .*must be"):
        hf_sparse_attn.SparseAttentionConfig(mass_threshold=value)


def test_a_budget_cannot_leave_its_threshold_behind(varying):
    for changes in ({"density": 0.5}, {"min_keys": 128}, {"max_keys": 128}):
        with pytest.raises(
            ValueError, match=rf"{next(iter(changes))} cannot change alone: mass_threshold=0\.03.*fit_mass_threshold"
        ):
            set_sparse_attention(varying, **changes)
    assert set_sparse_attention(varying, query_samples=4).mass_threshold == 0.03
    with sparse_attention_as(varying, min_keys=128, max_keys=128, mass_threshold=None):
        assert routers(varying)[0].config.mass_threshold is None
    assert (routers(varying)[0].config.mass_threshold, routers(varying)[0].config.min_keys) == (0.03, 96)
    assert set_sparse_attention(varying, min_keys=128, mass_threshold=0.02).min_keys == 128
    assert set_sparse_attention(varying, min_keys=96, mass_threshold=None).mass_threshold is None


def test_a_threshold_that_is_fitted_in_a_with_block_ends_with_it(model, batches):
    with sparse_attention_as(model, min_keys=112, max_keys=112):
        fit_mass_threshold(model, batches[:1])
        assert model.config.sparse_attention["mass_threshold"] is not None
    assert model.config.sparse_attention["mass_threshold"] is None and model.config.sparse_attention["min_keys"] == 80


@pytest.mark.parametrize("name", ["density", "min_keys", "max_keys"])
def test_annealing_a_budget_under_a_threshold_is_refused_before_the_first_step(varying, name):
    ends = {"density": [0.5, 0.1], "min_keys": [128, 96], "max_keys": [200, 100]}[name]
    with pytest.raises(
        ValueError, match=rf"lora\.anneal moves {name}, but sparse_attention\.mass_threshold=0\.03 was fitted"
    ):
        SparseObjective(varying, SparseTrainingConfig(anneal={name: ends}))
    SparseObjective(varying, SparseTrainingConfig(anneal={"kl_weight": [0.2, 0.1], "query_samples": [16, 8]}))


def test_a_training_step_attends_to_what_the_threshold_keeps(varying, token_ids):
    ids, meter = token_ids(1, 208), KeptKeys()
    objective = SparseObjective(varying, SparseTrainingConfig(dense_every=0, kl_tile_share=2))
    forward = objective.forward(0, 2)
    loss = varying(ids, labels=ids, use_cache=False, sparse_call=forward).loss
    (loss + forward.kl_loss()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in varying.parameters() if p.requires_grad)
    with torch.no_grad():
        sparse = varying(ids, labels=ids, use_cache=False, sparse_call=meter).loss
    assert float(loss.detach()) == pytest.approx(float(sparse), abs=1e-5)
    visible, tiles = torch.arange(16, 209, 16), torch.arange(13) >= 6  # tiles that see more than their 96 keys
    kept = meter.mean() * tiles.sum() + visible[~tiles].sum()
    assert forward.statistics().density == pytest.approx(float(kept / visible.sum()), rel=1e-4)


def test_times_of_varying_and_uniform_budgets_are_taken_in_turns(model, batches, token_ids):
    set_sparse_attention(model, min_keys=128, max_keys=128)
    row = bench_budgets(model, token_ids(1, 400), 0.02, repeats=2)
    assert (
        row["length"] == 400
        and 64 < row["keys"]["uniform"] <= 128
        and row["keys"]["threshold"] != row["keys"]["uniform"]
    )
    assert set(row["seconds"]) == {
        f"{p}, {k}" for p in ("select", "attend", "attend in torch") for k in ("uniform", "threshold")
    }
    assert all(result["n"] == 2 and result["min_s"] > 0 for result in row["seconds"].values())
    assert set(row["over_uniform"]) == {"select", "attend", "attend in torch", "select + attend"}


def test_as_many_blocks_hold_more_mass_by_a_threshold_than_by_a_uniform_budget(router, routing_inputs):
    result = mass_threshold.candidates(router, routing_inputs(250, batch=2), 16)
    count = int(result.asked[result.counted].sum()) * 4
    best = torch.arange(result.mass.shape[-1]) < result.asked[:, None]
    uniform = result.mass.sort(descending=True).values.masked_fill(~best, 0)[:, :, result.counted].sum()
    values = result.mass[result.free].sort(descending=True).values
    varying = result.keep(result.mass >= values[count - 1])
    kept = (varying.indices >= 0) & result.counted[:, None]
    assert int(kept.sum()) == count + int(((result.every.indices >= 0) & ~result.free)[:, :, result.counted].sum())
    forced = result.every.scores[~result.free & (result.every.indices >= 0) & result.counted[:, None]].sum()
    assert varying.scores[kept].sum() - forced > 1.02 * uniform


def test_passes_that_observe_keep_no_graph(sparse_llama, real_budget, token_ids):
    """A graph of every window would fill the memory; the caller's own mode stays."""

    class Modes(SparseCall):
        def on_document(self, router, inputs):
            modes.append((torch.is_grad_enabled(), model.training))

    model, modes = sparse_llama(real_budget).train(), []
    run_sparse(model, [{"input_ids": token_ids(1, 160)}], Modes())
    assert set(modes) == {(False, False)} and torch.is_grad_enabled() and model.training
