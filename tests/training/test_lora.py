"""The joint LoRA stage: what learns from what, resuming, merging, saving, refusals."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_sparse_attn import routers
from hf_sparse_attn.attention import layer
from hf_sparse_attn.system.locks import FolderInUseError, sole_use
from hf_sparse_attn.training.config import AdaptationConfig
from hf_sparse_attn.training.lora import adapt, add_lora
from hf_sparse_attn.training.objective import SparseObjective, TrainingForward
from hf_sparse_attn.training.router_state import backbone_hash, router_state
from hf_sparse_attn.training.trainer import SparseTrainer, last_checkpoint

# peft asks transformers for a property that the newest versions call by another name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SETTINGS = {
    "rank": 4,
    "alpha": 8,
    "lr": 5e-3,
    "router_lr": 5e-3,
    "kl_tile_share": 2,
    "training_arguments": {"use_cpu": True},
}


@pytest.fixture
def model(sparse_llama, real_budget):
    return sparse_llama(real_budget, noise=0.1)


@pytest.fixture
def batches(token_ids):
    return [{"input_ids": token_ids(1, 160, seed=seed)[0]} for seed in range(6)]


def train(model, rows, folder=None, *, steps=None, **changes):
    return adapt(model, rows, AdaptationConfig(**{**SETTINGS, **changes}), steps=steps, folder=folder, progress=False)


def trained_weights(peft_model):
    return {name: p.detach().clone() for name, p in peft_model.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


# -- what learns ----------------------------------------------------------------------------------------------------


def test_the_loss_falls_and_the_backbone_stays(model, batches):
    backbone, before = backbone_hash(model), router_state(model)
    peft_model, log = train(model, batches[:1] * 12)
    sparse = [row["loss"] for row in log if not row["dense"]]
    assert sparse[-1] < 0.9 * sparse[0] and log[-1]["kl"] < log[0]["kl"]
    names = trained_weights(peft_model)
    assert all(".lora_" in name or ".router." in name for name in names) and not peft_model.training
    assert sum(".lora_" in name for name in names) == 2 * 2 * 4 and sum(".router." in name for name in names) == len(
        before
    )
    stock = peft_model.unload()
    assert backbone_hash(stock) == backbone


def test_every_router_weight_and_lora_weight_moves(model, batches):
    start = trained_weights(add_lora_like(model, batches))
    peft_model, _ = train(model_again(model), batches)
    after = trained_weights(peft_model)
    assert after.keys() == start.keys()
    assert all(not torch.equal(after[name], start[name]) for name in after)


def add_lora_like(model, batches):
    """The PeftModel that `adapt` starts with, of a copy of the model."""
    config = AdaptationConfig(**SETTINGS)
    torch.manual_seed(config.seed)
    return add_lora(model_again(model), config)


def model_again(model):
    again = type(model)(model.config).eval()
    again.load_state_dict(model.state_dict())
    return again


def test_without_a_kl_the_routers_stay(model, batches):
    """The task's gradient never reaches them, and nothing is computed for them."""
    before, backbone = router_state(model), backbone_hash(model)
    peft_model, log = train(model, batches[:3], kl_weight=0.0)
    assert all(row["kl"] == 0 for row in log)
    merged = peft_model.merge_and_unload()
    assert all(torch.equal(weight, before[name]) for name, weight in router_state(merged).items())
    assert backbone_hash(merged) != backbone


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_task_and_kl_reach_separate_weights(model, batches, dense, checkpointing):
    peft_model = add_lora(model, AdaptationConfig(**SETTINGS)).train()
    SparseObjective(peft_model)
    if checkpointing:
        peft_model.activation_checkpointing_enable()
    forward = TrainingForward(seed=0, step=0, kl_weight=0.1, tile_share=2, dense=dense)
    ids = batches[0]["input_ids"][None]
    task = peft_model(input_ids=ids, labels=ids, use_cache=False, sparse_call=forward).loss
    kl = forward.kl_loss()
    weights = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    reached = []
    for loss in (task, kl):
        loss.backward(retain_graph=True)
        reached.append({name for name, p in weights.items() if p.grad is not None and p.grad.abs().sum() > 0})
        peft_model.zero_grad()
    assert reached[0] == {name for name in weights if ".lora_B" in name}  # A's gradient is zero while B is
    assert reached[1] == {name for name in weights if ".router." in name}
    statistics = forward.statistics()
    assert (
        len(forward.layers) == 2
        and 0 < statistics.kept_mass <= 1
        and statistics.density == (1.0 if dense else pytest.approx(0.727, abs=1e-3))
    )


