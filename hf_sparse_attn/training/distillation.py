"""Stage A: the routers learn the block mass of the model's own dense attention; the backbone is not touched.

One dense forward pass serves several optimiser steps: no gradient crosses layers, so every layer's router is trained
where its queries and keys appear, on fresh random tiles for every step, half of the steps on single queries. Several
processes take a batch each at a time, on the same tiles, and step with the mean of their gradients: their routers stay
alike.
"""

# Shapes: B batch, N tokens of a row.

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.model_inputs import NonFiniteError, model_inputs
from ..models.adapters import active_routers
from ..models.attach import no_routers, routers
from ..models.convert import mark_trained
from ..router.module import SparseRouter
from ..system.files import write_atomically
from ..system.progress import bar
from .config import DistillationConfig, without_target
from .distiller import Distiller
from .distributed import from_main, rank_and_size, same_everywhere
from .passes import backbone
from .retrieval_heads import RetrievalHead, name_retrieval_heads
from .router_state import backbone_hash, load_router_state, router_state
from .run_identity import batches_hash, differences, model_identity

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60  # a stopped run loses no more than this, or one batch


@dataclass
class DistillationReport:
    """What `distill` did: one row of ``log`` per batch, means over layers and steps."""

    batches: int = 0
    steps: int = 0
    resumed_at: int = 0
    backbone_sha256: str = ""
    log: list[dict[str, float]] = field(default_factory=list)
    # heads that got all blocks as candidates, see `find_retrieval_heads`; None: they were not looked for
    retrieval_heads: list[RetrievalHead] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def distill(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: DistillationConfig | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    on_batch: Callable[[dict[str, float]], None] | None = None,
) -> DistillationReport:
    """Train the routers of a sparse ``model`` on its own dense attention (stage A of the training).

    In several processes (``accelerate launch``, torchrun) every one calls this with the same model and all batches,
    takes its share of them, and ends with the same routers; only the main process reads and writes the checkpoint.

    Args:
        model: a sparse model; its backbone is not changed, which is checked by hash. Its routers end up trained and
            marked so in the config. Of a PeftModel, the routers of the active adapter are trained.
        batches: mappings with ``input_ids`` [B, N] (and ``attention_mask``, ``position_ids`` if any), N at least
            ``dense_below``; of a model of time series ``past_values`` [B, steps, channels]. Tensors, arrays or lists;
            rows of a dataset [N] serve as they are. On resume the batches already done are skipped.
        config: settings; the defaults suit models up to a few billion parameters.
        checkpoint: file to save progress in, at least every minute or batch, and to resume from if it exists. It is
            left in place at the end.
        progress: show a progress bar on the terminal.
        on_batch: called with the log row of every batch.

    Returns:
        A report with loss, kept mass and recovered share per batch.

    Raises:
        ValueError: no batches, batches too short to have anything to select or of another kind than the model takes, a
            checkpoint of another run (other texts, model, routers or settings), sharded routers, or padded or packed
            batches in several processes.
        NonFiniteError: queries, keys or a router's gradient are NaN or infinite. The routers keep the finite weights
            they had; they are not marked as trained, and the checkpoint is that of the last save.
        RuntimeError: the backbone changed.
    """
    config = config or DistillationConfig()
    layer_routers = active_routers(model)
    if not layer_routers:
        raise ValueError(no_routers(model))
    todo = model_inputs(model, batches)
    if not todo:
        raise ValueError("distill got no batches: give at least one document")
    _check_processes(layer_routers, todo)
    # a round is one batch for every process
    distiller = Distiller(layer_routers, config, -(-len(todo) // rank_and_size()[1]))
    report = DistillationReport(batches=len(todo), backbone_sha256=backbone_hash(model))
    # routers are frozen outside of training: what is thawed here freezes again at the end
    training, frozen = (
        model.training,
        [p for router in layer_routers for p in router.parameters() if not p.requires_grad],
    )
    model.eval()
    try:
        for weight in frozen:
            weight.requires_grad_()
        run = _Run(model, distiller, report, todo, config, None if checkpoint is None else Path(checkpoint))
        run.start_or_resume()
        for row in _train(model, todo, distiller, progress=progress):
            report.log.append(row)
            if on_batch is not None:
                on_batch(row)
            run.save_if_due()
    finally:
        model.train(training)
        for weight in frozen:
            weight.requires_grad_(False)
    # the teacher is the backbone's own attention, so it must be the same for the first batch and the last
    if backbone_hash(model) != report.backbone_sha256:
        raise RuntimeError("the backbone changed during distillation; this is a bug, please report it")
    for router in layer_routers:
        router.fresh = False
    mark_trained(model)
    report.retrieval_heads = name_retrieval_heads(model, todo[::-1], config.retrieval_windows, config.seed)
    report.steps = distiller.batch * config.steps_per_batch
    return report


def _check_processes(layer_routers: list[SparseRouter], batches: list[dict[str, Tensor]]) -> None:
    """Raise ValueError for what several processes cannot share."""
    if any(type(w) is not nn.Parameter or hasattr(w, "ds_id") for router in layer_routers for w in router.parameters()):
        raise ValueError(
            "distill needs whole routers, and these are sharded: call it before accelerator.prepare, in every process"
        )
    if rank_and_size()[1] == 1:
        return
    # gradients are averaged while layers run, with every document of a row: all processes must reach as many
    uneven = [
        batch
        for batch in batches
        if "position_ids" in batch or "cu_seq_lens_q" in batch or not bool(_mask(batch).all())
    ]
    if uneven:
        raise ValueError("distill in several processes takes batches of whole rows: no padding, one document in a row")


def _mask(batch: Mapping[str, Tensor]) -> Tensor:
    return batch["attention_mask"] if "attention_mask" in batch else torch.ones(1, dtype=torch.bool, device="cpu")


def _train(
    model: nn.Module, batches: list[dict[str, Tensor]], distiller: Distiller, *, progress: bool
) -> Iterator[dict[str, float]]:
    """A row for each round that is not done yet; a process without a batch in the last one repeats a batch that does
    not count.
    """
    rank, size = rank_and_size()
    with bar(progress and rank == 0) as shown:
        task = shown.add_task("distilling", total=distiller.rounds, completed=distiller.batch, info="")
        for mine in range(distiller.batch * size + rank, distiller.rounds * size, size):
            distiller.counts = mine < len(batches)
            row = _train_batch(model, batches, min(mine, len(batches) - 1), distiller)
            losses = f"KL {row['kl_coarse']:.3f} + {row['kl_fine']:.3f}"
            shown.update(task, advance=1, info=f"{losses}, recovered share {row['recovered_share']:.3f}")
            yield row


class _Run:
    """A distillation that can be stopped: how it starts, and what its checkpoint holds."""

    def __init__(
        self,
        model: nn.Module,
        distiller: Distiller,
        report: DistillationReport,
        batches: list[dict[str, Tensor]],
        config: DistillationConfig,
        path: Path | None,
    ) -> None:
        self.model, self.distiller, self.report, self.batches, self.path = model, distiller, report, batches, path
        self.save_every = config.save_every
        self.saved = time.monotonic()
        # of processes each takes a share of the texts, so their number is a part of it
        self.identity = {
            "the backbone's weights": report.backbone_sha256,
            **model_identity(model),
            "the texts (batches)": batches_hash(batches),
            # how heads are looked for afterwards does not change what is trained
            "distillation": {name: value for name, value in asdict(config).items() if name != "retrieval_windows"},
            "number of processes": rank_and_size()[1],
        }

    def start_or_resume(self) -> None:
        """Go on from the checkpoint if there is one; else let data start those low-rank stages 2 that nothing has
        taught.
        """
        layer_routers = active_routers(self.model)
        rank, _ = rank_and_size()
        # averaged gradients keep routers alike only if they start alike
        same_everywhere(weight for router in layer_routers for weight in router.weights)
        state = from_main(_read(self.path) if self.path is not None and self.path.exists() else None)
        if state is not None:
            self._resume(state)
        elif any(router.index_is_untrained for router in layer_routers):
            # a pass that trains nothing: it reads the queries and keys of one batch of each process
            self.distiller.start_index, self.distiller.counts = True, rank < len(self.batches)
            _forward(self.model, self.batches, min(rank, len(self.batches) - 1), self.distiller)
            self.distiller.start_index = False
            same_everywhere(weight for router in layer_routers for weight in router.weights)

    def _resume(self, state: dict[str, Any]) -> None:
        known = state.get("identity", {})
        known = {**known, "distillation": without_target(known.get("distillation", {}), "distillation")}
        if different := differences(known, self.identity):
            raise ValueError(
                f"{self.path} is a checkpoint of another run, different in {different}: remove it or give another path"
            )
        load_router_state(self.model, state["routers"])
        self.distiller.load(state["distiller"])
        self.report.log, self.report.resumed_at = state["log"], self.distiller.batch
        logger.info("resuming distillation at batch %d from %s", self.distiller.batch, self.path)

    def save_if_due(self) -> None:
        """Write the checkpoint after every ``save_every``-th batch, after a minute, and at the end;
        the main process does it.
        """
        done, now = self.distiller.batch, time.monotonic()
        due = done % self.save_every == 0 or done == self.distiller.rounds or now - self.saved >= CHECKPOINT_SECONDS
        if self.path is None or rank_and_size()[0] != 0 or not due:
            return
        state = {
            "routers": router_state(self.model),
            "distiller": self.distiller.state(),
            "log": self.report.log,
            "identity": self.identity,
        }
        write_atomically(self.path, lambda temporary: torch.save(state, temporary))
        self.saved = now


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")  # written where there was a GPU, perhaps
    except OSError:
        raise
    except Exception as error:  # of damaged files torch raises nearly anything
        raise ValueError(
            f"{path} is no checkpoint of a distillation, or a damaged one: remove it or give another path"
        ) from error
    if not isinstance(state, dict) or not {"routers", "distiller", "log"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of a distillation: remove it or give another path")
    return state


def _train_batch(model: nn.Module, batches: list[dict[str, Tensor]], at: int, distiller: Distiller) -> dict[str, float]:
    batch = batches[at]
    _forward(model, batches, at, distiller)
    if not distiller.losses:
        config = routers(model)[0].config
        raise ValueError(
            f"a batch of {tuple(next(iter(batch.values())).shape)} has nothing to select: documents must be longer "
            "than dense_below "
            f"({config.dense_below}) and than min_keys ({config.min_keys})"
        )
    distiller.batch += 1
    return distiller.row()


@torch.no_grad()
def _forward(model: nn.Module, batches: list[dict[str, Tensor]], at: int, distiller: Distiller) -> None:
    # no graph over the backbone: the distiller turns gradients on for one router at a time
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batches[at].items()}
    try:
        backbone(model)(**inputs, use_cache=False, sparse_call=distiller)
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{error}, in batch {at} (from 0) of {len(batches)}. Leave it out, or load the model in float32 if it "
            "overflows"
        ) from error
