"""Memory and time of a training step before anyone pays for it: from a model's config, a length and a device."""

# letters: B batch, H query heads, D head dim, N tokens

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...config import SparseAttentionConfig
from ...models.attach import routers
from ...models.convert import sparsify
from ...training.config import AdaptationConfig
from .attention_cost import AttentionShape, LayerWork, layer_work
from .devices import Device
from .meta_step import BACKWARD, FORWARD, LOSS, Simulated, simulate_step, stock_config, with_layers

FEW, MORE = 2, 4  # layers of the two steps that are simulated; all others are like those between
STATES = 2  # of AdamW for each trained weight, beside the weight and its gradient


@dataclass(frozen=True)
class TrainingPlan:
    """Predicted need of a training step; bytes and seconds.

    Attributes:
        attention: "sparse" (a step with the KL), "dense" (the recipe's dense step) or "stock".
        parameters: numbers of weights of the backbone, of LoRA and of the routers.
        static: bytes between steps by what they are for; ``step`` the same of the peak within a step.
        time: seconds of a step by what they are for.
    """

    attention: str
    length: int
    batch: int
    dtype: str
    device: str
    parameters: dict[str, int]
    static: dict[str, int]
    step: dict[str, int]
    time: dict[str, float]
    fragmentation: float = 1.0
    reserved_bytes: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def static_bytes(self) -> int:
        return sum(self.static.values())

    @property
    def peak_bytes(self) -> int:
        """Peak above the static bytes."""
        return sum(self.step.values())

    @property
    def total_bytes(self) -> int:
        """What the device must have, the allocator's overhead and the context included."""
        return int((self.static_bytes + self.peak_bytes) * self.fragmentation) + self.reserved_bytes

    @property
    def seconds(self) -> float:
        return sum(self.time.values())

    @property
    def tokens_per_s(self) -> float:
        return self.batch * self.length / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, totals included."""
        names = ("static_bytes", "peak_bytes", "total_bytes", "seconds", "tokens_per_s")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class _Model:
    """What a plan needs of a model beside its simulated steps."""

    shape: AttentionShape
    layers: int
    sparse_layers: int
    window_layers: int  # whose attention reads ``window`` keys at most
    window: int
    router_weights: int
    sparse: SparseAttentionConfig


@dataclass(frozen=True)
class _Step:
    """A step that is planned: what it runs, and the work of one of its sparse layers."""

    model: _Model
    simulated: Simulated
    work: LayerWork
    attention: str
    length: int
    training: AdaptationConfig

    @property
    def learns(self) -> bool:
        """Whether the routers learn in it."""
        return self.attention != "stock" and self.training.kl_weight > 0


def plan_training(
    config: PreTrainedConfig,
    device: Device,
    length: int,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "sparse",
    sparse_attention: SparseAttentionConfig | Mapping[str, Any] | None = None,
    training: AdaptationConfig | None = None,
    padded: bool = False,
) -> TrainingPlan:
    """Predict memory and time of a training step on ``batch`` rows of ``length`` tokens.

    Args:
        config: of the model, stock or sparse; nothing else of it is read.
        attention: "sparse", "dense" or "stock".
        sparse_attention: settings; by default those of ``config``, or the library's.
        training: LoRA, gradient checkpointing, chunked loss, the KL's share of tiles.
        padded: rows with padding, for which stock SDPA builds a mask of N×N.

    Raises:
        ValueError: impossible sizes, or an architecture that is not supported or whose layers depend on values.
    """
    if attention not in ("sparse", "dense", "stock"):
        raise ValueError(f"attention is {attention!r}: must be sparse, dense or stock")
    for name, value in (("length", length), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} is {value!r}: must be >= 1")
    training = training or AdaptationConfig()
    stock = stock_config(config)
    model = _describe(stock, batch, _settings(config, sparse_attention))
    simulated = _simulate(stock, model.layers, dtype, training, batch, length)
    share = training.kl_tile_share if training.kl_weight > 0 else 0
    step = _Step(
        model,
        simulated,
        layer_work(model.sparse, model.shape, length, share, dtype.itemsize),
        attention,
        length,
        training,
    )
    sizes = (attention, length, batch, str(dtype).removeprefix("torch."), device.name)
    needs = (_parameters(step), _static(step), _peak(step, padded), _time(step, device))
    settings = {
        "gradient_checkpointing": training.gradient_checkpointing,
        "chunked_loss": training.chunked_loss,
        "rank": training.rank,
    }
    return TrainingPlan(*sizes, *needs, device.fragmentation, device.reserved_bytes, settings)


def _simulate(
    stock: Any, layers: int, dtype: torch.dtype, training: AdaptationConfig, batch: int, length: int
) -> Simulated:
    """The step of all layers; of many from two with few."""
    if layers <= MORE:
        return simulate_step(stock, dtype, training, batch, length)
    few, more = (simulate_step(with_layers(stock, n), dtype, training, batch, length) for n in (FEW, MORE))
    # a layer adds half of what four layers need beyond two
    return more.beyond(few, (layers - MORE) / (MORE - FEW))


def _settings(config: Any, given: Any) -> SparseAttentionConfig:
    settings = getattr(config, "sparse_attention", None)
    return SparseAttentionConfig.coerce(given if given is not None else settings if settings is not None else {})


def _describe(stock: Any, batch: int, sparse: SparseAttentionConfig) -> _Model:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(stock))  # which sparsify would change
    layer_routers = routers(sparsify(model, sparse))
    router = layer_routers[0]
    shape = AttentionShape(batch, router.heads, router.groups, router.head_dim)
    weights = sum(p.numel() for r in layer_routers for p in r.parameters())
    text = stock.get_text_config()
    layers, window = int(text.num_hidden_layers), int(getattr(text, "sliding_window", None) or 0)
    # where the model has windows, the layers without a router attend within them
    return _Model(
        shape,
        layers,
        len(layer_routers) - len(sparse.dense_layers),
        layers - len(layer_routers) if window else 0,
        window,
        weights,
        sparse,
    )


def _parameters(step: _Step) -> dict[str, int]:
    routers = 0 if step.attention == "stock" else step.model.router_weights
    return {"backbone": step.simulated.parameters, "lora": step.simulated.trained, "routers": routers}


def _static(step: _Step) -> dict[str, int]:
    # the weight and AdamW's states; its gradient belongs to the step
    static = {"weights": step.simulated.weight_bytes, "lora": (1 + STATES) * step.simulated.trained_bytes}
    if step.attention != "stock":  # the frozen original, the adapter's copy, and where it learns its optimiser's states
        # float32, whatever the model's dtype
        static["routers"] = 4 * step.model.router_weights * (2 + (STATES if step.learns else 0))
    return static


def _peak(step: _Step, padded: bool) -> dict[str, int]:
    """The largest phase of a step: what it holds by when that was made, and what sparse attention adds to it."""
    sparse, model, work = step.attention == "sparse", step.model, step.work
    held = {"selections": work.selection_bytes * model.sparse_layers} if sparse else {}
    if padded and step.attention == "stock":
        # a boolean mask: one byte for each pair of a query and a key
        held["mask"] = model.shape.batch * step.length**2
    names = {FORWARD: "kept activations", LOSS: "logits and loss", BACKWARD: "recomputed layer and gradients"}
    phases = []
    for phase, labels in step.simulated.peaks.items():
        needs = {names[label]: int(size) for label, size in labels.items() if size}
        if step.learns:
            # carried, then handed over, too
            needs["router gradients"] = 4 * model.router_weights * (2 if phase == BACKWARD else 1)
        if phase == FORWARD and step.attention != "stock":
            # both take turns within a layer: the larger one counts
            teaching, routing = work.teaching_bytes if step.learns else 0, work.routing_bytes if sparse else 0
            needs["KL" if step.learns else "routing"] = max(teaching, routing)
        phases.append({**needs, **held})
    return max(phases, key=lambda needs: sum(needs.values()))


# an operation takes max(operations / rate, bytes / bandwidth, launch), as in the roofline model
def _time(step: _Step, device: Device) -> dict[str, float]:
    """Seconds by part: every operation takes what its products or its bytes take, whichever is longer."""
    model, work = step.model, step.work
    slowest = min(device.products.values())
    time = {"products": 0.0, "element-wise": 0.0}
    for op, count in step.simulated.operations.items():
        by_products = op.flops / device.products.get(op.dtype, slowest)
        by_bytes = op.bytes / device.bytes_per_s
        time["products" if by_products > by_bytes else "element-wise"] += count * max(
            by_products, by_bytes, device.operation_seconds
        )
    sparse_layers = model.sparse_layers if step.attention == "sparse" else 0
    layers = (
        ("dense attention", model.layers - sparse_layers - model.window_layers, work.dense_pairs, device.attention),
        (
            "attention in a window",
            model.window_layers,
            min(step.length * model.window, work.dense_pairs),
            device.attention,
        ),
        ("sparse attention", sparse_layers, work.kept_pairs, device.sparse_attention),
    )
    # checkpointing runs every layer's forward pass again in the backward pass
    forwards = 2 if step.training.gradient_checkpointing else 1
    # q·k and p·v: 4 · B · H · D operations a pair forward; backward takes two and a half times as many
    per_pair = 4 * model.shape.batch * model.shape.heads * model.shape.head_dim
    for name, count, pairs, (forward, backward) in layers:
        if count:
            time[name] = count * per_pair * pairs * (forwards / forward + 2.5 / backward)
    if sparse_layers:
        # once: recomputation reuses the selection
        time["routing"] = sparse_layers * work.routing / device.routing
    if step.learns:
        time["KL"] = model.sparse_layers * work.teaching / device.teaching
    return time
