"""Stage A: the routers learn the block mass of the model's own dense attention; the backbone is not touched.

One dense forward pass serves several optimiser steps: no gradient crosses layers, so every layer's router is trained
where its queries and keys appear, on fresh random tiles for every step, half of the steps on single queries.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import active_routers
from ..attending import SparseCall
from ..conversion import mark_trained
from ..files import write_atomically
from ..progress import bar
from ..router import RoutingInputs, SparseRouter
from ..sites import routers
from .losses import TileLoss, tile_loss
from .svd import start_index

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistillationConfig:
    """Settings of `distill`. A batch is one dense forward pass.

    Raises:
        ValueError: a field has an impossible value.
    """

    lr: float = 1e-3  # of stage 1; AdamW, no weight decay
    index_lr: float = 2e-4  # of stage 2, whose start is good
    warmup_steps: int = 20  # optimiser steps of linear warm-up; then cosine to a tenth over the rest
    steps_per_batch: int = 4  # optimiser steps on each forward pass
    tiles_per_step: int = 4  # query tiles of each row in a step on tiles
    queries_per_step: int = 48  # single queries of each row in a step on tiles of 1
    seed: int = 0
    save_every: int = 4  # batches between checkpoints, if a checkpoint path is given

    def __post_init__(self) -> None:
        for name in ("steps_per_batch", "tiles_per_step", "queries_per_step", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"distillation.{name} is {getattr(self, name)!r}: must be >= 1")
        if not (self.lr > 0 and self.index_lr > 0 and self.warmup_steps >= 0):
            values = f"lr {self.lr!r}, index_lr {self.index_lr!r}, warmup_steps {self.warmup_steps!r}"
            raise ValueError(f"distillation has {values}: learning rates must be > 0, warmup_steps >= 0")


@dataclass
class DistillationReport:
    """What `distill` did: one row of ``log`` per batch, means over layers and steps."""

    batches: int = 0
    steps: int = 0
    resumed_at: int = 0
    backbone_sha256: str = ""
    log: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def backbone_hash(model: nn.Module) -> str:
    """SHA-256 over all parameters that are no router's."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".router." not in name:
            digest.update(name.encode())
            digest.update(parameter.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def router_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all router weights, by parameter name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".router." in name}


def load_router_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set all router weights. Raises ValueError if names or shapes do not match."""
    own = {name: p for name, p in model.named_parameters() if ".router." in name}
    if own.keys() != state.keys():
        raise ValueError(f"router weights do not match the model: {sorted(own.keys() ^ state.keys())[:4]} are on one side only")
    with torch.no_grad():
        for name, p in own.items():
            if p.shape != state[name].shape:
                raise ValueError(f"router weight {name} has shape {tuple(state[name].shape)}, the model needs {tuple(p.shape)}")
            p.copy_(state[name])


class _Distiller:
    """The observer of the dense forward passes: trains each layer's router as the layer runs."""

    def __init__(self, found: list[SparseRouter], config: DistillationConfig, total_batches: int) -> None:
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        self.optimizers = {r.layer: self._optimizer(r) for r in found}
        self.total_steps = max(1, total_batches * config.steps_per_batch)
        self.batch = 0
        self.losses: list[TileLoss] = []
        self.start_index = False

    def _optimizer(self, router: SparseRouter) -> torch.optim.AdamW:
        stages = ((router.wq, router.wk), (router.wq_index, router.wk_index))
        return torch.optim.AdamW([{"params": list(stage)} for stage in stages], weight_decay=0.0)

    def _schedule(self, step: int) -> float:
        """Factor on the learning rates at an optimiser step."""
        config = self.config
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        done = min(1.0, (step - config.warmup_steps) / max(1, self.total_steps - config.warmup_steps))
        return 0.55 + 0.45 * math.cos(math.pi * done)

    def __call__(self, router: SparseRouter, inputs: RoutingInputs) -> None:
        if self.start_index:
            start_index(router, inputs)
            return
        optimizer = self.optimizers[router.layer]
        for i in range(self.config.steps_per_batch):
            single = i % 2 == 1
            tile, count = (1, self.config.queries_per_step) if single else (router.config.query_tile, self.config.tiles_per_step)
            with torch.enable_grad():
                loss = tile_loss(router, inputs, tile, count, self.generator)
                if loss is None:
                    continue
                (loss.coarse + loss.fine).backward()
            factor = self._schedule(self.batch * self.config.steps_per_batch + i)
            for group, lr in zip(optimizer.param_groups, (self.config.lr, self.config.index_lr), strict=True):
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if not single:
                self.losses.append(replace(loss, coarse=loss.coarse.detach(), fine=loss.fine.detach()))

    def row(self) -> dict[str, float]:
        """Means over the layers of the batch just done; recovered share over layers at equal budget."""
        losses, self.losses = self.losses, []
        n = len(losses)
        means = {name: sum(getattr(x, name) for x in losses) / n for name in ("kept", "window", "oracle")}
        gap = means["oracle"] - means["window"]
        return {
            "batch": float(self.batch),
            "kl_coarse": sum(float(x.coarse) for x in losses) / n,
            "kl_fine": sum(float(x.fine) for x in losses) / n,
            "kept_mass": means["kept"],
            "recovered_share": (means["kept"] - means["window"]) / gap if gap > 0 else 0.0,
        }

    def state(self) -> dict[str, Any]:
        optimizers = {str(layer): opt.state_dict() for layer, opt in self.optimizers.items()}
        return {"batch": self.batch, "generator": self.generator.get_state(), "optimizers": optimizers}

    def load(self, state: dict[str, Any]) -> None:
        self.batch = state["batch"]
        self.generator.set_state(state["generator"])
        for layer, opt in self.optimizers.items():
            opt.load_state_dict(state["optimizers"][str(layer)])


