"""What the CPU can do that this runs on: the rates of `devices.Device`, measured on the sizes of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from hf_sparse_attn_kernels import block_sparse_attention
from torch import Tensor
from transformers import AutoModelForCausalLM

from ...router.budget import make_plan
from ...training.chunked_loss import chunk_loss
from ...training.config import AdaptationConfig
from ...training.router_loss import tile_loss
from ..contenders import checkpoint_activations, plain_lora
from ..layer_shape import Layer, LayerShape
from ..timing import timed
from .attention_cost import AttentionShape, layer_work
from .devices import Device, available_memory
from .meta_step import quiet, simulate_step, stock_config, with_layers

OPERATION_SECONDS = 5e-6  # of one operation, beside its work
PRODUCT_TOKENS = 2048  # rows of the products that are timed
LAYER_TOKENS, WORDS = 1024, 2048  # of the steps of one layer
LEAST_SHARE = 0.1  # of a layer's step that is neither product nor attention
CALIBRATION_TOKENS, CALIBRATION_KEYS = 4096, 1024  # of the attention that is timed
TAUGHT_SHARE = 16  # the KL is computed on one tile in so many


def heads_of(config: Any) -> tuple[int, int, int]:
    """Heads, KV heads and head dim of a model, from its config."""
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    groups = int(getattr(text, "num_key_value_heads", None) or heads)
    return heads, groups, int(getattr(text, "head_dim", None) or text.hidden_size // heads)


def measure_cpu(config: Any, dtype: torch.dtype, lora: AdaptationConfig | None = None) -> Device:
    """This CPU, by a measurement of two to four seconds on the sizes of a model (``config``, stock or sparse) trained
    with ``lora``.
    """
    config = stock_config(config)
    heads, groups, head_dim = heads_of(config)
    name = str(dtype).removeprefix("torch.")
    shape = LayerShape(CALIBRATION_TOKENS, CALIBRATION_KEYS, dtype=name, heads=heads, groups=groups, head_dim=head_dim)
    layer = Layer(shape)
    selection = layer.select()
    q, k, v = leaves = tuple(x.detach().clone().requires_grad_() for x in (layer.q, layer.k, layer.v))

    def dense_attention() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads > groups)

    def sparse_attention() -> Tensor:
        return block_sparse_attention(q, k, v, selection)[0]

    work = layer_work(layer.router.config, AttentionShape(1, heads, groups, head_dim), shape.length, TAUGHT_SHARE, 2)
    hidden = int(config.get_text_config().hidden_size)
    products = {kind: _product_rate(kind, hidden) for kind in {dtype, torch.float32}}
    dense = _attention_rates(dense_attention, leaves, 4 * heads * head_dim * shape.dense_pairs)
    return Device(
        "cpu",
        available_memory(),
        products,
        _bandwidth(config, dtype, products, dense, lora or AdaptationConfig()),
        dense,
        _attention_rates(sparse_attention, leaves, shape.flops),
        work.routing / _seconds(layer.select),
        work.teaching / _seconds(lambda: _teach(layer)),
        OPERATION_SECONDS,
        note="measured on this machine just now",
    )


def faster(a: Device, b: Device) -> Device:
    """The better rates of two measurements of one machine: what else ran on it only lowers them."""
    better: dict[str, Any] = {
        name: max(getattr(a, name), getattr(b, name)) for name in ("bytes_per_s", "routing", "teaching", "memory_bytes")
    }
    for name in ("attention", "sparse_attention"):
        better[name] = tuple(map(max, getattr(a, name), getattr(b, name)))
    products = {dtype: max(rate, b.products[dtype]) for dtype, rate in a.products.items()}
    return replace(a, products=products, **better)


def _teach(layer: Layer) -> None:
    weights = list(layer.router.requires_grad_(True).parameters())
    plan = make_plan(layer.router.config, layer.inputs.grid(layer.router.config.query_tile, layer.shape.block_size))
    # one open tile in TAUGHT_SHARE, as `layer_work` counts them
    count = -(-int(plan.open.sum()) // TAUGHT_SHARE)
    loss = tile_loss(
        layer.router, layer.inputs, layer.router.config.query_tile, count, torch.Generator(device="cpu").manual_seed(0)
    )
    assert loss is not None
    torch.autograd.grad(loss.coarse + loss.fine, weights)


def _seconds(function: Callable[[], object], least: float = 0.15) -> float:
    """Least seconds of a call, after one that warms up: what else runs on the machine only adds to it."""
    function()
    times = [timed(function)]
    while sum(times) < least and len(times) < 9:
        times.append(timed(function))
    return min(times)


# x [n, h] by wᵀ [h, 3h] forward, y [n, 3h] by w to the gradient of x: 2 · 2 · n · h · 3h = 12 n h² operations
def _product_rate(dtype: torch.dtype, hidden: int) -> float:
    """Operations per second of a layer's products, forward and to the gradient of its input."""
    x, y = (
        torch.randn(PRODUCT_TOKENS, width, dtype=torch.float32, device="cpu").to(dtype)
        for width in (hidden, 3 * hidden)
    )
    w = torch.randn(3 * hidden, hidden, dtype=torch.float32, device="cpu").to(dtype)

    def both() -> tuple[Tensor, Tensor]:
        return F.linear(x, w), y @ w

    return 12 * PRODUCT_TOKENS * hidden * hidden / _seconds(both)


