"""A training step on the meta device: the memory, operations and bytes of every tensor operation, without any data.

The step runs through the model's own code, PEFT, gradient checkpointing and the chunked loss, with tensors that have
sizes only; what is counted is therefore what happens, for any architecture. Attention is replaced by an operation that
keeps what fused attention keeps (q, k, v, the output and a log-sum-exp); its own cost is added by `plan`.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AutoModelForCausalLM

from ...training.chunked_loss import chunk_loss
from ...training.config import AdaptationConfig
from ..contenders import checkpoint_activations, plain_lora

ATTENTION = "planned_attention"  # name in Transformers' attention interface
FORWARD, LOSS, BACKWARD = "forward", "loss", "backward"


@dataclass(frozen=True)
class Operation:
    """One kind of tensor operation: its products' operations, the bytes that it reads and writes, and their dtype."""

    flops: int
    bytes: int
    dtype: torch.dtype


@dataclass
class Simulated:
    """What a step needs: by phase the largest live bytes, split by the phase that allocated them, and its
    operations.
    """

    peaks: dict[str, dict[str, float]] = field(default_factory=dict)
    operations: Counter[Operation] = field(default_factory=Counter)
    parameters: int = 0  # of the backbone
    weight_bytes: int = 0
    trained: int = 0  # LoRA weights
    trained_bytes: int = 0

    # x + times · (x − x_less): layers are alike, so that all figures grow linearly with their number
    def beyond(self, less: Simulated, times: float) -> Simulated:
        """This step with the layers that it has more than ``less`` repeated ``times`` more."""
        peaks = {
            phase: {
                label: self.peaks[phase][label] + times * (self.peaks[phase][label] - less.peaks[phase][label])
                for label in labels
            }
            for phase, labels in self.peaks.items()
        }
        operations: Counter[Operation] = Counter(self.operations)
        for operation in {*self.operations, *less.operations}:
            more = self.operations[operation] - less.operations[operation]
            operations[operation] = round(self.operations[operation] + times * more)

        def grown(name: str) -> int:
            return int(getattr(self, name) + round(times * (getattr(self, name) - getattr(less, name))))

        return Simulated(peaks, operations, *map(grown, ("parameters", "weight_bytes", "trained", "trained_bytes")))


class _Meter(TorchDispatchMode):
    """Notes what every operation allocates and frees, reads and writes."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.result, self.phase = Simulated(), FORWARD
        self._live = dict.fromkeys((FORWARD, LOSS, BACKWARD), 0)
        # by storage, as views share one; weights and buffers are there before the step
        self._known = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in tensors:
            self._allocated(tensor.untyped_storage())
        # a view moves nothing
        if tensors and not function.is_view:
            count = flop_registry.get(function._overloadpacket)
            flops = 0 if count is None else int(count(*args, **kwargs, out_val=out))
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            # by id: a tensor that is an argument and the result, as of operations in place, counts once
            moved = {id(t): t.numel() * t.element_size() for t in (*read, *tensors)}
            self.result.operations[Operation(flops, sum(moved.values()), (read or tensors)[0].dtype)] += 1
        return out

    def _allocated(self, storage: Any) -> None:
        key, size, phase = storage._cdata, storage.nbytes(), self.phase
        if key in self._known or not size:
            return
        self._known.add(key)
        self._live[phase] += size
        # autograd frees what it kept by itself: the end of the storage is the only sign of it
        weakref.finalize(storage, self._freed, key, size, phase)
        # a new peak, split by the phase that allocated
        if sum(self._live.values()) > sum(self.result.peaks.get(phase, {}).values()):
            self.result.peaks[phase] = {label: float(size) for label, size in self._live.items()}

    def _freed(self, key: int, size: int, phase: str) -> None:
        self._known.discard(key)
        self._live[phase] -= size


class _Attention(torch.autograd.Function):
    """Keeps and makes what fused attention does, computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:3], v.shape[3])
        # the last one stands for the log-sum-exp, one number for each query and head
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


def stock_config(config: Any) -> Any:
    """A copy of a model's config, of the stock class and without ``sparse_attention``."""
    if not hasattr(config, "sparse_attention"):
        return copy.deepcopy(config)
    values = {name: value for name, value in config.to_dict().items() if name != "sparse_attention"}
    # a sparse config's class is derived from the stock one
    return next(cls for cls in type(config).__mro__ if cls.__module__.startswith("transformers.models"))(**values)


def with_layers(config: Any, count: int) -> Any:
    """A copy of a model's config with the first ``count`` layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    layers = text.num_hidden_layers
    # lists with an entry for each layer, such as layer_types, are cut along
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return config


def meta_model(config: Any, dtype: torch.dtype, lora: AdaptationConfig) -> Any:
    """The stock causal model of ``config`` (without ``sparse_attention``) with LoRA, without data.

    Raises:
        ValueError: it is no causal model, or has no module that LoRA is to go on.
    """
    with torch.device("meta"), quiet():
        return plain_lora(AutoModelForCausalLM.from_config(config, dtype=dtype), lora)


def simulate_step(config: Any, dtype: torch.dtype, lora: AdaptationConfig, batch: int, length: int) -> Simulated:
    """A training step of the stock model of ``config`` on ``batch`` rows of ``length`` tokens, dense causal attention
    left out.

    Raises:
        ValueError: the model's forward depends on values (a mixture of experts, say), or see `meta_model`.
    """
    model = meta_model(config, dtype, lora)
    AttentionInterface.register(ATTENTION, _attend)
    base = model.get_base_model()
    base.set_attn_implementation(ATTENTION)
    if lora.gradient_checkpointing and base.supports_gradient_checkpointing:
        checkpoint_activations(model)
    if lora.chunked_loss:
        chunk_loss(model)
    model.train()
    meter = _Meter([*model.parameters(), *model.buffers()])
    ids = torch.empty(batch, length, dtype=torch.long, device="meta")
    try:
        with quiet(), meter:
            _run(model, base, meter, ids)
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{type(base).__name__} cannot be planned, its forward pass depends on values: {error}"
        ) from error
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    result = meter.result
    result.trained, result.trained_bytes = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
    result.parameters, result.weight_bytes = (
        sum(p.numel() for p in frozen),
        sum(t.nbytes for t in (*frozen, *model.buffers())),
    )
    return result


def _run(model: Any, base: Any, meter: _Meter, ids: Tensor) -> None:
    stock_loss = base.loss_function

    # a phase of its own: logits are the largest tensors of a step with many words
    def loss_function(*args: Any, **kwargs: Any) -> Any:
        meter.phase = LOSS
        try:
            return stock_loss(*args, **kwargs)
        finally:
            meter.phase = FORWARD

    base.loss_function = loss_function
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    meter.phase = BACKWARD
    loss.backward()


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings within a ``with`` block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Transformers says about checkpointing without data
        yield
