"""Where the host waits for an accelerator: nowhere in a decode step, and not in every layer of a prefill.

The tensors are on the device "meta": they have no values, so that whatever reads one is seen without a GPU.
"""

from __future__ import annotations

import traceback

import pytest
import torch
from hf_sparse_attn_kernels.implementations import preferred
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from hf_sparse_attn import sparsify
from hf_sparse_attn.attention import documents, static_decode
from hf_sparse_attn.attention import layer as layers

SETTINGS = {
    "block_size": 16,
    "query_tile": 64,
    "sink": 16,
    "local": 64,
    "dense_below": 0,
    "min_keys": 256,
    "max_keys": 256,
}
LAYERS = 3
READING = {
    torch.ops.aten._local_scalar_dense.default: 0,  # item(), int(), bool(), tolist()
    torch.ops.aten.equal.default: True,
}
DEVICE = "meta"


class Waits(TorchDispatchMode):
    """Notes the line of the library for which the host would wait for the device, and gives it a value without doing
    so.
    """

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        held = any(x.device.type == DEVICE for x in tensors)
        if function in READING and held:
            self._note()
            return READING[function]
        if (
            function is torch.ops.aten._to_copy.default
            and held
            and torch.device(kwargs.get("device") or DEVICE).type == "cpu"
        ):
            self._note()
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if (
            function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
            and len({x.device.type for x in tensors}) > 1
        ):
            self._note()
        return function(*args, **kwargs)

    def _note(self):
        """Where it happened, below torch's own frames."""
        frame = next(frame for frame in reversed(traceback.extract_stack()[:-2]) if "/torch/" not in frame.filename)
        self.places.append(f"{frame.filename}:{frame.lineno} {frame.line}")

    @property
    def ours(self):
        return [place for place in self.places if "/hf_sparse_attn" in place]


def tiny():
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return sparsify(LlamaForCausalLM(config), SETTINGS).eval()


@pytest.fixture(scope="module")
def model():
    return tiny().to(DEVICE)


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch):
    monkeypatch.setattr(documents, "_last_answer", (None, (), []))  # what other tests have asked
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which does not know this device
    with preferred("triton"), torch.no_grad():
        yield


def ids(length):
    return torch.empty(1, length, dtype=torch.long, device=DEVICE)


def test_the_counter_sees_what_waits():
    x, here = torch.empty(3, device=DEVICE), torch.ones(3)
    with Waits() as waits:
        assert int(x.sum()) == 0 and not bool((x > 0).any()) and torch.equal(x, x) and x.cpu().device.type == "cpu"
        x.copy_(here)
        assert int(here.sum()) == 3 and bool(here.any())
    assert len(waits.places) == 5


def test_a_decode_step_waits_for_nothing(model):
    cache = DynamicCache(config=model.config)
    with Waits():
        model(ids(2000), past_key_values=cache)
    with Waits() as waits:
        for _ in range(20):  # more than a block: summaries are made, too
            model(ids(1), past_key_values=cache)
    assert not waits.places


def test_a_step_after_a_static_cache_waits_for_nothing(monkeypatch):
    """The prompt is read on the CPU, where its length is known; model and cache then go to the device."""
    monkeypatch.setattr(static_decode, "wanted", lambda device: True)
    here = tiny()
    cache = StaticCache(config=here.config, max_cache_len=600)
    with preferred("torch"):
        here(torch.ones(1, 500, dtype=torch.long), past_key_values=cache)
    here.to(DEVICE)
    for layer in cache.layers:
        for name in ("keys", "values", "router_keys", "cumulative_length"):
            setattr(layer, name, getattr(layer, name).to(DEVICE))
        layer.device, layer.steps = torch.device(DEVICE), layer.steps._replace(rows=layer.steps.rows.to(DEVICE))
    with Waits() as waits:
        for _ in range(20):
            here(ids(1), position_ids=ids(1), past_key_values=cache)
    assert not waits.places


def test_a_prefill_waits_twice_whatever_its_layers(model):
    """For whether the positions tell of packed documents, and whether they are consecutive."""
    with Waits() as waits:
        model(ids(2000), past_key_values=DynamicCache(config=model.config))
    assert len(waits.places) == 2


@pytest.mark.parametrize("count", [2, 20])
def test_packed_documents_that_are_known_wait_for_nothing_and_are_attended_once_a_layer(model, monkeypatch, count):
    """Where they start is read once, see above; here they are given."""
    slots = torch.arange(2000).chunk(count)
    places = torch.empty(count, 3, dtype=torch.long, device=DEVICE)
    of_one_row = [
        documents.Segment(slice(0, 1), part.to(DEVICE), len(part), part, True, place)
        for part, place in zip(slots, places, strict=True)
    ]
    selections, attend = [], layers.block_sparse_attention
    monkeypatch.setattr(documents.Layout, "segments", lambda _: of_one_row)
    monkeypatch.setattr(
        layers,
        "block_sparse_attention",
        lambda q, k, v, selection, **options: selections.append(selection) or attend(q, k, v, selection, **options),
    )
    with Waits() as waits:
        model(ids(2000), use_cache=False)
    assert not waits.ours and [len(selection.documents) for selection in selections] == [count] * LAYERS


def test_generation_reads_the_mask_at_the_prompt_only(model):
    cache, mask = DynamicCache(config=model.config), ids(64)
    with Waits() as waits:
        first = model.prepare_inputs_for_generation(
            ids(64), attention_mask=mask, past_key_values=cache, is_first_iteration=True
        )
    assert len(waits.ours) == 1 and first["attention_mask"] is not None  # the counter says no: padded
    cache.rows_are_padded = False
    with Waits() as waits:
        later = model.prepare_inputs_for_generation(
            ids(65), attention_mask=ids(65), past_key_values=cache, is_first_iteration=False
        )
    assert not waits.ours and later["attention_mask"] is None
