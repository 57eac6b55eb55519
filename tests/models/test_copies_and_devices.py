"""Sparse models in the hands of Python and torch: copies, pickles, threads, dtypes, devices, checkpointing."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

import hf_sparse_attn
from hf_sparse_attn import SparseObjective, SparseTrainingConfig, routers, sparse_class, sparse_config, to_dense
from hf_sparse_attn.architectures.class_factory import MadeMixin, make_class
from hf_sparse_attn.models.registration import sparse_config_class


@pytest.fixture
def model(sparse_llama, real_budget):
    return sparse_llama(real_budget, noise=0.1)


@torch.no_grad()
def logits(model, ids, **options):
    return model(input_ids=ids, **options).logits


def reads_its_own_rotary(model):
    return all(router.rotary.module is model.model.rotary_emb for router in routers(model))


# -- copies and pickles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_a_model_of_its_own(model, duplicate, token_ids):
    ids = token_ids(1, 200)
    want = logits(model, ids)
    twin = duplicate(model)
    assert (
        type(twin) is type(model) and reads_its_own_rotary(twin) and twin.model.rotary_emb is not model.model.rotary_emb
    )
    assert torch.equal(logits(twin, ids), want)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    assert torch.equal(logits(model, ids), want) and reads_its_own_rotary(model)


def test_a_router_copied_by_itself_still_reads_the_rotary_embedding_of_its_model(model):
    """PEFT copies routers for `modules_to_save`: a copy of the embedding would miss what happens to the model's."""
    router = routers(model)[0]
    twin = copy.deepcopy(router)
    assert twin.rotary.module is model.model.rotary_emb
    assert twin.wq is not router.wq and torch.equal(twin.wq, router.wq) and twin.config == router.config


PICKLED = {
    "model": lambda model, cache: model,
    "config": lambda model, cache: model.config,
    "cache": lambda model, cache: cache,
    "class": lambda model, cache: type(model),
}


@pytest.fixture(scope="module")
def pickles(sparse_llama, real_budget, token_ids, tmp_path_factory):
    """A folder with a pickle of each kind, a model saved whole by torch, and the logits that the model gives."""
    folder, ids = tmp_path_factory.mktemp("pickles"), token_ids(1, 200)
    model = sparse_llama(real_budget, noise=0.1)
    cache = DynamicCache(config=model.config)
    want = logits(model, ids, past_key_values=cache)
    for name, choose in PICKLED.items():
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(choose(model, cache)))
    torch.save(model, folder / "model.pt")
    torch.save((ids, want), folder / "logits.pt")
    return folder


def in_a_fresh_process(code, folder):
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_a_process_that_made_no_sparse_class_reads_every_pickle(pickles):
    """It has not even imported the package."""
    code = "import pickle, pathlib\n"
    code += f"got = {{name: pickle.loads(pathlib.Path(name + '.pkl').read_bytes()) for name in {list(PICKLED)}}}\n"
    code += "print(type(got['model']) is got['class'], type(got['model'].config) is type(got['config']), "
    code += "*[type(layer).__name__ for layer in got['cache'].layers])\n"
    code += "import torch\nids, want = torch.load('logits.pt')\nprint(torch.equal(got['model'](ids).logits, want))"
    assert in_a_fresh_process(code, pickles) == ["True", "True", "SparseDynamicLayer", "SparseDynamicLayer", "True"]


def test_a_model_saved_whole_by_torch_loads_in_a_fresh_process(pickles):
    code = "import torch\nmodel = torch.load('model.pt', weights_only=False)\nids, want = torch.load('logits.pt')\n"
    code += "print(type(model).__name__, torch.equal(model(ids).logits, want))"
    assert in_a_fresh_process(code, pickles) == ["SparseLlamaForCausalLM", "True"]


def test_a_class_of_a_users_own_pickles_as_itself(real_budget, tiny_config):
    model = OwnModel(sparse_config(tiny_config(), real_budget))
    assert type(pickle.loads(pickle.dumps(model))) is OwnModel
    assert type(to_dense(model)) is LlamaForCausalLM


OwnModel = type("OwnModel", (sparse_class(LlamaForCausalLM),), {"__module__": __name__})


def test_sparse_classes_are_found_by_name():
    assert hf_sparse_attn.SparseLlamaForCausalLM is sparse_class(LlamaForCausalLM)
    assert hf_sparse_attn.SparseLlamaConfig is sparse_config_class(LlamaConfig)
    for name in ("SparseNothing", "SparseLlamaTokenizer", "LlamaForCausalLM"):
        with pytest.raises(AttributeError, match=name):
            getattr(hf_sparse_attn, name)
    with pytest.raises(ValueError, match="'mpt' does not route"):
        hf_sparse_attn.SparseMptForCausalLM  # noqa: B018


# -- threads --------------------------------------------------------------------------------------------------------


def at_once(*jobs):
    """Results of functions that start together, each in a thread of its own."""
    barrier = Barrier(len(jobs))

    def start(job):
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(start, jobs))


@pytest.fixture
def impatient_threads():
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def generate(model, ids):
    return model.generate(ids, max_new_tokens=24, do_sample=False)


def test_models_that_generate_at_once_give_the_tokens_they_give_alone(
    sparse_llama, real_budget, token_ids, impatient_threads
):
    other = {**real_budget, "block_size": 32, "min_keys": 128, "sink": 32, "local": 32, "index_dim": 16}
    models = [
        sparse_llama(real_budget, noise=0.1),
        sparse_llama(other, seed=1, noise=0.1, num_hidden_layers=3, num_key_value_heads=1),
    ]
    prompts = [token_ids(2, 230, seed=1), token_ids(1, 400, seed=2)]
    jobs = [lambda m=m, ids=ids: generate(m, ids) for m, ids in zip(models, prompts, strict=True)]
    alone = [job() for job in jobs]
    for got, want in zip(at_once(*jobs), alone, strict=True):
        assert torch.equal(got, want)


