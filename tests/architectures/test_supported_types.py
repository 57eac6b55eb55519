"""Every supported architecture behaves like its stock model, through the sparse path; the rest is refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import tiny_models
from helpers.calls import Watching
from transformers import DynamicCache

from hf_sparse_attn import SparseCall, architectures, routers, sparse_class, sparse_config, sparsify, to_dense
from hf_sparse_attn.architectures import SUPPORTED, refuse_unsupported, supported_types
from hf_sparse_attn.models.attach import attention_sites

pytestmark = pytest.mark.compat

LENGTH = 205  # whole blocks of 16 and a partial one
INSTALLED = supported_types()
TWO_SIDED = [
    name for name, architecture in SUPPORTED.items() if architecture.limits.startswith(architectures.TWO_SIDED)
]
# their first position is one past the padding token
FROM_ONE = ("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "xmod")
ABSOLUTE = (  # without a rotation, and not the same at other positions: learned ones, or queries scaled by theirs
    *FROM_ONE,
    *("bert", "electra", "distilbert", "albert", "bert-generation", "ernie", "roc_bert", "mobilebert"),
    *("gpt2", "gpt_bigcode", "opt", "biogpt", "ctrl", "beam"),
)
UNROTATED = ("cohere2", "exaone4", "exaone_moe", "kolibri1", "afmoe", "flint")
# their attention modules are not told position_ids
UNTOLD = ("modernbert", "gte", "jina_embeddings_v3", "ultrabert", "esmc")
SERIES = ("patchtst", "timesfm")
CACHED = sorted(set(INSTALLED) - {*TWO_SIDED, *SERIES})
TOKENS = sorted(set(INSTALLED) - set(SERIES))


@pytest.fixture(scope="module")
def every_block_two_sided(every_block):
    """Enough keys for what a bidirectional layer forces."""
    return {**every_block, "min_keys": 112}


@pytest.fixture(scope="module")
def budget(real_budget):
    return {**real_budget, "min_keys": 112}


@torch.no_grad()
def output(model, seed=0, **options):
    """Logits or predictions of two random rows."""
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type == "patchtst":
        return model(past_values=torch.randn(2, 820, 2, generator=generator), **options).prediction_outputs
    if model.config.model_type == "timesfm":
        return model(past_values=[torch.randn(n, generator=generator) for n in (820, 500)], **options).full_predictions
    return model(input_ids=ids(2, LENGTH, seed), **options).logits


def ids(rows, length, seed=0):
    return torch.randint(3, 95, (rows, length), generator=torch.Generator().manual_seed(seed))


def noisy(model):
    """Routers away from their untrained start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for router in routers(model):
            for weight in router.parameters():
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def close(got, want, tolerance=1e-5):
    """Within ``tolerance`` of the largest value."""
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("model_type", INSTALLED)
def test_a_stock_checkpoint_with_every_block_kept_gives_the_stock_outputs(
    model_type, every_block_two_sided, count_calls, tmp_path
):
    stock = tiny_models.tiny_model(model_type)
    if model_type == "dbrx" and transformers.__version__.startswith("5.17."):
        pytest.skip("the stock config cannot be made of its own to_dict, which sparse_config needs; sparsify works")
    want = output(stock)
    stock.save_pretrained(tmp_path / "stock")
    config = sparse_config(type(stock.config).from_pretrained(tmp_path / "stock"), every_block_two_sided)
    model, report = sparse_class(type(stock)).from_pretrained(
        tmp_path / "stock", config=config, output_loading_info=True
    )
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all(".router." in key for key in report["missing_keys"]) and all(router.fresh for router in routers(model))
    assert not model.training
    noisy(model)
    close(output(model), want)
    assert len(count_calls) >= len(routers(model)) >= 2
    assert all(int(selection.kept().sum(-1).max()) == selection.grid.blocks for selection in count_calls)

    model.save_pretrained(tmp_path / "sparse")
    again = type(model).from_pretrained(tmp_path / "sparse")
    assert not any(router.fresh for router in routers(again))
    close(output(again), output(model), 1e-6)
    close(output(type(stock).from_pretrained(tmp_path / "sparse", config=stock.config)), want, 1e-6)

    count_calls.clear()
    mine = stock.config.get_text_config()._attn_implementation
    model.set_attn_implementation(mine)
    close(output(model), want, 1e-6)
    assert not count_calls
    assert type(to_dense(model)) is type(stock)
    model.set_attn_implementation(mine)
    close(output(model), want, 1e-6)
    for dense, folder in (
        (model, tmp_path / "dense"),
        (type(stock).from_pretrained(tmp_path / "stock"), tmp_path / "again"),
    ):
        dense.save_pretrained(folder)
    assert (tmp_path / "dense/config.json").read_text() == (tmp_path / "again/config.json").read_text()


@pytest.mark.parametrize("model_type", INSTALLED)
def test_a_call_reaches_every_router_and_ends_with_the_pass(model_type, budget):
    model, seen = sparsify(tiny_models.tiny_model(model_type), budget), []
    output(model, sparse_call=Watching(document=lambda router, inputs: seen.append(router.layer)))
    assert set(seen) == {router.layer for router in routers(model)}
    count = len(seen)
    output(model)
    assert len(seen) == count


