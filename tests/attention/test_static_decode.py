"""Steps after a static cache whose shapes do not follow its length: they keep and give what all other steps do."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_models
from helpers.agreement import assert_close_to_largest as close
from transformers import DynamicCache, StaticCache

from hf_sparse_attn.attention import static_decode
from hf_sparse_attn.models.convert import sparse_attention_as

SETTINGS = {
    "budget": {},
    "density": {"density": 0.4, "min_keys": 80},
    "threshold": {"mass_threshold": 0.02},
    "dense below": {"dense_below": 170},
    "no sink": {"sink": 0},
    "narrow index": {"index_dim": 4, "router_dim": 24},
    "retrieval heads": {"retrieval_heads": [[0, 1], [1, 0], [1, 1]]},
    "retrieval heads by threshold": {"retrieval_heads": [[0, 1], [1, 0]], "mass_threshold": 0.02},
}
PROMPT, STEPS = 150, 40


@pytest.fixture
def everywhere(monkeypatch):
    """As on an accelerator."""
    monkeypatch.setattr(static_decode, "wanted", lambda device: True)


@pytest.fixture
def used(everywhere, monkeypatch):
    """A list that grows by one for each step of a layer that is made so."""
    calls, decode = [], static_decode.decode
    monkeypatch.setattr(static_decode, "decode", lambda *args: calls.append(args[0]) or decode(*args))
    return calls


def ids(rows=2, length=PROMPT + STEPS):
    return torch.randint(3, 95, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, cache, cuts, **options):
    """Logits of ``ids`` given in parts."""
    tokens, parts = ids(), []
    for start, stop in zip([0, *cuts], [*cuts, PROMPT + STEPS], strict=True):
        parts.append(model(input_ids=tokens[:, start:stop], past_key_values=cache, **options).logits)
    return torch.cat(parts, 1)


def static(model, slots=PROMPT + STEPS + 21):
    return StaticCache(config=model.config.get_text_config(), max_cache_len=slots)


def sparse(model_type, real_budget, **changes):
    return tiny_models.sparse_tiny_model(model_type, {**real_budget, **changes})


STEPWISE = [PROMPT, *range(PROMPT + 1, PROMPT + STEPS)]


OTHERS = ("gpt_oss", "gemma2", "gpt_neox")  # sinks; a soft cap and sliding windows; a part of the head dim turned


@pytest.mark.parametrize(
    ("model_type", "name"),
    [*(("llama", name) for name in SETTINGS), *((other, name) for other in OTHERS for name in ("budget", "threshold"))],
)
def test_steps_give_the_logits_of_a_growing_cache(model_type, name, real_budget, used):
    model = sparse(model_type, real_budget, **SETTINGS[name])
    want = logits(model, DynamicCache(config=model.config), STEPWISE)
    assert not used
    close(logits(model, static(model), STEPWISE), want, 1e-5)
    assert len(used) == STEPS * len(set(used)) > 0


def test_nothing_of_it_happens_on_a_cpu(real_budget, used, monkeypatch):
    monkeypatch.undo()
    model = sparse("llama", real_budget)
    logits(model, static(model), STEPWISE)
    assert not used and not static_decode.wanted(torch.device("cpu")) and static_decode.wanted(torch.device("cuda"))


CHUNKS, TURNS = [60, *STEPWISE], [*STEPWISE[:9], PROMPT + 30, *range(PROMPT + 31, PROMPT + STEPS)]


@pytest.mark.parametrize("cuts", [CHUNKS, TURNS], ids=["chunks", "turns"])
def test_a_prompt_in_parts_and_another_turn_go_on(cuts, real_budget, used):
    model = sparse("llama", real_budget)
    want = logits(model, DynamicCache(config=model.config), cuts)
    close(logits(model, static(model), cuts), want, 1e-5)
    assert used


def test_a_cropped_and_a_reset_cache_are_not_taken_for_what_they_were(real_budget, used):
    model = sparse("llama", real_budget)
    want = logits(model, DynamicCache(config=model.config), STEPWISE)
    cache = static(model)
    logits(model, cache, STEPWISE)
    count = len(used)
    cache.reset()
    with torch.no_grad():
        model(input_ids=ids()[:, :1], past_key_values=cache)
    assert len(used) == count
    cache.reset()
    close(logits(model, cache, STEPWISE), want, 1e-5)
    assert len(used) == 2 * count


def test_other_settings_after_the_prompt_are_followed(real_budget, used):
    model = sparse("llama", real_budget)
    result = []
    with torch.no_grad():
        for cache in (DynamicCache(config=model.config), static(model)):
            model(input_ids=ids()[:, :PROMPT], past_key_values=cache)
            with sparse_attention_as(model, min_keys=144):
                result.append(model(input_ids=ids()[:, PROMPT : PROMPT + 1], past_key_values=cache).logits)
        model(input_ids=ids()[:, PROMPT + 1 : PROMPT + 2], past_key_values=cache)
    close(result[1], result[0], 1e-5)


def test_padded_rows_and_positions_that_jump_are_made_elsewhere(real_budget, used):
    model = sparse("llama", real_budget)
    mask = torch.ones(2, PROMPT + STEPS, dtype=torch.long)
    mask[0, :30] = 0
    jumps = torch.cat([torch.arange(90), torch.arange(100, 110 + STEPS + PROMPT - 100)])[None, : PROMPT + STEPS]
    with torch.no_grad():
        for options in ({"attention_mask": mask}, {"position_ids": jumps}):
            cache = static(model)
            for start, stop in ((0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + 3))):
                cut = {n: x[:, :stop] if n == "attention_mask" else x[:, start:stop] for n, x in options.items()}
                model(input_ids=ids()[:, start:stop], past_key_values=cache, **cut)
    assert not used


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_step_is_traced_into_one_graph_for_all_lengths(real_budget, everywhere):
    model = sparse("llama", real_budget)
    want = logits(model, DynamicCache(config=model.config), STEPWISE)
    cache, graphs = static(model), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    step, got = torch.compile(model, backend=backend, fullgraph=True), []
    with torch.no_grad():
        model(input_ids=ids()[:, :PROMPT], past_key_values=cache)
        for at in range(PROMPT, PROMPT + STEPS):
            place = torch.tensor([[at]])
            got.append(step(input_ids=ids()[:, at : at + 1], position_ids=place, past_key_values=cache).logits)
    torch.compiler.reset()
    close(torch.cat(got, 1), want[:, PROMPT:], 1e-5)
    assert len(graphs) == 1 and "hf_sparse_attn.attend" not in graphs[0].code