def test_windows_that_fit_the_budget_still_train_the_backbone(model, token_ids):
    before = router_state(model)
    peft_model, log = train(model, [{"input_ids": token_ids(1, 60)[0]}] * 3)
    assert [row["kl"] for row in log] == [0.0] * 3 and log[2]["loss"] < log[0]["loss"]
    assert all(
        torch.equal(weight, before[name]) for name, weight in router_state(peft_model.merge_and_unload()).items()
    )


@pytest.mark.parametrize("every", [0, 1, 2, 3])
def test_every_so_many_steps_run_dense(model, batches, every, monkeypatch):
    sparse, original = [], layer.block_sparse_attention

    def counted(*args, **options):
        sparse.append(1)
        return original(*args, **options)

    monkeypatch.setattr(layer, "block_sparse_attention", counted)
    _, log = train(model, batches[:5], dense_every=every, gradient_checkpointing=False, chunked_loss=False)
    assert [row["dense"] for row in log] == [every > 0 and (step + 1) % every == 0 for step in range(5)]
    assert len(sparse) == 2 * sum(not row["dense"] for row in log)  # two layers
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5] and all(0 < row["kept_mass"] <= 1 for row in log)


def test_labels_and_masks_of_a_batch_are_used(model, token_ids, left_padded):
    ids, mask = left_padded([token_ids(1, 160)[0], token_ids(1, 120)[0]])
    labels = ids.masked_fill(mask == 0, -100)
    rows = [{"input_ids": ids[i], "attention_mask": mask[i], "labels": labels[i]} for i in range(2)]
    want = model_loss(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    _, log = train(model, rows, batch_size=2)
    assert log[0]["loss"] == pytest.approx(want, rel=1e-5)
    with_pads = model_loss(model, {"input_ids": ids, "attention_mask": mask, "labels": ids})
    assert log[0]["loss"] != pytest.approx(with_pads, abs=1e-4)


@torch.no_grad()
def model_loss(model, batch):
    return float(model(**batch, use_cache=False).loss)


# -- resuming -------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("stop_at", [2, 3, 5])
@pytest.mark.parametrize(
    "changes", [{}, {"gradient_checkpointing": False, "accumulation": 2}], ids=["checkpointing", "accumulation"]
)
def test_a_resumed_run_equals_an_uninterrupted_one(model, batches, stop_at, changes, tmp_path, monkeypatch):
    first, second, rows = model_again(model), model_again(model), batches * 2 if changes else batches
    whole, whole_log = train(first, rows, **changes)
    compute = SparseTrainer.compute_loss

    def until(self, *args, **kwargs):
        if self.state.global_step == stop_at:
            raise Stopped
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(SparseTrainer, "compute_loss", until)
    with pytest.raises(Stopped):
        train(second, rows, tmp_path / "run", **changes)
    ran = set()

    def count(self, *args, **kwargs):
        ran.add(self.state.global_step)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(SparseTrainer, "compute_loss", count)
    torch.manual_seed(99)
    torch.rand(7)  # another state of the global generator than at the kill
    resumed, log = train(model, rows, tmp_path / "run", **changes)
    assert ran == set(range(stop_at - stop_at % 2, 6)) and without_times(log) == without_times(whole_log)
    want = trained_weights(whole)
    assert all(torch.equal(weight, want[name]) for name, weight in trained_weights(resumed).items())


def without_times(log):
    return [
        {name: value for name, value in row.items() if name not in ("tokens_per_second", "peak_memory_bytes")}
        for row in log
    ]


def test_a_checkpoint_that_was_cut_off_is_passed_over(model, batches, tmp_path):
    _, log = train(model_again(model), batches, tmp_path / "run")
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-6"
    (tmp_path / "run" / "checkpoint-6" / "trainer_state.json").unlink()  # Trainer writes it last
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-4"
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").write_text('{"global_step":')
    assert last_checkpoint(tmp_path / "run") is None
    _, again = train(model, batches, tmp_path / "run")
    assert without_times(again) == without_times(log)


def test_a_finished_run_is_not_trained_again(model, batches, tmp_path, monkeypatch):
    # rows are left: Trainer would go on
    peft_model, log = train(model_again(model), batches, tmp_path / "run", steps=3)
    monkeypatch.setattr(SparseTrainer, "compute_loss", lambda *_, **__: pytest.fail("trained again"))
    again, again_log = train(model, batches, tmp_path / "run", steps=3)
    assert again_log == log and len(log) == 3
    assert all(torch.equal(w, trained_weights(peft_model)[name]) for name, w in trained_weights(again).items())


def test_a_run_killed_after_its_last_checkpoint_trains_no_step_too_many(model, batches, tmp_path):
    peft_model, log = train(model_again(model), batches, tmp_path / "run", steps=4)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-4"
    (tmp_path / "run" / "log.json").unlink()  # it is written last
    shutil.rmtree(tmp_path / "run" / "adapter")
    again, again_log = train(model, batches, tmp_path / "run", steps=4)
    assert without_times(again_log) == without_times(log)
    assert all(torch.equal(w, trained_weights(peft_model)[name]) for name, w in trained_weights(again).items())


def test_a_folder_of_other_settings_or_another_model_is_refused(model, batches, sparse_llama, real_budget, tmp_path):
    train(model_again(model), batches[:1], tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"run holds checkpoints of another run, different in settings\.lr \(\S+ then, 0\.001 now\)"
    ):
        train(model_again(model), batches[:1], tmp_path / "run", lr=1e-3)
    others = {
        "the model's frozen weights": sparse_llama(real_budget, seed=1),
        "sparse_attention.candidate_factor": sparse_llama({**real_budget, "candidate_factor": 2.0}),
        "the model's config.num_hidden_layers": sparse_llama(real_budget, num_hidden_layers=3),
    }
    for different, other in others.items():
        with pytest.raises(ValueError, match=different):
            train(other, batches[:1], tmp_path / "run")
    with pytest.raises(ValueError, match="different in the rows: remove it"):
        train(model_again(model), batches[1:2], tmp_path / "run")


# -- merging and saving ---------------------------------------------------------------------------------------------


def test_merging_gives_a_plain_sparse_model_with_the_trained_routers(model, batches, tmp_path):
    ids, before = batches[5]["input_ids"][None], router_state(model)
    peft_model, _ = train(model, batches[:3])
    adapted = logits(peft_model, ids)
    trained = {
        name.split("base_model.model.")[1].replace("modules_to_save.default.", ""): w
        for name, w in trained_weights(peft_model).items()
    }
    merged = peft_model.merge_and_unload()
    assert type(merged).__name__ == "SparseLlamaForCausalLM" and len(routers(merged)) == 2
    assert not any("lora" in name or "modules_to_save" in name for name in merged.state_dict())
    assert merged.state_dict().keys() == model_again(merged).state_dict().keys()
    for name, weight in router_state(merged).items():
        assert torch.equal(weight, trained[name]) and not torch.equal(weight, before[name])
    torch.testing.assert_close(logits(merged, ids), adapted, rtol=1e-4, atol=1e-4)
    assert merged.config.sparse_attention["bookkeeping"]["trained"] and all(
        r.config.bookkeeping.trained for r in routers(merged)
    )
    merged.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(again, ids), logits(merged, ids))