def distill(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    config: DistillationConfig | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    on_batch: Callable[[dict[str, float]], None] | None = None,
) -> DistillationReport:
    """Train the routers of a sparse ``model`` on its own dense attention (stage A of the training).

    Args:
        model: a sparse model; its backbone is not changed, which is checked by hash. Its routers end up trained and
            marked so in the config. Of a PeftModel, the routers of the active adapter are trained.
        batches: mappings with ``input_ids`` [B, N] (and ``attention_mask``, ``position_ids`` if any), N at least
            ``dense_below``. Must have a length; on resume the batches already done are skipped.
        config: settings; the defaults suit models up to a few billion parameters.
        checkpoint: file to save progress in and to resume from if it exists. It is left in place at the end.
        progress: show a progress bar on the terminal.
        on_batch: called with the log row of every batch.

    Returns:
        A report with loss, kept mass and recovered share per batch.

    Raises:
        ValueError: no batches, batches too short to have anything to select, or a checkpoint of another run.
        RuntimeError: the backbone changed.
    """
    config = config or DistillationConfig()
    found = active_routers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no routers: convert it with hf_sparse_attn.sparsify first")
    todo = list(batches)
    if not todo:
        raise ValueError("distill got no batches: give at least one document")
    distiller = _Distiller(found, config, len(todo))
    report = DistillationReport(batches=len(todo), backbone_sha256=backbone_hash(model))
    training, frozen = model.training, [p for router in found for p in router.parameters() if not p.requires_grad]
    model.eval()
    try:
        for weight in frozen:
            weight.requires_grad_()
        _start_or_resume(model, distiller, report, todo, config, None if checkpoint is None else Path(checkpoint))
        with bar(progress) as shown:
            task = shown.add_task("distilling", total=len(todo), completed=distiller.batch, info="")
            for batch in todo[distiller.batch :]:
                row = _train_batch(model, batch, distiller)
                report.log.append(row)
                losses = f"KL {row['kl_coarse']:.3f} + {row['kl_fine']:.3f}"
                shown.update(task, advance=1, info=f"{losses}, recovered share {row['recovered_share']:.3f}")
                if on_batch is not None:
                    on_batch(row)
                if checkpoint is not None and (distiller.batch % config.save_every == 0 or distiller.batch == len(todo)):
                    _save(model, distiller, report, Path(checkpoint), config)
    finally:
        model.train(training)
        for weight in frozen:
            weight.requires_grad_(False)
    if backbone_hash(model) != report.backbone_sha256:
        raise RuntimeError("the backbone changed during distillation; this is a bug, please report it")
    for router in found:
        router.fresh = False
    mark_trained(model)
    report.steps = distiller.batch * config.steps_per_batch
    return report


def _start_or_resume(
    model: nn.Module,
    distiller: _Distiller,
    report: DistillationReport,
    batches: list[Mapping[str, Tensor]],
    config: DistillationConfig,
    checkpoint: Path | None,
) -> None:
    if checkpoint is not None and checkpoint.exists():
        _resume(model, distiller, report, checkpoint, config)
    elif all(router.fresh for router in active_routers(model)):
        distiller.start_index = True
        _forward(model, batches[0], distiller)
        distiller.start_index = False


def _train_batch(model: nn.Module, batch: Mapping[str, Tensor], distiller: _Distiller) -> dict[str, float]:
    _forward(model, batch, distiller)
    if not distiller.losses:
        config = routers(model)[0].config
        raise ValueError(
            f"a batch of {tuple(batch['input_ids'].shape)} tokens has nothing to select: documents must be longer than dense_below "
            f"({config.dense_below}) and than min_keys ({config.min_keys})"
        )
    distiller.batch += 1
    return distiller.row()


@torch.no_grad()
def _forward(model: nn.Module, batch: Mapping[str, Tensor], observer: _Distiller) -> None:
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    backbone = getattr(model, "base_model", model)  # the logits are not needed
    backbone(**inputs, use_cache=False, sparse_call=SparseCall(dense=True, observer=observer))


def _save(model: nn.Module, distiller: _Distiller, report: DistillationReport, path: Path, config: DistillationConfig) -> None:
    state = {
        "routers": router_state(model),
        "distiller": distiller.state(),
        "log": report.log,
        "config": asdict(config),
        "hash": report.backbone_sha256,
        "batches": report.batches,
    }
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def _resume(model: nn.Module, distiller: _Distiller, report: DistillationReport, path: Path, config: DistillationConfig) -> None:
    state = torch.load(path, weights_only=True)
    if state["hash"] != report.backbone_sha256 or state["config"] != asdict(config) or state["batches"] != report.batches:
        raise ValueError(f"{path} is a checkpoint of another model or of other settings: remove it or give another path")
    load_router_state(model, state["routers"])
    distiller.load(state["distiller"])
    report.log, report.resumed_at = state["log"], distiller.batch
    logger.info("resuming distillation at batch %d from %s", distiller.batch, path)
