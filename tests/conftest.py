"""Fixtures that several test files share; the helpers are session fixtures that return functions."""

from __future__ import annotations

import os
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hf_sparse_attn_kernels import BlockSelection
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_sparse_attn import SparseAttentionConfig, sparsify
from hf_sparse_attn.attention import layer
from hf_sparse_attn.router.module import RoutingInputs, SparseRouter
from hf_sparse_attn.router.rotary import Rotary
from hf_sparse_attn.system.precision import linear_rate

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("suite")


LIMIT_RATE = 60e9  # operations per second of one core's linear layers (AVX-512, float32), for which time limits are set
SLOWEST = 20  # times as long may a test take on a slower or busier machine


def pytest_collection_modifyitems(config, items):
    """The file that studies a model comes first: of several processes none is left alone with it at the end.

    Time limits follow the rate of this machine, measured at the start.
    """
    items.sort(key=lambda item: item.path.name != "test_longlink_training.py")
    factor = min(SLOWEST, max(1.0, LIMIT_RATE / linear_rate(torch.float32)))
    for item in items:
        mine = item.get_closest_marker("timeout")
        limit = config.getoption("timeout") or (mine.args[0] if mine else float(config.getini("timeout")))
        item.add_marker(pytest.mark.timeout(factor * limit), append=False)


# blocks and tiles of 16; forced: 16 sink tokens, 16 local ones and the tile's own
SMALL = {
    "block_size": 16,
    "query_tile": 16,
    "sink": 16,
    "local": 16,
    "dense_below": 0,
    "query_samples": 8,
    "index_dim": 8,
}
REAL_BUDGET = {**SMALL, "density": 0.05, "min_keys": 80, "candidate_factor": 1.5}  # 5 blocks, 2 of them selected
EVERY_BLOCK = {**SMALL, "density": 1.0, "min_keys": 80}


@pytest.fixture
def poisoned_memory():
    """Memory that nothing was written to reads as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def real_budget():
    """Settings under which most of a 200-token input is cut."""
    return dict(REAL_BUDGET)


@pytest.fixture(scope="session")
def every_block():
    """Settings under which every block is kept, through the sparse path."""
    return dict(EVERY_BLOCK)


@pytest.fixture(scope="session")
def tiny_config():
    def make(**changes):
        values = {
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
        }
        return LlamaConfig(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def stock_llama(tiny_config):
    """A stock model with random weights, the same for the same seed."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(**changes)).eval()

    return make


@pytest.fixture(scope="session")
def sparse_llama(stock_llama):
    """The same model with routers; ``noise`` moves the router weights away from their untrained start."""

    def make(sparse_attention, seed=0, noise=0.0, **changes):
        model = sparsify(stock_llama(seed, **changes), sparse_attention)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if noise and ".router." in name:
                    weight += noise * torch.randn(weight.shape, generator=generator)
        return model

    return make


@pytest.fixture(scope="session")
def token_ids():
    """Random token ids [rows, length] without padding (id 0)."""

    def make(rows, length, seed=0):
        return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def shift():
    """Moves the trainable weights of a model, as training would."""

    def move(model, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight += 0.1 * torch.randn(weight.shape, generator=generator)
        return model.eval()

    return move


@pytest.fixture(scope="session")
def left_padded():
    """(ids, mask) of rows of different lengths, padded on the left with token 0."""

    def make(rows):
        width = max(len(row) for row in rows)
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
        return ids, mask

    return make


@pytest.fixture(scope="session")
def random_selection():
    """A random causal selection: each visible block is kept with probability ``share``."""

    def make(seed, batch, groups, grid, share=0.5):
        generator = torch.Generator().manual_seed(seed)
        last = grid.last_positions() // grid.block_size
        block = torch.arange(grid.blocks)
        keep = torch.rand(batch, groups, grid.tiles, grid.blocks, generator=generator) < share
        keep &= block <= last[:, None]
        return BlockSelection(torch.where(keep, block, -1).sort(-1).values.int(), grid)

    return make


@pytest.fixture(scope="session")
def llama_rotary(tiny_config):
    """The rotary view of a Llama model with the given ``rope_parameters``."""

    def make(head_dim=16, **rope):
        config = tiny_config(head_dim=head_dim, rope_parameters={"rope_theta": 10000.0, "rope_type": "default", **rope})
        return Rotary(LlamaRotaryEmbedding(config))

    return make


@pytest.fixture(scope="session")
def make_router(llama_rotary):
    """An initialised router (2 KV heads, 4 query heads, head dim 16 unless told), without rotary unless asked for."""

    def make(rotary=False, heads=4, groups=2, head_dim=16, noise=0.0, **config):
        view = llama_rotary(head_dim) if rotary else None
        router = SparseRouter(
            SparseAttentionConfig(**{**REAL_BUDGET, **config}), heads, groups, head_dim, view, layer=0
        )
        router.init_weights()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for weight in router.parameters():
                weight += noise * torch.randn(weight.shape, generator=generator)
        return router

    return make


@pytest.fixture(scope="session")
def routing_inputs():
    """Random queries and keys of one call: the last ``q_len`` of ``kv_len`` tokens."""

    def make(kv_len, q_len=None, batch=1, heads=4, groups=2, head_dim=16, seed=0):
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(batch, heads, q_len or kv_len, head_dim, generator=generator)
        k = torch.randn(batch, groups, kv_len, head_dim, generator=generator)
        return RoutingInputs(q, k, torch.arange(kv_len)[None], head_dim**-0.5)

    return make


@pytest.fixture(scope="session")
def word_tokenizer():
    """A tokenizer of the words w3 ... w96, one token each."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 97)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>")


@pytest.fixture(scope="session")
def random_words():
    """A text of ``count`` random words that the tokenizer knows."""

    def make(count, seed=0):
        return " ".join(f"w{i}" for i in random.Random(seed).choices(range(3, 97), k=count))

    return make


@pytest.fixture(scope="session")
def llama_folder(stock_llama, word_tokenizer, tmp_path_factory):
    """A saved stock model with its tokenizer."""
    folder = tmp_path_factory.mktemp("llama") / "tiny-llama"
    stock_llama().save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def count_calls(monkeypatch):
    """A list that grows by one for each call of the sparse attention."""
    calls = []
    original = layer.block_sparse_attention

    def counted(q, k, v, selection, **options):
        calls.append(selection)
        return original(q, k, v, selection, **options)

    monkeypatch.setattr(layer, "block_sparse_attention", counted)
    return calls
