"""Selectors by name, scores that are refused, and each score against its formula on small tensors."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.paths import ROOT

from hf_sparse_attn import SparseCall
from hf_sparse_attn.data.windows import Window
from hf_sparse_attn.evaluation.baselines import (
    BlockSelector,
    MeanPool,
    MeanStd,
    MinMax,
    Oracle,
    ScoringCall,
    SelectorError,
    make_selectors,
    register_selector,
    selector_names,
    unregister_selector,
)
from hf_sparse_attn.evaluation.quality import evaluate_windows
from hf_sparse_attn.router.budget import make_plan

N, SIZE = 250, 16  # the last tile and the last block are partial
WHOLE = N // SIZE


class LastKeys(BlockSelector):
    """A block is worth what its last key is worth to the queries of a tile, on average."""

    name = "last keys"

    def scores(self, call, tiles):
        q = call.queries(tiles).sum((3, 4)) / call.is_token(tiles).sum(-1)[:, None]
        return q @ call.blocks[:, :, :, -1].mT


@pytest.fixture
def registered():
    yield register_selector(LastKeys)
    unregister_selector("last keys")


@pytest.fixture(params=[(N, 16), (40, 16), (5, 1)], ids=["prefill", "chunk", "decode"])
def call(request, make_router, routing_inputs):
    q_len, tile = request.param
    inputs, router = routing_inputs(N, q_len, batch=2), make_router()
    return ScoringCall(router, inputs, make_plan(router.config, inputs.grid(tile, SIZE)))


def every_tile(call):
    return torch.arange(call.plan.grid.tiles)


def literal(call, of_query, row, group, tile, block):
    """log Σ exp over a tile's queries and heads of ``of_query``(scaled q, keys of a block)."""
    q, grid = call.inputs.q.double() * call.inputs.scale, call.plan.grid
    first = grid.q_offset // grid.query_tile + tile
    tokens = [i for i in range(grid.q_len) if (grid.q_offset + i) // grid.query_tile == first]
    keys = call.inputs.k[row, group, block * SIZE : (block + 1) * SIZE].tolist()
    result = [of_query(q[row, head, i].tolist(), keys) for head in (2 * group, 2 * group + 1) for i in tokens]
    return math.log(sum(math.exp(score) for score in result))


# -- scores by their formulas -----------------------------------------------------------------------------------------


def bound(q, keys):
    return sum(max(x * max(column), x * min(column)) for x, column in zip(q, zip(*keys, strict=True), strict=True))


def mean_and_spread(q, keys):
    mean = [sum(column) / len(keys) for column in zip(*keys, strict=True)]
    squares = [(x - m) ** 2 for key in keys for x, m in zip(key, mean, strict=True)]
    norm = math.sqrt(sum(x * x for x in q))
    return sum(x * m for x, m in zip(q, mean, strict=True)) + 0.5 * norm * math.sqrt(sum(squares) / len(squares))


@pytest.mark.parametrize(
    ("selector", "formula"), [(MinMax(), bound), (MeanStd(), mean_and_spread)], ids=["min-max", "mean-std"]
)
def test_scores_of_queries_are_their_formula(selector, formula, call):
    scores = selector.scores(call, every_tile(call))
    assert scores.shape == (2, 2, call.plan.grid.tiles, WHOLE)
    cells = torch.cartesian_prod(*map(torch.arange, scores.shape))
    for cell in cells[torch.randperm(len(cells), generator=torch.Generator().manual_seed(0))[:40]].tolist():
        assert float(scores[tuple(cell)]) == pytest.approx(literal(call, formula, *cell), abs=1e-5)


def test_mean_pool_is_the_mean_query_against_the_mean_key(make_router, routing_inputs):
    """Without RoPE: log Σ over the 8 runs of a tile of exp(mean over heads and tokens of q · mean of k)."""
    inputs, router = routing_inputs(N), make_router(noise=0.5)
    call = ScoringCall(router, inputs, make_plan(router.config, inputs.grid(16, SIZE)))
    result = MeanPool().scores(call, every_tile(call))
    for group, tile, block in ((0, 9, 3), (1, 9, 0), (1, 15, 7)):
        mean = inputs.k[0, group, block * SIZE : (block + 1) * SIZE].double().mean(0)
        runs = [
            inputs.q[0, 2 * group : 2 * group + 2, at : min(at + 2, N)].double()
            for at in range(tile * 16, min(tile * 16 + 16, N), 2)
        ]
        want = math.log(sum(math.exp(float(run.mean((0, 1)) @ mean) * inputs.scale) for run in runs))
        assert float(result[0, group, tile, block]) == pytest.approx(want, abs=1e-5)


def test_the_bound_of_min_max_lies_above_every_product(call):
    q = call.queries(every_tile(call)).flatten(2, 4)
    products = q[:, :, :, None, None] @ call.blocks[:, :, None].mT  # [B, G, L, w, 1, S]
    bounds = MinMax().of_queries(q, call.blocks)
    assert bool((bounds[..., None] >= products[..., 0, :] - 1e-5).all())
    alone = call.blocks[:, :, :, :1].expand_as(call.blocks)  # a block of equal keys: the bound is the product
    torch.testing.assert_close(MinMax().of_queries(q, alone), q @ alone[:, :, :, 0].mT)


def test_the_spread_of_mean_std_is_that_of_products_over_all_directions(call):
    """Over an orthonormal basis the mean variance of q·k within a block is std²; a block of equal keys has none."""
    dim = call.blocks.shape[-1]
    q = torch.eye(dim).expand(2, 2, -1, -1)
    products = q[:, :, :, None] @ call.blocks.flatten(2, 3)[:, :, None].mT
    products = products.unflatten(-1, (WHOLE, SIZE))[:, :, :, 0]
    offset = MeanStd().of_queries(q, call.blocks) - products.mean(-1)
    want = products.var(-1, correction=0).mean(2).sqrt() / 2
    torch.testing.assert_close(offset, want[:, :, None].expand_as(offset), rtol=1e-4, atol=1e-5)
    alone = call.blocks[:, :, :, :1].expand_as(call.blocks)
    torch.testing.assert_close(MeanStd().of_queries(q, alone), alone[:, :, :, 0].mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["min-max", "mean-std", "mean-pool", "random"])
def test_a_selection_does_not_depend_on_how_many_tiles_are_scored_at_a_time(name, call, monkeypatch):
    [whole], [single] = (make_selectors([name]).values() for _ in range(2))
    monkeypatch.setattr(single, "tiles_at_a_time", lambda call: 1)
    router, inputs, tile = call.router, call.inputs, call.plan.grid.query_tile
    assert torch.equal(single(router, inputs, tile).indices, whole(router, inputs, tile).indices)


# -- selectors of others ----------------------------------------------------------------------------------------------


def test_a_selector_of_ones_own_is_evaluated_beside_the_others(registered, sparse_llama, real_budget, token_ids):
    assert selector_names()[-1] == "last keys"
    model, names = sparse_llama(real_budget), ["oracle", "last keys", "window + sink"]
    results = evaluate_windows(model, [Window("a", token_ids(1, 160))], [80], make_selectors(names), decode_tokens=8)
    by_name = {result.selection: result for result in results}
    assert list(by_name) == ["dense", *names] and all(by_name[name].kept == 80 for name in names)
    assert len({by_name[name].prefill for name in names}) == 3


def test_a_selector_of_ones_own_keeps_its_best_blocks_and_the_forced_ones(call):
    selection = LastKeys()(call.router, call.inputs, call.plan.grid.query_tile)
    scores, plan, tiles = LastKeys().scores(call, every_tile(call)), call.plan, every_tile(call)
    eligible = plan.eligible_mask(tiles)[:, :WHOLE]
    for row, group, tile in torch.cartesian_prod(torch.arange(2), torch.arange(2), tiles).tolist():
        ranked = scores[row, group, tile].masked_fill(~eligible[tile], -torch.inf).argsort(descending=True)
        visible = set(range(int(plan.last[tile]) + 1))
        want = set(ranked[: int(plan.free[tile])].tolist()) | {
            b for b in visible if b >= WHOLE or not eligible[tile, b]
        }
        assert {b for b in selection.indices[row, group, tile].tolist() if b >= 0} == want


def test_an_instance_is_what_a_call_takes(sparse_llama, real_budget, token_ids):
    model, ids = sparse_llama(real_budget, noise=0.1), token_ids(1, 160)
    with torch.no_grad():
        mine, oracle = (model(ids, sparse_call=SparseCall(selector=one)).logits for one in (LastKeys(), Oracle()))
    assert mine.shape == oracle.shape and not torch.equal(mine, oracle)


def test_a_call_refuses_a_class_and_a_name():
    with pytest.raises(
        TypeError, match=r"SparseCall\.selector is <class .*Oracle'>: must be an instance, such as Oracle\(\)"
    ):
        SparseCall(selector=Oracle)
    with pytest.raises(
        TypeError,
        match=r"SparseCall\.selector is 'oracle': must be an instance, such as make_selectors\(\)\['oracle'\]",
    ):
        SparseCall(selector="oracle")


def class_of(**members):
    return type("Mine", (BlockSelector,), {"scores": LastKeys.scores, **members})


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (
            lambda: class_of(name="min-max"),
            r"Mine: the name 'min-max' is that of .*key_bounds\.MinMax; .* unregister_selector\('min-max'\)",
        ),
        (lambda: class_of(name="dense"), "the name 'dense' is that of dense attention"),
        (lambda: class_of(), "Mine.name is None: must be a text"),
        (lambda: class_of(name="a,b"), "Mine.name is 'a,b': must be a text without commas"),
        (lambda: class_of(name=" "), "Mine.name is ' ': must be a text"),
        (lambda: type("Mine", (BlockSelector,), {"name": "mine"}), "Mine has no scores: derive it from BlockSelector"),
        (lambda: type("Mine", (), {"name": "mine"}), "Mine has no __call__: derive it from BlockSelector"),
        (lambda: LastKeys(), "must be a class, not an instance"),
    ],
    ids=["taken", "dense", "no name", "comma", "blank", "no scores", "no call", "instance"],
)
def test_a_selector_that_cannot_be_registered_is_refused(selector, message):
    before = selector_names()
    with pytest.raises(SelectorError, match=message):
        register_selector(selector())
    assert selector_names() == before


