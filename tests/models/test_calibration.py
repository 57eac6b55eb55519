"""Budgets by layer, KV head and length: how they select, how they are found, and with what a stored calibration is
refused.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import math
import shutil
from collections import defaultdict

import pytest
import torch
from helpers.calls import Watching
from hf_sparse_attn_kernels import BlockSelection, TileGrid
from peft import get_peft_model
from transformers import AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

import hf_sparse_attn
from hf_sparse_attn import (
    SparseCall,
    remove_calibration,
    routers,
    set_sparse_attention,
    sparse_attention_as,
    sparsify,
    use_calibration,
)
from hf_sparse_attn.cli import options as cli_options
from hf_sparse_attn.cli.commands import app
from hf_sparse_attn.data.questions import ask
from hf_sparse_attn.data.windows import Window, batches
from hf_sparse_attn.evaluation import calibrate as calibrate_module
from hf_sparse_attn.evaluation import calibration_observers
from hf_sparse_attn.evaluation.calibrate import calibrate, failures
from hf_sparse_attn.evaluation.calibration_check import uniform_budget, uniform_keys, uniform_share
from hf_sparse_attn.evaluation.calibration_observers import (
    KeptObserver,
    PlantedObserver,
    length_buckets,
    needed_share,
    tile_figures,
    visible_keys,
)
from hf_sparse_attn.models import calibration
from hf_sparse_attn.models.adapters import active_routers
from hf_sparse_attn.models.calibration import FILE, CalibrationError, read_calibration, write_calibration
from hf_sparse_attn.router.budget import make_plan
from hf_sparse_attn.router.head_budgets import HeadBudgets
from hf_sparse_attn.router.selection import select_blocks
from hf_sparse_attn.system.outputs import OutputError
from hf_sparse_attn.training.mass_threshold import AtThreshold, Candidates, fit_threshold

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

N = 250
LENGTH = 512
FULL_RANK = {"query_samples": 16, "index_dim": 16}
SHARP = {"initializer_range": 0.6}  # a random model that looks at some keys more than at others
MASS = 0.6
EVERY_CANDIDATE = {"candidate_factor": 100.0, "max_keys": None}


# -- selecting ------------------------------------------------------------------------------------------------------


def test_the_bucket_and_the_largest_budget_by_hand():
    budgets = HeadBudgets((128, 256), ((0.5, 1.0), (0.25, 0.26)))
    assert [budgets.bucket(keys) for keys in (1, 128, 129, 256, 999)] == [0, 0, 1, 1, 1]
    assert budgets.most_blocks(100, 16) == 4 and budgets.most_blocks(250, 16) == math.ceil(65 / 16) == 5
    assert (
        not budgets.is_dense
        and HeadBudgets((64,), ((1.0, 1.0),)).is_dense
        and HeadBudgets((64,), ((1.0, 1.0),)).most_blocks(64, 16) == 0
    )


@pytest.mark.parametrize(
    ("ends", "shares", "message"),
    [
        ((), (), "must be rising"),
        ((128, 128), ((0.5,), (0.5,)), "must be rising"),
        ((128, 256), ((0.5,),), "2 length buckets need"),
        ((128,), ((0.7, 1.0),), "share of the keys is 0.7"),
        ((128,), ((0.0, 1.0),), "share of the keys is 0.0"),
        ((128,), ((0.5, 64.0),), "share of the keys is 64.0"),
    ],
)
def test_impossible_budgets_are_refused(ends, shares, message):
    with pytest.raises(ValueError, match=message):
        HeadBudgets(ends, shares)
    with pytest.raises(ValueError, match=r"budget is 0\.5 keys"):
        HeadBudgets((128,), ((0.5, 64.0),), in_keys=True)


@pytest.mark.parametrize(("q_len", "tile"), [(N, 16), (40, 16), (5, 1), (1, 1)])
@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_every_head_keeps_what_its_own_budget_alone_would(q_len, tile, impl, make_router, routing_inputs):
    router = make_router(rotary=True, noise=0.3, **EVERY_CANDIDATE)
    inputs, shares = routing_inputs(N, q_len, batch=2), ((0.6, 0.45), (0.35, 0.6))
    router.budgets = HeadBudgets((128, 256), shares)
    result = select_blocks(router, inputs, tile, impl=impl).kept()
    router.budgets = None
    forced, config = router.config.forced_keys, router.config
    visible = make_plan(config, inputs.grid(tile, 16)).grid.last_positions() + 1
    for bucket, row in enumerate(shares):
        tiles = (visible <= 128) == (bucket == 0)
        for head, share in enumerate(row):
            router.config = config.changed(density=share, min_keys=forced)
            alone = select_blocks(router, inputs, tile, impl=impl).kept()
            enough = tiles & (visible * share >= forced)  # a budget below the forced keys keeps just these
            assert torch.equal(result[:, head, enough], alone[:, head, enough])
            plan = make_plan(config, inputs.grid(tile, 16))
            blocks = torch.maximum(torch.ceil(share * visible / 16), (plan.last + 1 - plan.eligible).float())
            assert torch.equal(result[:, head, tiles].sum(-1)[0].float(), torch.minimum(blocks, plan.last + 1.0)[tiles])


@pytest.mark.parametrize(("q_len", "tile"), [(N, 16), (5, 1), (1, 1)])
def test_budgets_in_keys_are_those_that_each_head_alone_would_keep(q_len, tile, make_router, routing_inputs):
    router, inputs = make_router(rotary=True, noise=0.3, **EVERY_CANDIDATE), routing_inputs(N, q_len, batch=2)
    router.budgets = HeadBudgets((N,), ((80.0, 160.0),), in_keys=True)
    result = select_blocks(router, inputs, tile).kept()
    router.budgets, config = None, router.config
    for head, keys in enumerate((80, 160)):
        router.config = config.changed(min_keys=keys, max_keys=keys)
        assert torch.equal(result[:, head], select_blocks(router, inputs, tile).kept()[:, head])


def test_a_dense_head_sees_everything_and_leaves_the_others_alone(make_router, routing_inputs):
    router, inputs = make_router(rotary=True, noise=0.3, **EVERY_CANDIDATE), routing_inputs(N, batch=2)
    router.budgets = HeadBudgets((N,), ((0.4, 0.4),))
    both = select_blocks(router, inputs, 16).kept()
    router.budgets = HeadBudgets((N,), ((1.0, 0.4),))
    result = select_blocks(router, inputs, 16)
    plan = make_plan(router.config, result.grid)
    assert torch.equal(result.kept()[:, 1], both[:, 1])
    assert torch.equal(result.kept()[0, 0], torch.arange(plan.grid.blocks) <= plan.last[:, None])
    result.check(inputs.q, inputs.k, values=True)
    router.budgets = HeadBudgets((128, N), ((1.0, 1.0), (0.4, 0.4)))  # all dense at first: nothing to score there
    mixed = select_blocks(router, inputs, 16).kept()
    first = make_plan(router.config, result.grid).grid.last_positions() + 1 <= 128
    assert torch.equal(mixed[:, :, ~first], both[:, :, ~first])
    assert torch.equal(mixed[0, 0, first], (torch.arange(plan.grid.blocks) <= plan.last[:, None])[first])


def test_two_sided_calls_have_budgets_by_head_too(make_router, routing_inputs):
    router = make_router(rotary=True, noise=0.3, **EVERY_CANDIDATE)
    inputs = dataclasses.replace(routing_inputs(N), causal=False)
    router.budgets = HeadBudgets((N,), ((1.0, 0.5),))
    result = select_blocks(router, inputs, 16).kept()
    assert bool(result[:, 0].all()) and set(result[0, 1].sum(-1).tolist()) == {8}


# -- what tiles need ------------------------------------------------------------------------------------------------


def test_the_needed_share_by_hand():
    """Four blocks of 16: the first forced, the others in the order 2, 1, 3 of the router."""
    grid = TileGrid(16, 64, 16, 16)
    every = BlockSelection(
        torch.tensor([[[[-1, 0, 1, 2, 3]]]], dtype=torch.int32),
        grid,
        torch.tensor([[[[math.nan, 0.1, 0.2, 0.3, 0.1]]]]),
    )
    free = torch.tensor([[[[False, False, True, True, True]]]])
    result = Candidates(every, free, torch.tensor([True]), torch.tensor([1]))
    teacher = torch.tensor([[[[0.5, 0.1, 0.25, 0.15]]]])

    def need(mass):
        return float(needed_share(result, torch.tensor([0]), teacher, mass, torch.tensor([64])))

    assert [need(mass) for mass in (0.4, 0.5, 0.6, 0.75, 0.8, 0.86, 0.999)] == [0.25, 0.25, 0.5, 0.5, 0.75, 1.0, 1.0]
    every.indices[..., 3], free[..., 3] = -1, False  # block 2 is no candidate
    assert need(0.6) == 0.5 and need(0.8) == 1.0


def test_the_bound_of_a_quantile_knows_that_windows_differ():
    alike, apart = tile_figures((N,)), tile_figures((N,))
    generator = torch.Generator().manual_seed(0)
    for at in range(6):
        values = torch.rand(1, 2, 100, generator=generator)
        alike.add(0, torch.full((100,), N), values)
        apart.add(0, torch.full((100,), N), values * (0.5 if at else 1.0))  # one window needs twice as much
    for figures, least, most in ((alike, 0.0, 0.02), (apart, 0.05, 0.5)):
        above = figures.bound(0.95, 0.9)[0, 0] - figures.quantile(0.95, "higher")[0, 0]
        assert above.shape == (2,) and bool((above >= least).all()) and bool((above <= most).all())


def test_length_buckets_double():
    assert length_buckets(1024) == (256, 512, 1024) and length_buckets(1100) == (256, 512, 1024, 1100)
    assert length_buckets(256) == (256,) and length_buckets(300) == (256, 300)


def test_a_planted_link_counts_for_the_heads_that_use_it(make_router, routing_inputs):
    router, inputs = make_router(**EVERY_CANDIDATE), routing_inputs(N)
    inputs.k[0, 0, 100] = 10 * inputs.q[0, 0, 249]  # query head 0 of KV head 0 looks at slot 100 alone
    router.budgets = HeadBudgets((N,), ((1.0, 1.0),))
    observer = PlantedObserver(range(100, 101), 249)
    observer.on_document(router, inputs)
    assert observer.used >= 1 and observer.kept == observer.used and observer.chance == observer.used
    router.budgets = HeadBudgets((N,), ((0.01, 0.01),))  # forced links alone
    observer = PlantedObserver(range(100, 101), 249)
    observer.on_document(router, inputs)
    assert observer.used >= 1 and observer.kept == 0 and observer.chance < observer.used


# -- calibrating ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def short_buckets():
    with pytest.MonkeyPatch.context() as patch:
        for module in (calibration_observers, calibrate_module):
            patch.setattr(module, "FIRST_END", 256)
        yield


@pytest.fixture(scope="module")
def texts(token_ids):
    return [Window(f"text[{i}]", token_ids(1, LENGTH, seed=i)) for i in range(8)]


@pytest.fixture(scope="module")
def make_model(sparse_llama, real_budget):
    def make():
        return sparse_llama({**real_budget, **FULL_RANK}, noise=0.02, **SHARP)

    return make


@pytest.fixture(scope="module")
def calibrated(make_model, texts):
    """(model, calibration) at a mass that cuts some heads and leaves others dense."""
    model = make_model()
    return model, calibrate(model, texts[:5], texts[5:], [], mass=MASS)


def low_mass(model, windows, layer, bucket, head):
    """5th percentile of kept mass over the tiles that are read."""
    observer = KeptObserver((256, 512))
    for window in windows:
        model(window.ids, sparse_call=observer)
    return float(torch.cat(observer.mass.found[layer, bucket], 1)[head].quantile(0.05, interpolation="lower"))


def test_budgets_are_the_smallest_that_keep_the_mass(calibrated, texts):
    model, result = calibrated
    assert result.ends == (256, 512) and sorted(result.shares) == [0, 1]
    every = [
        (layer, b, h) for layer, rows in result.shares.items() for b, row in enumerate(rows) for h, _ in enumerate(row)
    ]
    sparse = [at for at in every if result.shares[at[0]][at[1]][at[2]] < 1]
    assert sparse and all(result.shares[a][b][h] <= 0.6 for a, b, h in sparse)
    copied = copy.deepcopy(model)
    for layer, bucket, head in sparse:
        assert low_mass(model, texts[:5], layer, bucket, head) >= MASS - 1e-4
        rows = [list(row) for row in result.shares[layer]]
        # three blocks fewer: the bound over windows lies above the quantile
        rows[bucket][head] -= 3 * 16 / result.ends[bucket]
        routers(copied)[layer].budgets = HeadBudgets(result.ends, tuple(map(tuple, rows)))
        assert low_mass(copied, texts[:5], layer, bucket, head) < MASS
        routers(copied)[layer].budgets = result.budgets(layer)


def test_what_was_verified_is_what_the_model_does(calibrated, texts):
    model, result = calibrated
    verified = result.verified
    assert verified["windows"] == ["text[5]", "text[6]", "text[7]"] and verified["losses"]["dense"]["n"] == 3
    calls = [SparseCall(dense=True), SparseCall()]
    with torch.no_grad():
        means = []
        for call in calls:
            losses = []
            for window in texts[5:]:
                logits = model(window.ids, sparse_call=call).logits[0, LENGTH // 2 - 1 : -1]
                losses.append(torch.nn.functional.cross_entropy(logits, window.ids[0, LENGTH // 2 :]))
            means.append(float(torch.stack(losses).mean()))
    assert verified["losses"]["dense"]["loss"] == pytest.approx(means[0], abs=1e-5)
    assert verified["losses"]["calibrated"]["loss"] == pytest.approx(means[1], abs=1e-5) and means[0] != means[1]
    assert verified["added_loss"] == pytest.approx(means[1] / means[0] - 1, abs=1e-6)
    assert verified["density"] == pytest.approx(result.fit["density"], rel=0.1) and 0 < verified["density"] < 1
    assert verified["planted"] == {"questions": 0, "n": 0, "recall": None, "chance": None}


@pytest.mark.parametrize("uniform", [uniform_share, uniform_keys])
def test_a_uniform_budget_of_the_same_cost_is_found(uniform, make_router):
    config, grid = make_router().config, TileGrid(2048, 2048, 16, 16)
    for density in (0.1, 0.37, 0.9):
        plan = make_plan(config.changed(**uniform_budget(config, grid, density, uniform)), grid)
        assert 16 * int((plan.last + 1 - plan.eligible + plan.free).sum()) / visible_keys(grid) == pytest.approx(
            density, abs=0.01
        )


def test_an_average_budget_is_shared_out_over_heads(make_model, texts, tmp_path):
    model, keys = make_model(), 112
    result = calibrate(model, texts[:5], texts[5:], [], keys=keys)
    assert result.mass is None and result.fit["keys"] == keys and result.verified["heads_within"] is None
    # literally: one threshold, and what it keeps on average of every head in the last half of the windows
    with sparse_attention_as(model, min_keys=keys, max_keys=keys):
        threshold, _ = fit_threshold(model, batches(texts[:5]), LENGTH // 2)
        kept = defaultdict(list)

        def note(router, inputs, selection):
            kept[router.layer].append(
                selection.kept_keys()[0][:, selection.grid.first_positions() >= LENGTH // 2].float()
            )

        for window in texts[:5]:
            with torch.no_grad():
                model(window.ids, sparse_call=Watching(selector=AtThreshold(threshold), selection=note))
    every = []
    for layer, parts in kept.items():
        means = torch.cat(parts, 1).mean(1)
        assert result.shares[layer] == (tuple(16 * round(mean / 16) for mean in means.tolist()),)
        every += means.tolist()
    assert sum(every) / len(every) == pytest.approx(keys, rel=0.05) and max(every) > min(every)
    # each head keeps as many keys as its budget, wherever it sees more
    for router in routers(model):
        assert (
            router.budgets
            == HeadBudgets((LENGTH,), result.shares[router.layer], in_keys=True)
            == result.budgets(router.layer)
        )
    seen = {}
    with torch.no_grad():
        model(
            texts[6].ids,
            sparse_call=Watching(selection=lambda router, inputs, selection: seen.update({router.layer: selection})),
        )
    for layer, selection in seen.items():
        for head, mine in enumerate(result.shares[layer][0]):
            assert (selection.kept_keys()[0, head, -8:] == max(mine, 48)).all()  # 48 are forced
    uniform = result.verified["uniform"]
    assert uniform["min_keys"] == uniform["max_keys"] and result.verified["losses"]["uniform"]["n"] == 3
    model.save_pretrained(tmp_path)
    assert routers(AutoModelForCausalLM.from_pretrained(tmp_path))[1].budgets == result.budgets(1)
    assert not [text for text in failures(result) if "of the heads keep" in text]
    with pytest.raises(ValueError, match="min_keys is 16: must be >="):
        calibrate(make_model(), texts[:5], texts[5:], [], keys=16)


def test_a_budget_is_shared_out_in_a_model_with_dense_layers(make_model, texts):
    model = make_model()
    set_sparse_attention(model, dense_layers=(0,))
    result = calibrate(model, texts[:5], texts[5:], [], keys=112)
    assert result.shares[0] == ((float(LENGTH), float(LENGTH)),) and max(result.shares[1][0]) < LENGTH


def test_at_a_mass_of_one_the_logits_are_dense(make_model, stock_llama, texts, tmp_path):
    model = make_model()
    result = calibrate(model, texts[:1], texts[5:6], [], mass=1.0)
    assert (
        all(share == 1 for rows in result.shares.values() for row in rows for share in row)
        and result.verified["density"] == 1.0
    )
    with torch.no_grad():
        want, got = (m(texts[7].ids).logits for m in (stock_llama(**SHARP), model))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert read_calibration(tmp_path / FILE) == result


def test_twice_gives_the_same_file(calibrated, make_model, texts):
    again = calibrate(make_model(), texts[:5], texts[5:], [], mass=MASS)
    assert json.dumps(again.to_dict()) == json.dumps(calibrated[1].to_dict())


def test_a_planted_link_is_looked_for_in_the_questions(make_model, word_tokenizer):
    windows = [
        Window(f"w[{i}]", torch.randint(3, 97, (1, LENGTH), generator=torch.Generator().manual_seed(i)))
        for i in range(4)
    ]
    questions = ask(windows[3:], word_tokenizer, seed=0)
    result = calibrate(make_model(), windows[:3], windows[3:], questions, mass=0.9)
    assert result.verified["planted"]["questions"] == 1 and result.verified["planted"]["n"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mass": 1.5}, "the mass to keep is 1.5: must be in"),
        ({"mass": None}, "mass is None and keys is None: give"),
        ({"keys": 128}, f"mass is {MASS} and keys is 128: give"),
        ({"mass": 0.99}, "5 windows are too few for a mass of 0.99: give at least 20"),
        ({"held_out": slice(4, 6)}, "a window is in both sets"),
        ({"windows": slice(0, 1), "mass": 0.5}, "only 8 tiles up to 256 keys were read, at least 20"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(changes, message, make_model, texts):
    requested = {"windows": slice(0, 5), "held_out": slice(5, 8), "mass": MASS, **changes}
    model = make_model()
    with pytest.raises(CalibrationError, match=message):
        calibrate(
            model,
            texts[requested["windows"]],
            texts[requested["held_out"]],
            [],
            mass=requested["mass"],
            keys=requested.get("keys"),
        )
    assert routers(model)[0].budgets is None and model.config.sparse_attention["bookkeeping"]["calibration"] is None


def test_texts_shorter_than_the_budget_are_refused(make_model, token_ids):
    short = [Window(f"s[{i}]", token_ids(1, 128, seed=i)) for i in range(6)]
    with pytest.raises(CalibrationError, match="128 tokens, but nothing is cut of fewer than 256"):
        calibrate(make_model(), short[:5], short[5:], [], mass=MASS)
    other = [*short[:5], Window("x", token_ids(1, 256))]
    with pytest.raises(CalibrationError, match=r"lengths \[128, 256\]"):
        calibrate(make_model(), other[:5], other[5:], [], mass=MASS)


def test_failed_checks_by_hand(calibrated):
    _, result = calibrated
    good = {**result.verified, "heads_within": 0.95, "added_loss": 0.01, "planted": {"recall": None}}
    assert failures(dataclasses.replace(result, verified=good)) == []
    bad = {**good, "heads_within": 0.9, "added_loss": 0.011, "planted": {"recall": 0.8}}
    said = failures(dataclasses.replace(result, verified=bad))
    assert (
        len(said) == 3
        and "only 90.0% of the heads keep 0.6 − 0.01" in said[0]
        and "1.10% above dense" in said[1]
        and "80.0%" in said[2]
    )


# -- storing --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(calibrated, tmp_path):
    calibrated[0].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def test_a_saved_calibration_is_used_again(calibrated, folder, texts):
    model, result = calibrated
    assert read_calibration(folder / FILE) == result
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert [r.budgets for r in routers(loaded)] == [
        result.budgets(0),
        result.budgets(1),
    ] and loaded.calibration == result
    assert torch.equal(logits(loaded, texts[0].ids), logits(model, texts[0].ids))
    assert routers(AutoModel.from_pretrained(folder))[1].budgets == result.budgets(1)
    assert routers(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))[1].budgets == result.budgets(1)
    loaded.save_pretrained(folder.parent / "again")
    assert (folder.parent / "again" / FILE).read_bytes() == (folder / FILE).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routers(loaded)[0], "budgets", None)
        assert not torch.equal(logits(loaded, texts[0].ids), logits(model, texts[0].ids))


def test_other_settings_at_loading_leave_it_out(folder, real_budget):
    loaded = AutoModelForCausalLM.from_pretrained(folder, sparse_attention={**real_budget, **FULL_RANK})
    assert routers(loaded)[0].budgets is None


def change_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_changed_or_missing_file_is_refused(folder):
    whole = (folder / FILE).read_text()
    (folder / FILE).write_text(whole[: len(whole) // 2])
    with pytest.raises(CalibrationError, match="not a whole JSON file"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / FILE).write_text(whole)
    change_json(folder / FILE, lambda values: values["shares"]["0"][0].__setitem__(0, 0.01))
    with pytest.raises(CalibrationError, match="does not have the hash"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / FILE).write_text("{}")
    with pytest.raises(CalibrationError, match="no calibration of format 2"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / FILE).unlink()
    with pytest.raises(CalibrationError, match=r"refers to the calibration .*which is not there"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(shares=[]), r"shares is \[\]: must be a mapping"),
        (lambda values: values.update(fit=None), "fit is None: must be a mapping"),
        (lambda values: values.update(retrieval_heads=[[0]]), "retrieval_heads is .*pairs"),
        (lambda values: values.update(retrieval_heads=[[0, 9]]), "KV head 9 of layer 0: this model's layer 0 has"),
        (lambda values: values.update(preset=3), "preset is 3: must be a text or null"),
        (lambda values: values.update(mass=True), r"mass is True: must be a share in \(0, 1\] or null"),
        (lambda values: values.update(mass=2.0), r"mass is 2\.0: must be"),
        (lambda values: values.update(ends=["256"]), r"ends is \['256'\]: must be a list of numbers of keys"),
        (lambda values: values.update(ends=[10**30]), "ends is .*: must be a list of numbers of keys"),
        (lambda values: values["shares"].update({"-1": values["shares"]["0"]}), "shares has the layer '-1'"),
        (lambda values: values["shares"].update({"9" * 5000: values["shares"]["0"]}), "shares has the layer '9"),
        (
            lambda values: values["shares"].update({"0": 0.5}),
            r"shares\.0 is 0\.5: must be rows of a share for every KV head",
        ),
        (
            lambda values: values["shares"].update({"0": [[float("nan")]]}),
            r"shares\.0 is .*nan.*: must be rows of a share",
        ),
    ],
)
def test_a_file_that_was_made_by_hand_is_refused_by_the_field(change, message, folder):
    """With a hash that fits, as a file from a stranger may have."""
    values = json.loads((folder / FILE).read_text())
    del values["sha256"]
    change(values)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    (folder / FILE).write_text(json.dumps({**values, "sha256": digest}))
    with pytest.raises(CalibrationError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_file_nested_too_deep_is_refused(folder):
    (folder / FILE).write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(CalibrationError, match="nested too deep"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_retrieval_heads_are_found_and_stand_in_the_file(calibrated, folder, make_model):
    (head,) = calibrated[1].retrieval_heads
    assert [(row["layer"], row["head"]) for row in calibrated[1].fit["retrieval_heads"]] == [head]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.sparse_attention["retrieval_heads"] == [list(head)]
    other = make_model()
    assert other.config.sparse_attention["retrieval_heads"] == []
    use_calibration(other, read_calibration(folder / FILE))
    assert {router.config.retrieval_heads for router in routers(other)} == {(head,)}


def test_retrieval_heads_that_the_settings_name_are_kept(make_model, texts):
    model = make_model()
    set_sparse_attention(model, retrieval_heads=[[1, 1]])
    result = calibrate(model, texts[:5], texts[5:], [], mass=MASS)
    assert result.retrieval_heads == ((1, 1),) and result.fit["retrieval_heads"] is None


def scale(model, part):
    for name, weight in model.named_parameters():
        if part in name:
            weight.data *= 1.01


@pytest.mark.parametrize(
    ("part", "named"),
    [("wq_index", "routers"), ("mlp.up_proj", "backbone"), ("settings", "settings"), ("version", "version")],
)
def test_a_calibration_of_something_else_is_refused(
    part, named, folder, calibrated, make_model, real_budget, monkeypatch
):
    model = make_model()
    if part == "settings":
        model = sparsify(hf_sparse_attn.to_dense(model), {**real_budget, **FULL_RANK, "query_samples": 4})
        for mine, other in zip(routers(model), routers(calibrated[0]), strict=True):
            mine.load_state_dict(other.state_dict())
    elif part == "version":
        monkeypatch.setattr(calibration, "VERSION", "9.9")
    else:
        scale(model, part)
    with pytest.raises(CalibrationError, match=f"made with another {named} than"):
        use_calibration(model, read_calibration(folder / FILE))
    model.save_pretrained(folder.parent / "other")
    write_calibration(folder.parent / "other", calibrated[1])
    with pytest.raises(CalibrationError, match=f"made with another {named} than"):
        AutoModelForCausalLM.from_pretrained(folder.parent / "other")


def test_a_model_that_was_trained_on_is_saved_without_its_calibration(calibrated, tmp_path, caplog):
    model = copy.deepcopy(calibrated[0])
    scale(model, "wq_index")
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "trained")
    assert "saved without its calibration" in caplog.text and not (tmp_path / "trained" / FILE).exists()
    assert routers(AutoModelForCausalLM.from_pretrained(tmp_path / "trained"))[0].budgets is None
    assert routers(model)[0].budgets is None


def test_settings_of_a_calibrated_model_change_only_for_a_while(calibrated):
    model, result = copy.deepcopy(calibrated[0]), calibrated[1]
    with pytest.raises(ValueError, match=r"cannot change \(min_keys\): the model was calibrated"):
        set_sparse_attention(model, min_keys=96)
    with sparse_attention_as(model, min_keys=96, max_keys=96):
        assert routers(model)[0].budgets is None and routers(model)[0].config.min_keys == 96
    assert routers(model)[0].budgets == result.budgets(0)
    remove_calibration(model)
    set_sparse_attention(model, min_keys=96)
    assert model.config.sparse_attention["bookkeeping"]["calibration"] is None


def test_the_routers_of_an_adapter_have_no_calibration(calibrated, texts):
    model = copy.deepcopy(calibrated[0])
    adapted = get_peft_model(model, hf_sparse_attn.lora_config(model, r=2))
    result = active_routers(adapted)
    assert len(result) == 2 and all(router.budgets is None for router in result)
    with pytest.raises(CalibrationError, match="cannot change a model with adapters"):
        use_calibration(adapted, calibrated[1])


def test_generation_of_a_calibrated_model_follows_its_budgets(calibrated, texts):
    model = calibrated[0]
    seen = []
    call = Watching(selection=lambda router, inputs, selection: seen.append((router.layer, selection)))
    with torch.no_grad():
        past = model(texts[0].ids[:, :400], use_cache=True).past_key_values
        model(texts[0].ids[:, 400:401], past_key_values=past, sparse_call=call)
    for layer, selection in seen:
        shares = calibrated[1].shares[layer][1]
        for head, share in enumerate(shares):
            blocks = int((selection.indices[0, head, 0] >= 0).sum())
            assert blocks == (26 if share == 1 else max(math.ceil(share * 401 / 16), 3))
    assert [layer for layer, _ in seen] == [layer for layer in (0, 1) if not calibrated[1].budgets(layer).is_dense]


def test_the_verb_stores_the_calibration_and_writes_a_report(
    make_model, word_tokenizer, random_words, tmp_path, monkeypatch
):
    monkeypatch.setattr(calibrate_module, "LEAST_RECALL", 0.5)  # at so small a mass links are lost
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(random_words(600, seed=i))
    texts = ",".join(str(tmp_path / f"{i}.txt") for i in range(5))
    others = ",".join(str(tmp_path / f"{i}.txt") for i in range(5, 8))
    sizes = ["--length", "512", "--windows", "5", "--checked", "3", "--report", str(tmp_path / "c.html"), "--json", "-"]
    arguments = ["calibrate", str(folder), "--text", texts, "--held-out", others, "--mass", str(MASS), *sizes]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    result = json.loads(done.stdout)
    assert done.exit_code == 0 and result["failures"] == [] and result["calibration"]["preset"] is None
    assert json.loads((folder / FILE).read_text()) == result["calibration"]
    assert routers(AutoModelForCausalLM.from_pretrained(folder))[0].budgets is not None
    html = (tmp_path / "c.html").read_text()
    assert (
        html.count("data:image/svg+xml;base64,") == 1
        and f"{100 * result['calibration']['verified']['density']:.1f} %" in html
    )
    before = (folder / FILE).read_bytes()
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)  # a model that has one already
    assert again.exit_code == 0 and (folder / FILE).read_bytes() == before
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CalibrationError, match="was not calibrated: only"):
        patch.setattr(calibrate_module, "LEAST_WITHIN", 1.1)
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert (folder / FILE).read_bytes() == before
    at = arguments.index("--mass")
    shared = CliRunner().invoke(app, [*arguments[:at], "--keys", "448", *arguments[at + 2 :]], catch_exceptions=False)
    assert shared.exit_code == 0 and json.loads((folder / FILE).read_text())["fit"]["keys"] == 448
    assert "An average of <b>448</b> keys" in (tmp_path / "c.html").read_text() and "within" not in shared.stderr
    (folder / FILE).unlink()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OutputError, match="No space left"):
        patch.setattr(cli_options, "_write", lambda *_: OutputError("No space left on device"))
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert (folder / FILE).read_bytes() == before  # stored before it is reported
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="no folder of a saved model"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
