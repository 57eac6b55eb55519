"""The joint stage inside Trainer: exact weights of the KL, checkpointing, annealing, logs, compile, losses that are not
finite.
"""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.agreement import assert_same_sums
from helpers.calls import Watching
from peft import get_peft_model
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments

from hf_sparse_attn import SparseTrainer, SparseTrainingConfig, lora_config, routers
from hf_sparse_attn.attention import gradients
from hf_sparse_attn.models.adapters import active_routers
from hf_sparse_attn.router import selection
from hf_sparse_attn.training import objective
from hf_sparse_attn.training.objective import SparseObjective
from hf_sparse_attn.training.router_loss import tile_loss
from hf_sparse_attn.training.router_state import router_state
from hf_sparse_attn.training.trainer import NonFiniteLossError, SparseTrainerMixin, last_checkpoint

pytestmark = pytest.mark.filterwarnings(
    # peft asks transformers for a property with a new name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # torch's compiler reads it
)
LENGTH = 160


@pytest.fixture
def model(sparse_llama, real_budget):
    return sparse_llama(real_budget, noise=0.1)


@pytest.fixture
def rows(token_ids):
    """Rows with ever fewer labels."""
    created = []
    for seed in range(8):
        ids = token_ids(1, LENGTH, seed=seed)[0]
        labels = ids.clone()
        labels[: 15 * seed] = -100
        created.append({"input_ids": ids, "labels": labels})
    return created


def arguments(folder, **changes):
    values = {
        **{
            "max_steps": 2,
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
        },
        **{"save_strategy": "no", "disable_tqdm": True, "train_sampling_strategy": "sequential", "max_grad_norm": 1e9},
    }
    return TrainingArguments(str(folder), **{**values, **changes})


def trainer_of(model, rows, folder, sparse=None, cls=SparseTrainer, **changes):
    sparse = SparseTrainingConfig(**{"kl_tile_share": 2, "dense_every": 0, **(sparse or {})})
    created = cls(model, arguments(folder, **changes), train_dataset=rows, sparse_training=sparse)
    return created


def losses(trainer):
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