# bytes that are moved / (seconds of a step − those of its products and attention)
def _bandwidth(
    config: Any,
    dtype: torch.dtype,
    products: dict[torch.dtype, float],
    attention: tuple[float, float],
    lora: AdaptationConfig,
) -> float:
    """Bytes per second of what is neither product nor attention, from steps of the model's first layer with few words.

    Element-wise operations, conversions, new memory and Python together: no single operation stands for the mixture.
    """
    few = with_layers(config, 1)
    few.get_text_config().vocab_size = WORDS
    # the id of padding may lie beyond the few words
    few.pad_token_id = few.get_text_config().pad_token_id = None
    simulated = simulate_step(few, dtype, lora, 1, LAYER_TOKENS)
    with quiet():
        model = plain_lora(AutoModelForCausalLM.from_config(few, dtype=dtype, attn_implementation="sdpa"), lora)
        if model.get_base_model().supports_gradient_checkpointing:
            checkpoint_activations(model)
    if lora.chunked_loss:
        chunk_loss(model)
    model.train()
    ids = torch.randint(
        WORDS,
        (1, LAYER_TOKENS),
        generator=torch.Generator(device="cpu").manual_seed(0),
        dtype=torch.int64,
        device="cpu",
    )
    weights = [p for p in model.parameters() if p.requires_grad]

    def step() -> object:
        return torch.autograd.grad(model(input_ids=ids, labels=ids, use_cache=False).loss, weights)

    seconds = _seconds(step)
    heads, _, head_dim = heads_of(config)
    pairs = 4 * heads * head_dim * LAYER_TOKENS * (LAYER_TOKENS + 1) // 2
    # a layer's attention runs forward twice under checkpointing, and backward with 2.5 times the operations
    known = pairs * (2 / attention[0] + 2.5 / attention[1])
    known += sum(
        op.flops * count / products.get(op.dtype, min(products.values())) for op, count in simulated.operations.items()
    )
    moved = sum(op.bytes * count for op, count in simulated.operations.items() if not op.flops)
    # rates are noisy: products and attention are never taken for the whole step
    return moved / max(seconds - known, LEAST_SHARE * seconds)


# forward: q·k and p·v; backward: q·k again, do·v, and the products to dq, dk and dv, hence 5 / 2
def _attention_rates(attention: Callable[[], Tensor], leaves: tuple[Tensor, ...], flops: float) -> tuple[float, float]:
    """Rates of forward and backward pass, the latter of two and a half times the operations."""
    with torch.no_grad():
        forward = _seconds(attention)
    grad = torch.randn(leaves[0].shape, dtype=torch.float32, device="cpu").to(leaves[0].dtype)
    both = _seconds(lambda: torch.autograd.grad(attention(), leaves, grad))
    # both times are noisy: their difference may be next to nothing
    return flops / forward, 2.5 * flops / max(both - forward, forward)