def test_one_model_serves_two_threads(model, token_ids, impatient_threads):
    prompts = [token_ids(1, 230, seed=1), token_ids(1, 300, seed=2)]
    alone = [generate(model, ids) for ids in prompts]
    for got, want in zip(at_once(*[lambda ids=ids: generate(model, ids) for ids in prompts]), alone, strict=True):
        assert torch.equal(got, want)


def test_threads_that_make_a_class_share_it(impatient_threads):
    for _ in range(20):
        stock = type("Stock", (), {})
        created = at_once(*[lambda stock=stock: make_class(SharedMixin, stock)] * 8)
        assert len(set(created)) == 1 and created[0].__bases__ == (SharedMixin, stock)


class SharedMixin(MadeMixin):
    pass


# -- dtypes, devices, modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_stays_close_and_its_routers_usable(model, dtype, token_ids):
    ids = token_ids(1, 200)
    want = logits(model, ids)
    low = copy.deepcopy(model).to(dtype)
    assert {weight.dtype for weight in low.parameters()} == {dtype}
    out = logits(low, ids)
    assert out.dtype == dtype and bool(torch.isfinite(out).all())
    agreement = (out.argmax(-1) == want.argmax(-1)).float().mean()
    assert agreement > 0.8  # a link more or less may be cut
    assert generate(low, ids).shape == (1, 224)


def test_training_mode_comes_and_goes(model, token_ids):
    ids = token_ids(1, 200)
    want = logits(model, ids)
    model.train()
    assert all(router.training for router in routers(model))
    assert torch.equal(logits(model, ids), want)  # nothing in it is random
    model.eval()
    assert not any(router.training for router in routers(model)) and torch.equal(logits(model, ids), want)


@pytest.fixture(scope="module")
def folder(sparse_llama, real_budget, tmp_path_factory):
    path = tmp_path_factory.mktemp("sparse") / "model"
    sparse_llama(real_budget, noise=0.1).save_pretrained(path)
    return path


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu"])
def test_a_device_map_loads_the_same_model(folder, model, device_map, token_ids):
    ids = token_ids(1, 200)
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_layers_offloaded_to_the_disk_bring_their_routers_along(folder, model, token_ids, tmp_path):
    """Accelerate loads weights when a module is called; nobody calls a router as a module."""
    ids = token_ids(1, 200)
    parts = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    places = {f"model.{part}": "disk" if part == "layers.1" else "cpu" for part in parts} | {"lm_head": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    for _ in range(2):
        assert torch.equal(logits(loaded, ids), logits(model, ids))
        assert [router.wq.device.type for router in routers(loaded)] == ["cpu", "meta"]
    assert torch.equal(generate(loaded, ids), generate(model, ids))


# -- gradient checkpointing -----------------------------------------------------------------------------------------


def enable_checkpointing(model, *options):
    # renamed within the supported range of versions; the old name warns in the newer ones
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(*options)


def router_gradients(model, ids):
    """Gradients of the task and of the routers' KL."""
    model.zero_grad(set_to_none=True)
    forward = SparseObjective(model, SparseTrainingConfig(kl_tile_share=1, dense_every=0)).forward(0, 1)
    task = model(input_ids=ids, labels=ids, use_cache=False, sparse_call=forward).loss
    (task + forward.kl_loss()).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_checkpointing_keeps_the_gradients_of_backbone_and_routers(model, token_ids):
    ids = token_ids(2, 200)
    model.train()
    want = router_gradients(model, ids)
    enable_checkpointing(model)
    got = router_gradients(model, ids)
    assert any(".router." in name and bool(grad.any()) for name, grad in want.items())
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_reentrant_checkpointing_is_refused(model):
    with pytest.raises(ValueError, match=r'needs use_reentrant=False.*Pass \{"use_reentrant": False\}'):
        enable_checkpointing(model, {"use_reentrant": True})
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_checkpointing_can_be_switched_off(model):
    enable_checkpointing(model, {"use_reentrant": False})
    assert model.model.layers[0].gradient_checkpointing
    (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


# -- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering]
)
def test_a_model_with_a_head_of_another_kind_is_loaded_saved_and_made_dense(
    auto, stock_llama, real_budget, token_ids, tmp_path
):
    """Transformers builds the body of such a model with AutoModel, from the sparse config."""
    ids = token_ids(1, 200)
    torch.manual_seed(0)
    stock = auto.from_config(stock_llama().config).eval()
    stock.save_pretrained(tmp_path / "stock")
    model = auto.from_pretrained(tmp_path / "stock", sparse_attention=real_budget)
    body = model.get_submodule(model.base_model_prefix)
    assert (
        type(model).__name__ == f"Sparse{type(stock).__name__}"
        and type(body) is LlamaModel
        and len(routers(model)) == 2
    )
    model.save_pretrained(tmp_path / "sparse")
    with torch.no_grad():
        want, dense = model(ids)[0], stock(ids)[0]
        assert not torch.equal(want, dense)
        assert torch.equal(auto.from_pretrained(tmp_path / "sparse")(ids)[0], want)
        assert torch.equal(pickle.loads(pickle.dumps(model))(ids)[0], want)
        assert torch.equal(to_dense(model)(ids)[0], dense)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