class Gradients(TrainerCallback):
    """Keeps the routers' gradients of every optimiser step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if ".router." in name})


# -- the weight of the KL -------------------------------------------------------------------------------------------


def kl_by_definition(model, ids):
    """Mean over layers of the KL of the batch ``ids`` [B, N] on all tiles, from a pass of its own."""
    kls = []

    def observe(router, inputs):
        with torch.enable_grad():
            loss = tile_loss(router, inputs, 16, inputs.q.shape[2], torch.Generator())
            kls.append(loss.coarse + loss.fine)

    with torch.no_grad():
        model(ids, use_cache=False, sparse_call=Watching(document=observe))
    return torch.stack(kls).mean()


def test_the_tiles_of_the_kl_change_with_the_step_and_the_seed_alone(model, rows):
    ids = rows[0]["input_ids"][None]
    for router in routers(model):
        router.requires_grad_()

    def kl(seed, step):
        forward = objective.TrainingForward(seed=seed, step=step, kl_weight=1.0, tile_share=3, dense=False)
        model.train()(ids, use_cache=False, sparse_call=forward)
        return float(forward.kl_loss().detach())

    assert kl(0, 0) == kl(0, 0) and len({kl(0, 0), kl(0, 1), kl(1, 0)}) == 3


@pytest.mark.parametrize("batch, accumulation", [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_the_kl_is_weighted_as_the_task_loss_is(model, rows, batch, accumulation, tmp_path):
    config = SparseTrainingConfig(kl_tile_share=1)
    for router in routers(model):
        router.requires_grad_()
    parts = [rows[at : at + batch] for at in range(0, batch * accumulation, batch)]
    counts = [sum(int((row["labels"][1:] != -100).sum()) for row in part) for part in parts]
    kl = sum(
        kl_by_definition(model, torch.stack([row["input_ids"] for row in part])) * count / sum(counts)
        for part, count in zip(parts, counts, strict=True)
    )
    (config.kl_weight * kl).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if ".router." in name}
    model.zero_grad()
    seen = Gradients()
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = trainer_of(model, rows, tmp_path, {"kl_tile_share": 1}, max_steps=1, **options)
    trainer.add_callback(seen)
    trainer.train()
    assert want.keys() == seen.steps[0].keys() and len(want) == 8
    for name, grad in want.items():
        assert_same_sums(seen.steps[0][name], grad, batch * accumulation * LENGTH)
    row = trainer.state.log_history[0]
    assert row["loss"] - row["task_loss"] == pytest.approx(float(config.kl_weight * kl.detach()), rel=1e-3)


def test_without_a_count_of_labels_micro_batches_weigh_the_same(model, rows, tmp_path):
    seen = []
    for accepts in (True, False):
        trainer = trainer_of(model, [rows[0], rows[7]], tmp_path, max_steps=1, gradient_accumulation_steps=2)
        trainer.model_accepts_loss_kwargs = accepts
        trainer.add_callback(gradients := Gradients())
        start = router_state(model)
        trainer.train()
        seen.append(gradients.steps[0])
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start.get(name, p))
    assert any(not torch.allclose(seen[0][name], seen[1][name], rtol=1e-3) for name in seen[0])


def test_packed_documents_weigh_by_their_tokens(model, token_ids):
    """One row of two documents learns what a batch of the two, of one length each, would."""
    ids = token_ids(1, 2 * LENGTH)
    SparseObjective(model)
    grads = []
    for batch in (
        {"input_ids": ids, "position_ids": torch.arange(LENGTH).repeat(2)[None]},
        {"input_ids": ids.view(2, LENGTH)},
    ):
        forward = objective.TrainingForward(seed=0, step=0, kl_weight=1.0, tile_share=2, dense=False)
        model.train()(**batch, use_cache=False, sparse_call=forward)
        forward.kl_loss().backward()
        grads.append([p.grad.clone() for router in routers(model) for p in router.parameters()])
        model.zero_grad()
    for a, b in zip(*grads, strict=True):
        assert_same_sums(a, b, ids.numel())


# -- checkpointing --------------------------------------------------------------------------------------------------


def test_checkpointing_changes_nothing_and_repeats_neither_routing_nor_kl(
    sparse_llama, real_budget, rows, tmp_path, monkeypatch
):
    calls = {"select": 0, "kl": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(selection.kernels, "select_blocks", counted("select", selection.kernels.select_blocks))
    monkeypatch.setattr(objective, "tile_loss", counted("kl", objective.tile_loss))
    seen = []
    for checkpointing in (False, True):
        model = sparse_llama(real_budget, noise=0.1)
        trainer = trainer_of(
            model, rows, tmp_path, {"dense_every": 3}, max_steps=3, activation_checkpointing=checkpointing
        )
        loss = losses(trainer)
        seen.append((loss, {name: p.detach() for name, p in model.named_parameters()}, dict(calls)))
        calls.update(select=0, kl=0)
    # two layers; the third step is dense
    assert seen[0][0] == seen[1][0] and seen[0][2] == seen[1][2] == {"select": 4, "kl": 6}
    assert all(torch.equal(weight, seen[1][1][name]) for name, weight in seen[0][1].items())


# -- optimiser, annealing, logs -------------------------------------------------------------------------------------


def test_routers_have_a_learning_rate_of_their_own_and_no_decay(model, rows, tmp_path):
    trainer = trainer_of(
        model, rows, tmp_path, {"router_lr": 3e-3}, weight_decay=0.1, warmup_steps=0, lr_scheduler_type="constant"
    )
    trainer.train()
    mine = {id(p) for router in routers(model) for p in router.parameters()}
    groups = [({id(p) for p in group["params"]} & mine, group) for group in trainer.optimizer.param_groups]
    result = [group for inside, group in groups if inside]
    assert (
        len(result) == 1
        and len(result[0]["params"]) == 8
        and result[0]["lr"] == 3e-3
        and result[0]["weight_decay"] == 0
    )
    assert {group["lr"] for inside, group in groups if not inside} == {1e-3}
    assert sum(len(group["params"]) for _, group in groups) == sum(1 for _ in model.parameters())


def test_an_optimiser_of_the_user_stays_as_it_is(model, rows, tmp_path):
    mine = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = SparseTrainer(model, arguments(tmp_path), train_dataset=rows, optimizers=(mine, None))
    trainer.train()
    assert len(mine.param_groups) == 1 and mine.param_groups[0]["lr"] < 0.5  # only scheduled


def test_budgets_and_the_weight_of_the_kl_are_annealed(model, rows, tmp_path, monkeypatch):
    created, original = [], objective.TrainingForward.__init__

    def note(self, *values, **options):
        original(self, *values, **options)
        created.append(
            (self.step, round(self.kl_weight, 4), routers(model)[0].config.density, routers(model)[0].config.min_keys)
        )

    monkeypatch.setattr(objective.TrainingForward, "__init__", note)
    settings = {
        "anneal": {"density": [1.0, 0.05], "min_keys": [160, 80], "kl_weight": [0.4, 0.1]},
        "anneal_share": 0.75,
    }
    trainer = trainer_of(model, rows, tmp_path, settings, max_steps=4)
    trainer.train()
    assert created == [(0, 0.4, 1.0, 160), (1, 0.25, 0.525, 120), (2, 0.1, 0.05, 80), (3, 0.1, 0.05, 80)]
    densities = [row["density"] for row in trainer.state.log_history if "density" in row]
    assert densities[0] == 1.0 and densities[0] > densities[1] > densities[2] == densities[3]
    assert model.config.sparse_attention["density"] == 0.05 and model.config.sparse_attention["min_keys"] == 80


@pytest.mark.parametrize(
    "anneal, message",
    [
        ({"block_size": [32, 16]}, "lora.anneal is .*must be pairs"),
        ({"density": [1.0]}, "lora.anneal is .*must be pairs"),
        ({"kl_weight": [0.1, 0.0]}, "above 0 for kl_weight"),
        ({"density": [2.0, 0.1]}, r"sparse_attention\.density is 2\.0"),
        ({"min_keys": [80, 16]}, r"sparse_attention\.min_keys is 16"),
    ],
)
def test_impossible_annealing_is_refused_before_the_first_step(model, rows, tmp_path, anneal, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(model, rows, tmp_path, {"anneal": anneal})


def test_the_log_says_what_the_routers_do(model, rows, tmp_path):
    trainer = trainer_of(model, rows, tmp_path, {"dense_every": 2}, max_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    sparse, dense = (row for row in trainer.state.log_history if "loss" in row)
    for row in (sparse, dense):
        assert 0 < row["kept_mass"] <= 1 and row["kl"] > 0 and row["router_entropy"] > 0
        assert row["tokens_per_second"] > 0 and row["peak_memory_bytes"] > 1e6
    assert sparse["density"] == pytest.approx(0.727, abs=1e-3) and dense["density"] == 1.0


def test_a_model_without_routers_is_refused(stock_llama, rows, tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no routers: convert it"):
        trainer_of(stock_llama(), rows, tmp_path)


# -- loops that know nothing of routers -----------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_plain_trainer_leaves_routers_frozen_and_says_so_once(model, rows, tmp_path, caplog, lora):
    if lora:
        model = get_peft_model(model, lora_config(model, r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = [[p.detach().clone() for p in router.parameters()] for router in active_routers(model)]
    gradients.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="hf_sparse_attn"):
        trainer = Trainer(model, arguments(tmp_path, max_steps=3, weight_decay=0.1), train_dataset=rows)
        result = losses(trainer)
    assert len(result) == 3 and [
        r.getMessage()[:36] for r in caplog.records if r.name == "hf_sparse_attn.attention.gradients"
    ] == ["the routers of this sparse model sta"]
    for router, weights in zip(active_routers(model), before, strict=True):
        assert all(torch.equal(p, old) for p, old in zip(router.parameters(), weights, strict=True))


def test_our_trainer_says_nothing_of_frozen_routers(model, rows, tmp_path, caplog):
    gradients.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="hf_sparse_attn"):
        trainer_of(model, rows, tmp_path).train()
    assert not caplog.records


# -- collators, precision, compile ----------------------------------------------------------------------------------


def test_a_padding_free_collator_keeps_documents_apart(model, token_ids, tmp_path):
    """Two documents in one row: the loss of each does not depend on the other."""
    first, second = token_ids(1, LENGTH, 1)[0].tolist(), token_ids(1, 2 * LENGTH, 2)[0].tolist()
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)

    def loss(documents):
        trainer = SparseTrainer(
            model,
            arguments(
                tmp_path,
                max_steps=1,
                learning_rate=0.0,
                per_device_train_batch_size=len(documents),
                remove_unused_columns=False,
            ),
            data_collator=collator,
            train_dataset=[{"input_ids": ids} for ids in documents],
            sparse_training=SparseTrainingConfig(kl_tile_share=2, router_lr=1e-30, dense_every=0),
        )
        trainer.train()
        return trainer.state.log_history[0]["task_loss"]

    alone = [loss([first]), loss([second])]
    together = loss([first, second])
    counts = [LENGTH - 1, 2 * LENGTH - 1]
    assert together == pytest.approx(sum(x * n for x, n in zip(alone, counts, strict=True)) / sum(counts), rel=1e-5)


def test_bfloat16_autocast(sparse_llama, real_budget, rows, tmp_path):
    want = losses(trainer_of(sparse_llama(real_budget, noise=0.1), rows, tmp_path, max_steps=1))
    model = sparse_llama(real_budget, noise=0.1)
    got = losses(trainer_of(model, rows, tmp_path, max_steps=1, bf16=True))
    assert got == pytest.approx(want, rel=0.02) and got != want and next(model.parameters()).dtype == torch.float32


def test_compiled_training_is_the_same(sparse_llama, real_budget, rows, tmp_path):
    seen = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = sparse_llama(real_budget, noise=0.1)
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        trainer = trainer_of(model, rows, tmp_path, {"dense_every": 3}, max_steps=4, **options)
        seen.append((losses(trainer), [row["kl"] for row in trainer.state.log_history if "kl" in row]))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-5) and seen[0][1] == pytest.approx(seen[1][1], rel=1e-3)


# -- losses that are not finite -------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(model, rows, tmp_path, monkeypatch):
    compute = Trainer.compute_loss

    def poisoned(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = compute(self, model, inputs, return_outputs, num_items_in_batch)
        return loss * float("nan") if self.state.global_step == 2 else loss

    monkeypatch.setattr(Trainer, "compute_loss", poisoned)
    trainer = trainer_of(model, rows, tmp_path / "run", max_steps=6)
    first = rows[2]["input_ids"][:12].tolist()
    with pytest.raises(
        NonFiniteLossError, match=r"the loss is nan on the batch that begins with tokens \[.*step 3, micro-batch 1"
    ) as raised:
        trainer.train()
    assert str(first) in str(raised.value)
    saved = last_checkpoint(tmp_path / "run")
    assert saved.name == "checkpoint-2" and all(torch.isfinite(p).all() for p in model.parameters())
    monkeypatch.setattr(Trainer, "compute_loss", compute)
    again = trainer_of(model, rows, tmp_path / "run", max_steps=6)
    again.train(resume_from_checkpoint=str(saved))
    assert [row["step"] for row in again.state.log_history if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_a_gradient_that_is_not_finite_stops_before_the_step(model, rows, tmp_path):
    trainer = trainer_of(model, rows, tmp_path / "run", max_steps=3)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda grad: grad * (float("inf") if trainer.state.global_step == 1 else 1.0))
    with pytest.raises(NonFiniteLossError, match=r"the gradient's norm is (nan|inf), in optimiser step 2"):
        trainer.train()
    assert torch.isfinite(weight).all() and last_checkpoint(tmp_path / "run").name == "checkpoint-1"


# -- models that the trainer makes ----------------------------------------------------------------------------------


def test_a_model_that_the_trainer_makes_is_the_one_that_learns(sparse_llama, real_budget, rows, tmp_path):
    created = []

    def model_init():
        created.append(sparse_llama(real_budget, noise=0.1))
        return created[-1]

    config = SparseTrainingConfig(kl_tile_share=2, dense_every=0, anneal={"min_keys": [112, 80]})
    trainer = SparseTrainer(
        args=arguments(tmp_path, max_steps=3), model_init=model_init, train_dataset=rows, sparse_training=config
    )
    for run in range(2):
        before = router_state(sparse_llama(real_budget, noise=0.1))
        trainer.train()
        assert trainer.model is trainer.objective.model is created[-1] and len(created) == 2 + run
        assert all(
            not torch.equal(weight, before[name])
            for name, weight in router_state(trainer.model).items()
            if "index" not in name
        )
        assert trainer.model.config.sparse_attention["min_keys"] == 80
        logged = [row for row in trainer.state.log_history if "task_loss" in row]
        assert [row["step"] for row in logged] == [1, 2, 3]
        assert all(row["loss"] > row["task_loss"] > 0.9 * row["loss"] for row in logged)


def test_a_dense_model_that_the_trainer_makes_is_refused(stock_llama, rows, tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no routers"):
        SparseTrainer(args=arguments(tmp_path), model_init=lambda: stock_llama(), train_dataset=rows)


class OwnLoss(Trainer):
    """As TRL's trainers: makes the model's arguments itself, and compares with a reference model on the way."""

    def __init__(self, *args, reference=None, ref_model=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.ref_model = ref_model if ref_model is not None else reference

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        options = {"input_ids": inputs["input_ids"], "labels": inputs["labels"], "use_cache": False}
        with torch.no_grad():  # before and after: neither may count
            self.compared = [(self.ref_model if self.ref_model is not None else model)(**inputs).loss for _ in range(2)]
        loss = model(**options).loss
        with torch.no_grad():
            model(**inputs)
        return loss


class Own(SparseTrainerMixin, OwnLoss):
    pass


def own_trainer(model, rows, folder, **options):
    sparse = SparseTrainingConfig(kl_tile_share=2, dense_every=0)
    changes = {name: options.pop(name) for name in ("gradient_accumulation_steps", "max_steps") if name in options}
    return Own(model, arguments(folder, **changes), train_dataset=rows, sparse_training=sparse, **options)


def test_a_reference_gets_the_routers_and_does_not_count(model, stock_llama, sparse_llama, real_budget, rows, tmp_path):
    """What a pass without gradients sees is not learned from, and a trainer need not hand its inputs on."""
    seen = []
    for cls, reference in ((None, None), (Own, stock_llama()), (Own, sparse_llama(real_budget)), (Own, None)):
        policy = sparse_llama(real_budget, noise=0.1)
        created = (
            trainer_of(policy, rows, tmp_path, max_steps=1)
            if cls is None
            else own_trainer(policy, rows, tmp_path, reference=reference, max_steps=1)
        )
        if reference is not None:
            assert all(
                torch.equal(a.wq, b.wq) and not a.wq.requires_grad
                for a, b in zip(routers(reference), routers(policy), strict=True)
            )
            assert reference.config.sparse_attention == policy.config.sparse_attention
        created.add_callback(gradients := Gradients())
        created.train()
        seen.append(gradients.steps[0])
        row = created.state.log_history[0]
        assert row["kl"] > 0
        if cls is not None:
            assert float(created.compared[0]) == pytest.approx(row["task_loss"], rel=1e-5)
    for other in seen[1:]:
        assert seen[0].keys() == other.keys() and len(other) == 8
        for name, grad in seen[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-8)


def test_a_reference_that_the_user_gives_stays_as_it_is(model, stock_llama, rows, tmp_path):
    dense = stock_llama()
    trainer = own_trainer(model, rows, tmp_path, ref_model=dense)
    assert trainer.ref_model is dense and not routers(dense)


def test_a_reference_of_another_shape_is_refused(model, stock_llama, rows, tmp_path):
    with pytest.raises(ValueError, match=r"reference model \(LlamaForCausalLM\) cannot take the routers"):
        own_trainer(model, rows, tmp_path, reference=stock_llama(num_hidden_layers=1))


@pytest.mark.parametrize("scaled", [True, False])
def test_micro_batches_of_a_loss_of_its_own_weigh_the_same(
    sparse_llama, real_budget, rows, tmp_path, scaled, monkeypatch
):
    """Whether the trainer divides its loss by their number, or Transformers does."""
    monkeypatch.setattr(Own, "loss_is_scaled_for_ga", scaled, raising=False)
    seen = []
    for chosen, steps in (([rows[0], rows[0]], 2), ([rows[0]], 1)):
        trainer = own_trainer(
            sparse_llama(real_budget, noise=0.1), chosen, tmp_path, gradient_accumulation_steps=steps, max_steps=1
        )
        if not hasattr(Trainer, "loss_is_scaled_for_ga"):  # before 5.19 there are two attributes
            trainer.model_accepts_loss_kwargs, trainer.compute_loss_func = False, "any" if scaled else None
        trainer.add_callback(gradients := Gradients())
        trainer.train()
        seen.append(gradients.steps[0])
    for name, grad in seen[1].items():
        torch.testing.assert_close(seen[0][name], grad, rtol=1e-4, atol=1e-8)


def test_a_kl_that_the_trainer_logs_itself_is_kept_apart(model, rows, tmp_path):
    trainer = own_trainer(model, rows, tmp_path, max_steps=1)
    trainer._metrics = {"train": {"kl": [1.0]}}  # TRL's: of the policy from its reference
    trainer.train()
    assert "kl" not in trainer.state.log_history[0] and trainer.state.log_history[0]["router_kl"] > 0