@pytest.mark.parametrize("model_type", INSTALLED)
def test_a_real_budget_cuts_links_and_a_dense_call_does_not(model_type, budget, count_calls):
    stock = tiny_models.tiny_model(model_type)
    want = output(stock)
    model = noisy(sparsify(tiny_models.tiny_model(model_type), budget))
    got = output(model)
    assert (got - want).abs().max() > 1e-3 * want.abs().max()
    assert all(
        int(selection.kept().sum(-1).max()) < selection.grid.blocks
        for selection in count_calls
        if selection.grid.kv_len > 150
    )
    close(output(model, sparse_call=SparseCall(dense=True)), want)


@pytest.mark.parametrize("model_type", TOKENS)
def test_routers_unrotate_keys_by_the_models_own_embedding(model_type, every_block_two_sided):
    """Keys that are shifted along the text, and un-rotated, are the keys that were not shifted."""
    model = sparsify(tiny_models.tiny_model(model_type), every_block_two_sided)
    assert all(router.rotary is None for router in routers(model)) == (model_type in (*ABSOLUTE, *UNROTATED))
    if model_type in ABSOLUTE:
        return
    seen = []
    call = Watching(document=lambda router, inputs: seen.append((router, inputs)))
    for shift in (0, 37):
        positions = (torch.arange(LENGTH) + shift)[None]
        with torch.no_grad():
            model(input_ids=ids(1, LENGTH), position_ids=positions, sparse_call=call)
    half = len(seen) // 2
    for (router, here), (_, there) in zip(seen[:half], seen[half:], strict=True):
        if router.rotary is None:
            close(there.k, here.k)
            continue
        shifted = there.positions if model_type not in UNTOLD else here.positions + 37
        a, b = (
            router.rotary.unrotate(here.k, here.positions[:, None]),
            router.rotary.unrotate(there.k, shifted[:, None]),
        )
        close(b, a, 1e-4)
        assert (there.k - here.k).abs().max() > 0.01 * here.k.abs().max()


@pytest.mark.parametrize("model_type", CACHED)
def test_cached_decoding_equals_the_uncached_forward(model_type, every_block_two_sided, budget):
    tokens = ids(2, 190, seed=3)
    for settings in (every_block_two_sided, budget):
        model = noisy(sparsify(tiny_models.tiny_model(model_type), settings))
        cache, parts = DynamicCache(config=model.config.get_text_config()), []
        with torch.no_grad():
            for start, stop in ((0, 160), *((at, at + 1) for at in range(160, 190))):
                parts.append(model(input_ids=tokens[:, start:stop], past_key_values=cache, use_cache=True).logits)
            want = model(input_ids=tokens, use_cache=False, sparse_call=SparseCall(decode_from=160)).logits
        close(torch.cat(parts, 1), want, 1e-4)


@pytest.mark.parametrize("model_type", TOKENS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_unpadded_ones(model_type, side, every_block_two_sided, budget):
    rows = [ids(1, n, seed=n)[0] for n in (205, 131, 90)]
    batch, mask = torch.zeros(3, 205, dtype=torch.long), torch.zeros(3, 205, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(205 - len(row), None) if side == "left" else slice(0, len(row))
        batch[i, at], mask[i, at] = row, 1
    options = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0) + (model_type in FROM_ONE)}
    for settings in (every_block_two_sided, budget):
        model = noisy(sparsify(tiny_models.tiny_model(model_type), settings))
        with torch.no_grad():
            got = model(input_ids=batch, attention_mask=mask, **options).logits
            for i, row in enumerate(rows):
                close(got[i][mask[i].bool()], model(input_ids=row[None]).logits[0], 2e-5)


def test_at_least_twenty_of_the_asked_architectures_are_supported():
    requested = {
        *(
            "llama",
            "mistral",
            "mixtral",
            "ministral",
            "qwen2",
            "qwen3",
            "qwen2_moe",
            "qwen3_moe",
            "gemma2",
            "gemma3_text",
            "gemma3",
        ),
        *(
            "smollm3",
            "phi3",
            "olmo2",
            "olmo3",
            "granite",
            "gpt_neox",
            "gpt_oss",
            "cohere2",
            "starcoder2",
            "modernbert",
            "bert",
        ),
        *("patchtst", "timesfm"),
    }
    assert requested <= set(INSTALLED)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gpt_neo", "does not route its attention"),
        ("deepseek_v3", "latent keys"),
        ("mamba", "recurrent layers"),
        ("clip", "is a composite"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(model_type, reason):
    with pytest.raises(ValueError, match=rf"'{model_type}'.*{reason}.*supports: .*llama"):
        refuse_unsupported(model_type)


def test_a_model_of_sliding_layers_only_is_refused():
    config = tiny_models.tiny_config("mistral")
    config.sliding_window = 64
    model = tiny_models.model_class(config)(config)
    assert not attention_sites(model)
    with pytest.raises(ValueError, match="all of its layers have a sliding window"):
        sparsify(model, {})
