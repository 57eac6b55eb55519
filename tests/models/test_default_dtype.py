"""torch.set_default_dtype and torch.set_default_device are the user's: nothing of ours depends on them."""

from __future__ import annotations

import contextlib
import copy
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hf_sparse_attn import (
    DistillationConfig,
    SparseObjective,
    SparseTrainingConfig,
    chunk_loss,
    distill,
    fit_mass_threshold,
    routers,
    sparsify,
)

N = 200


class Strangers(TorchDispatchMode):
    """Fails where an operator gives a tensor of ``dtype`` though none of its inputs has it: the default decided."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        has = [
            any(isinstance(x, torch.Tensor) and x.dtype == self.dtype for x in tree_leaves(part))
            for part in (out, (args, kwargs))
        ]
        assert not has[0] or has[1] or (kwargs and kwargs.get("dtype") == self.dtype), (
            f"{func} made a tensor of the default dtype"
        )
        return out


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        with Strangers(dtype):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


AMBIENT = {
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
}


@pytest.fixture(params=AMBIENT)
def ambient(request):
    return AMBIENT[request.param]


def rows(length=N, count=2):
    return torch.randint(3, 97, (count, length), generator=torch.Generator("cpu").manual_seed(0), device="cpu")


@torch.no_grad()
def plain(model):
    return model(rows(), use_cache=False).logits


@torch.no_grad()
def padded(model):
    mask = torch.ones(2, N, dtype=torch.long, device="cpu")
    mask[1, :30] = 0
    return model(rows(), attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def packed(model):
    positions = torch.tensor([[*range(120), *range(80)]], device="cpu")
    return model(rows(count=1), position_ids=positions, use_cache=False).logits


@torch.no_grad()
def cached(model):
    ids, mask, parts = rows(), torch.ones(2, N, dtype=torch.long, device="cpu"), []
    mask[1, :30] = 0
    cache = DynamicCache()
    for at in (slice(0, 180), *(slice(i, i + 1) for i in range(180, 186)), slice(186, N)):
        parts.append(model(ids[:, at], attention_mask=mask[:, : at.stop], past_key_values=cache).logits)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0, 2, 3], device="cpu"))
    cache.crop(-20)
    parts.append(model(rows(1, 4), past_key_values=cache).logits)
    return torch.cat(parts[:-1], 1)


@torch.no_grad()
def head_budgets(model):
    fit_mass_threshold(model, [{"input_ids": rows()}])
    return plain(model)


def learned(model):
    distill(model, [{"input_ids": rows(count=1)}], DistillationConfig(steps_per_batch=2), progress=False)
    return torch.cat([weight.detach().flatten() for router in routers(model) for weight in router.parameters()])


def joint(model):
    model.train()._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
    chunk_loss(model)
    forward = SparseObjective(model, SparseTrainingConfig(dense_every=0)).forward(0, 1)
    loss = model(input_ids=rows(), labels=rows(), use_cache=False, sparse_call=forward).loss
    (loss + forward.kl_loss()).backward()
    forward.statistics()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


WORK = [plain, padded, packed, cached, head_budgets, learned, joint]


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_defaults_of_the_user_change_nothing(ambient, work, sparse_llama, real_budget):
    model = sparse_llama({**real_budget, "query_samples": 4}, noise=0.1)
    want = work(copy.deepcopy(model))
    with ambient():
        got = work(model)
    assert got.dtype == want.dtype and torch.equal(got, want)


def test_a_model_becomes_sparse_where_it_is(ambient, stock_llama, real_budget):
    want = sparsify(stock_llama(), real_budget)
    stock = stock_llama()
    with ambient():
        got = sparsify(stock, real_budget)
    for ours, theirs in zip(routers(got), routers(want), strict=True):
        for name, weight in ours.named_parameters():
            assert torch.equal(weight, theirs.get_parameter(name)) and weight.dtype == torch.float32


@torch.no_grad()
def test_a_static_cache_of_the_models_device(ambient, sparse_llama, real_budget):
    model, ids = sparse_llama(real_budget, noise=0.1), rows(count=1)

    def steps(cache):
        return torch.cat(
            [model(ids[:, at], past_key_values=cache).logits for at in (slice(0, 190), slice(190, 191))], 1
        )

    caches = [StaticCache(config=model.config, max_cache_len=256) for _ in range(2)]
    for cache in caches:
        cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    want = steps(caches[0])
    with ambient():
        got = steps(caches[1])
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_routers_start_alike_in_every_dtype_of_the_backbone(dtype, llama_folder, real_budget):
    for router in routers(
        AutoModelForCausalLM.from_pretrained(llama_folder, dtype=dtype, sparse_attention=real_budget)
    ):
        want = copy.deepcopy(router)
        want.init_weights()
        for name, weight in router.named_parameters():
            assert weight.dtype == torch.float32 and torch.equal(weight, want.get_parameter(name))