def test_the_adapter_holds_the_routers_and_goes_on_the_untrained_model(model, batches, tmp_path):
    ids, untrained = batches[5]["input_ids"][None], model_again(model)
    peft_model, _ = train(model, batches[:3])
    peft_model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert (
        sum(".router." in name for name in saved) == len(router_state(untrained))
        and sum("lora_" in name for name in saved) == 16
    )
    assert len(saved) == 16 + len(router_state(untrained))
    again = PeftModel.from_pretrained(untrained, tmp_path / "adapter").eval()
    assert torch.equal(logits(again, ids), logits(peft_model, ids))


def test_a_folder_that_another_process_trains_in_is_refused(model, batches, tmp_path):
    with sole_use(tmp_path), pytest.raises(FolderInUseError, match="is in use by process"):
        train(model, batches[:1], tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_adapter_of_a_model_from_a_stock_folder_can_be_saved(llama_folder, real_budget, batches, tmp_path):
    """peft reads the config of the folder that the model came from, with the class of the model's config."""
    model = AutoModelForCausalLM.from_pretrained(llama_folder, sparse_attention=real_budget)
    peft_model, _ = train(model, batches[:1])
    peft_model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(".router." in name for name in saved) and not any("embed_tokens" in name for name in saved)


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["rank", "alpha", "lr", "router_lr", "kl_tile_share", "max_grad_norm", "save_every", "batch_size"]
)
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"lora\.{name} is {value}: must be > 0"):
        AdaptationConfig(**{name: value})


@pytest.mark.parametrize("name", ["kl_weight", "dense_every", "seed"])
def test_negative_settings_are_refused(name):
    with pytest.raises(ValueError, match=rf"lora\.{name} is -1: must be >= 0"):
        AdaptationConfig(**{name: -1})
    assert getattr(AdaptationConfig(**{name: 0}), name) == 0


def test_target_modules_become_a_tuple_and_own_arguments_are_refused():
    with pytest.raises(ValueError, match="training_arguments names max_steps, seed: set the recipe's own fields"):
        AdaptationConfig(training_arguments={"max_steps": 3, "seed": 1})
    assert AdaptationConfig(target_modules=["q_proj"]).target_modules == ("q_proj",)


def test_no_rows_are_refused(model):
    with pytest.raises(ValueError, match="adapt got no rows"):
        adapt(model, [], progress=False)
    assert type(model).__name__ == "SparseLlamaForCausalLM" and not any("lora" in name for name in model.state_dict())