def test_an_unknown_name_is_refused_with_those_there_are(registered):
    with pytest.raises(
        SelectorError,
        match=r"no selector 'quset'; known: oracle, two stages, .*random, .*, last keys\. One of your own",
    ):
        make_selectors(["oracle", "quset"])
    with pytest.raises(SelectorError, match="no selector 'quset'"):
        unregister_selector("quset")


def scores_like(change):
    return class_of(name="mine", scores=lambda self, call, tiles: change(LastKeys.scores(self, call, tiles)))()


def with_nan(scores):
    scores[0, 1, 2, 3] = torch.nan
    return scores


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s[:, :1],
            r"selector 'mine' gave scores of shape \[1, 1, 16, 15\]: must be \[1, 2, 16, 16\] .* or 15 in the last "
            r"place",
        ),
        (lambda s: s.mT, r"shape \[1, 2, 15, 16\]: must be \[1, 2, 16, 16\]"),
        (lambda s: s.bfloat16(), r"gave scores in torch\.bfloat16 on cpu: must be torch\.float32 on cpu"),
        (lambda s: s.long(), r"gave scores in torch\.int64 on cpu"),
        (lambda s: s.to("meta"), r"gave scores in torch\.float32 on meta: must be torch\.float32 on cpu"),
        (lambda s: s.tolist(), "gave scores of type list: scores\\(\\) must return a tensor"),
        (with_nan, "gave NaN as the score of block 3 for tile 2 of KV head 1 in row 0 of layer 0"),
    ],
    ids=["heads", "transposed", "bfloat16", "integers", "device", "list", "nan"],
)
def test_scores_that_do_not_fit_are_refused(change, message, make_router, routing_inputs):
    with pytest.raises(SelectorError, match=message):
        scores_like(change)(make_router(), routing_inputs(N), 16)


def test_the_page_has_a_row_for_every_selector_with_its_score():
    rows = [
        line.split("|")[1].strip()
        for line in (ROOT / "docs" / "selectors.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    at = rows.index("dense")
    assert tuple(rows[at : at + 1 + len(selector_names())]) == ("dense", *selector_names())
