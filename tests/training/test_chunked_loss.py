"""The next-token loss in chunks: equal to the stock one, no logits of all tokens, refusals."""

from __future__ import annotations

import pytest
import torch
from helpers.agreement import assert_same_sums
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, Trainer, TrainingArguments

from hf_sparse_attn import chunk_loss
from hf_sparse_attn.training import chunked_loss

# peft asks transformers for a property that the newest versions call by another name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
}


@pytest.fixture
def batch(token_ids):
    ids = token_ids(2, 70)
    labels = ids.clone()
    labels[0, :30] = -100
    return {"input_ids": ids, "labels": labels, "use_cache": False}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked_loss, "LOGITS_BYTES", 4 * 97 * 16)  # 16 tokens


def gradients(model, **batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_items_in_batch": 50}, {"num_items_in_batch": torch.tensor(200)}], ids=str
)
def test_loss_and_gradients_are_those_of_the_stock_model(stock_llama, batch, tied, options):
    model = stock_llama(tie_word_embeddings=tied)
    want_loss, want = gradients(model, **batch, **options)
    got_loss, got = gradients(chunk_loss(model), **batch, **options)
    assert got_loss == pytest.approx(want_loss, rel=1e-6) and got.keys() == want.keys()
    for name, grad in want.items():
        assert_same_sums(got[name], grad, batch["input_ids"].numel())


def test_shifted_labels_are_used_as_they_are(stock_llama, batch):
    model = stock_llama()
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    want = float(model(**batch).loss.detach())
    assert float(chunk_loss(model)(**batch, shift_labels=shifted).loss.detach()) == pytest.approx(want, rel=1e-6)


def test_no_more_logits_than_a_chunk_exist_and_the_output_holds_none(stock_llama, batch):
    model, sizes = stock_llama(), []
    head = model.get_output_embeddings()
    mine = head.forward
    head.forward = lambda hidden: sizes.append(hidden.shape[:-1].numel()) or mine(hidden)
    chunk_loss(model)
    sizes.clear()
    out = model(**batch)
    assert out.logits is None and max(sizes) == 16 and sum(sizes) == 140
    out.loss.backward()
    assert sum(sizes) == 140  # nothing is computed again


def test_without_labels_everything_is_as_before(stock_llama, token_ids):
    model, ids = stock_llama(), token_ids(1, 40)
    want = model(ids).logits
    assert torch.equal(chunk_loss(model)(ids).logits, want) and torch.equal(chunk_loss(model)(ids).logits, want)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 43)


def test_a_frozen_head_and_adapters(stock_llama, batch):
    model = get_peft_model(
        stock_llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    want_loss, want = gradients(model, **batch)
    got_loss, got = gradients(chunk_loss(model), **batch)
    assert got_loss == pytest.approx(want_loss, rel=1e-6) and len(want) == 4
    for name, grad in want.items():
        assert_same_sums(got[name], grad, batch["input_ids"].numel())


def test_evaluation_needs_no_graph(stock_llama, batch):
    model = chunk_loss(stock_llama())
    with torch.no_grad():
        loss = model(**batch).loss
    assert not loss.requires_grad and float(loss) == pytest.approx(float(model(**batch).loss.detach()), rel=1e-6)


def test_an_error_inside_leaves_the_head_as_it_was(stock_llama, batch, token_ids):
    model = chunk_loss(stock_llama())
    with pytest.raises(AttributeError):
        model(**batch, attention_mask="no mask")
    assert model(token_ids(1, 8)).logits.shape[-1] == 97


def test_scaled_logits_are_fine_and_capped_ones_are_refused(batch):
    torch.manual_seed(0)
    scaled = AutoModelForCausalLM.from_config(GraniteConfig(**SMALL, logits_scaling=4.0, num_key_value_heads=1))
    want_loss, _ = gradients(scaled, **batch)
    assert gradients(chunk_loss(scaled), **batch)[0] == pytest.approx(want_loss, rel=1e-6)
    capped = AutoModelForCausalLM.from_config(
        Gemma2Config(**SMALL, final_logit_softcapping=0.5, num_key_value_heads=1, initializer_range=0.5)
    )
    want_loss, _ = gradients(capped, **batch)
    with pytest.raises(ValueError, match=r"chunked loss of Gemma2ForCausalLM is .* where its own is .*soft cap"):
        chunk_loss(capped)
    assert gradients(capped, **batch)[0] == want_loss and capped(**batch).logits is not None


def test_a_model_without_a_vocabulary_is_refused(stock_llama):
    with pytest.raises(ValueError, match="LlamaModel has no output layer"):
        chunk_loss(stock_llama().model)


def test_hidden_states_are_never_an_entry_of_the_output(stock_llama, batch):
    model = chunk_loss(stock_llama())
    out = model(**batch)
    assert out.logits is None and "logits" not in out and [tuple(x.shape) for x in out.to_tuple()] == [()]
    with_hidden = model(**batch, return_dict=False, output_hidden_states=True)
    assert (
        len(with_hidden) == 2
        and with_hidden[0].requires_grad
        and [h.shape for h in with_hidden[1]] == [(2, 70, 64)] * 3
    )


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"logits_to_keep": 5, "shift_labels": None}], ids=["all", "some"])
def test_without_gradients_logits_are_there_for_who_reads_them(stock_llama, batch, options):
    model = stock_llama()
    batch = {**batch, **options, **({"shift_labels": batch["labels"][:, -5:].contiguous()} if options else {})}
    want, sizes = model(**batch), []
    head = model.get_output_embeddings()
    mine = head.forward
    head.forward = lambda hidden: sizes.append(hidden.shape[:-1].numel()) or mine(hidden)
    chunk_loss(model)
    for logits in (
        lambda: model(**batch)["logits"],
        lambda: model(**batch).logits,
        lambda: model(**batch, return_dict=False)[1],
    ):
        sizes.clear()
        got = logits()
        assert isinstance(got, torch.Tensor) and (got.shape, got.dtype, got.device) == (
            want.logits.shape,
            torch.float32,
            want.logits.device,
        )
        assert max(sizes) <= 16  # nobody has read them
        torch.testing.assert_close(got.detach(), want.logits)
        torch.testing.assert_close(torch.tensor(got.numpy()), want.logits)
        assert got.double().dtype == torch.float64 and torch.equal(got.argmax(-1), want.logits.argmax(-1))


def test_trainer_predicts_logits_and_metrics_see_them(stock_llama, token_ids, tmp_path):
    rows = [{"input_ids": row, "labels": row.clone()} for row in token_ids(3, 40)]
    arguments = TrainingArguments(
        tmp_path, per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True, bf16_full_eval=False
    )

    def accuracy(found):
        return {"right": float((found.predictions.argmax(-1)[:, :-1] == found.label_ids[:, 1:]).mean())}

    results = []
    for model in (stock_llama(), chunk_loss(stock_llama())):
        trainer = Trainer(model, arguments, compute_metrics=accuracy)
        results.append((trainer.predict(rows), trainer.evaluate(rows)["eval_right"]))
    assert results[1][0].predictions.shape == (3, 40, 97)
    torch.testing.assert_close(torch.tensor(results[1][0].predictions), torch.tensor(results[0][0].predictions))
    assert results[1][1] == results[0][1] == results[0][0].metrics["test_right"]
