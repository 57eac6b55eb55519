"""Heads that look single tokens up are found by planted repetitions, and get all blocks as candidates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from hf_sparse_attn import DistillationConfig, distill, load_adapter, lora_config, set_sparse_attention
from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.router.budget import tile_budget
from hf_sparse_attn.training import retrieval_heads
from hf_sparse_attn.training.retrieval_heads import PlantedMass, find_retrieval_heads, planted_row, repeatable
from hf_sparse_attn.training.router_state import load_routers, router_state, save_routers

# peft asks transformers for a property that the newest versions call by another name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SMALL = {"min_keys": 64, "max_keys": 64, "density": 0.05, "candidate_factor": 1.0}


def tokens(length, seed=0):
    return torch.randint(3, 95, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("query_tile", [64, 16, 1])
def test_stretches_from_far_back_are_repeated_one_in_each_tile(query_tile, real_budget):
    config = SparseAttentionConfig(
        **{**real_budget, **SMALL, "query_tile": query_tile, "min_keys": 112, "max_keys": 112}
    )
    ids = tokens(2000)
    row, repetitions = planted_row(ids, config, torch.Generator().manual_seed(0))
    tile = max(query_tile, 32)
    assert len(repetitions) == 8 and len({r.at // tile for r in repetitions}) == 8
    changed = torch.zeros(2000, dtype=torch.bool)
    for r in repetitions:
        assert r.at // tile == (r.at + 23) // tile  # within one tile
        assert torch.equal(row[r.at : r.at + 24], ids[r.source : r.source + 24])
        budget = tile_budget(config, r.at // tile * tile, r.at // tile * tile + tile - 1)
        assert budget.sink <= r.source // 16 and (r.source + 23) // 16 < budget.near
        changed[r.at : r.at + 24] = True
    assert torch.equal(row[~changed], ids[~changed])


def test_the_mass_that_stage_1_does_not_pass_on_is_lost(make_router, routing_inputs):
    """Head 1 looks every token up, head 0 looks at nothing; blocks that are alike when they are pooled."""
    router = make_router(query_tile=32, candidate_factor=1.0, min_keys=112, max_keys=112)
    row, repetitions = planted_row(tokens(800), router.config, torch.Generator().manual_seed(0))
    table = torch.nn.functional.normalize(torch.randn(97, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    inputs = routing_inputs(800)
    q, k = torch.zeros_like(inputs.q), torch.zeros_like(inputs.k)
    # two tokens in a row are the query: the key knows the token and the one before it, as an induction head does
    pairs = table[row] + table[row.roll(1)]
    q[0, 2:], k[0, 1] = 40 * pairs, pairs
    observer = PlantedMass(repetitions)
    observer.on_document(router, replace(inputs, q=q, k=k))
    found = torch.stack(observer.mass[0])
    assert found.shape == (8, 2, 2)
    used, lost = found.mean(0).T
    assert used[1] > 0.1 > used[0] and lost[1] > 0.03
    # head 0 spreads its mass evenly: what it loses of the sources it loses everywhere
    assert used[0] > 0.03 and abs(lost[0]) < 0.005
    router.config = router.config.changed(candidate_factor=100.0)
    observer = PlantedMass(repetitions)
    observer.on_document(router, replace(inputs, q=q, k=k))
    assert float(torch.stack(observer.mass[0])[..., 1].abs().max()) == 0


@pytest.fixture
def model(sparse_llama, real_budget):
    return sparse_llama({**real_budget, "candidate_factor": 1.0}, noise=0.3)


def test_the_worst_heads_are_named_and_the_model_stays_as_it_was(model, monkeypatch):
    before = model.config.sparse_attention
    texts = [{"input_ids": tokens(600, seed)[None]} for seed in range(2)]
    monkeypatch.setattr(retrieval_heads, "LEAST_LOST", -1.0)
    monkeypatch.setattr(retrieval_heads, "MOST_HEADS", 1.0)
    every = find_retrieval_heads(model, texts)
    assert sorted((h.layer, h.head) for h in every) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(-1 <= h.lost <= h.planted <= 1 for h in every) and every == sorted(every, key=lambda h: -h.lost)
    assert every == find_retrieval_heads(model, texts) != find_retrieval_heads(model, texts, seed=1)
    assert model.config.sparse_attention == before
    monkeypatch.setattr(retrieval_heads, "MOST_HEADS", 0.03)
    assert find_retrieval_heads(model, texts) == every[:1]
    monkeypatch.setattr(retrieval_heads, "LEAST_LOST", 1.0)
    assert find_retrieval_heads(model, texts) == []


def test_texts_in_which_nothing_can_be_lost_are_refused(model):
    with pytest.raises(ValueError, match="texts of 100 tokens are too short to find retrieval heads"):
        find_retrieval_heads(model, [{"input_ids": tokens(100)[None]}])


def test_padded_packed_and_short_rows_are_not_read(real_budget):
    config = SparseAttentionConfig(**{**real_budget, "candidate_factor": 1.0})
    row, mask = {"input_ids": tokens(600)[None]}, torch.ones(1, 600)
    assert repeatable(row, config) and repeatable({**row, "attention_mask": mask}, config)
    assert not repeatable({**row, "attention_mask": mask.cumsum(1) > 1}, config)
    assert not repeatable({**row, "position_ids": torch.arange(600)[None]}, config)
    assert not repeatable({"past_values": row["input_ids"]}, config)
    assert not repeatable({"input_ids": tokens(100)[None]}, config)


def test_distillation_finds_and_sets_them(model, monkeypatch, tmp_path):
    monkeypatch.setattr(retrieval_heads, "LEAST_LOST", -1.0)
    texts = [{"input_ids": tokens(600, seed)[None]} for seed in range(2)]
    report = distill(model, texts, DistillationConfig(steps_per_batch=1), progress=False)
    assert [type(head.lost) for head in report.retrieval_heads] == [float]
    named = [[head.layer, head.head] for head in report.retrieval_heads]
    assert model.config.sparse_attention["retrieval_heads"] == named and len(named) == 1
    assert report.to_dict()["retrieval_heads"][0]["layer"] == named[0][0]
    # those that the settings name stay, and none are looked for where that is asked
    assert distill(model, texts, DistillationConfig(steps_per_batch=1), progress=False).retrieval_heads is None
    assert model.config.sparse_attention["retrieval_heads"] == named


def test_none_are_looked_for_where_that_is_asked(model):
    texts = [{"input_ids": tokens(600)[None]}]
    settings = DistillationConfig(steps_per_batch=1, retrieval_windows=0)
    assert distill(model, texts, settings, progress=False).retrieval_heads is None
    assert model.config.sparse_attention["retrieval_heads"] == []
    with pytest.raises(ValueError, match="retrieval_windows is -1"):
        DistillationConfig(retrieval_windows=-1)


def test_a_file_of_routers_holds_what_was_found_with_them(model, sparse_llama, real_budget, tmp_path):
    """Recipes keep routers in files: what is trained and measured in other steps has the same heads."""
    set_sparse_attention(model, retrieval_heads=[[1, 0]])
    save_routers(model, tmp_path / "routers.safetensors")
    other = sparse_llama({**real_budget, "candidate_factor": 1.0}, seed=1, noise=0.1)
    load_routers(other, tmp_path / "routers.safetensors")
    assert other.config.sparse_attention["retrieval_heads"] == [[1, 0]]
    assert all(torch.equal(weight, router_state(model)[name]) for name, weight in router_state(other).items())


def test_an_adapter_brings_the_heads_of_its_routers(model, sparse_llama, real_budget, tmp_path):
    peft_model = get_peft_model(model, lora_config(model, r=4, target_modules=["q_proj"]))
    heads = [[0, 1], [1, 0]]
    set_sparse_attention(peft_model, retrieval_heads=heads)
    peft_model.save_pretrained(tmp_path / "adapter")
    ids = tokens(600)[None]
    with torch.no_grad():
        want = peft_model(ids, use_cache=False).logits

    def base(**settings):
        return sparse_llama({**real_budget, "candidate_factor": 1.0, **settings}, noise=0.3)

    loaded = load_adapter(base(), tmp_path / "adapter")
    assert loaded.config.sparse_attention["retrieval_heads"] == heads
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, use_cache=False).logits, want)
    # what the base model names itself holds
    own = load_adapter(base(retrieval_heads=[[1, 1]]), tmp_path / "adapter")
    assert own.config.sparse_attention["retrieval_heads"] == [[1, 1]]


def test_other_settings_at_loading_leave_the_heads_of_the_routers(model, real_budget, tmp_path):
    set_sparse_attention(model, retrieval_heads=[[1, 0]])
    model.save_pretrained(tmp_path)

    def heads(**settings):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, sparse_attention={**real_budget, **settings})
        return loaded.config.sparse_attention["retrieval_heads"]

    assert heads(min_keys=128) == [[1, 0]]
    assert heads(retrieval_heads=[[0, 0]]) == [[0, 0]] and heads(retrieval_heads=[]) == []
