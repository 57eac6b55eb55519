"""A causal model of the Hub learns a plant's events: routers are distilled, then LoRA and new embeddings trained."""

# Shapes: N tokens of a row.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as compute
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...models.attach import no_routers, routers
from ...system.files import replaced_folder
from ...training.config import AdaptationConfig, DistillationConfig
from ...training.distillation import DistillationReport, distill
from ...training.lora import adapt
from ..errors import PlantDataError
from ..representation.log_vocabulary import LogVocabulary

ROUTERS, ADAPTER = "routers.pt", "adapter"


@dataclass(frozen=True)
class EventTraining:
    """How a model learns the next event.

    Attributes:
        distillation: of the routers, before anything else is trained.
        distilled: rows that routers are distilled on, the same number from each part of the record.
        adaptation: of LoRA, routers and new embeddings together.
        steps: optimiser steps of it; None: each row once.
    """

    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    distilled: int = 32
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    steps: int | None = None


@dataclass(frozen=True)
class EventModel:
    """What training gives.

    Attributes:
        model: the `peft.PeftModel`; ``merge_and_unload()`` makes a plain sparse model of it.
        distillation: the report of the routers.
        log: one row a step.
    """

    model: Any
    distillation: DistillationReport
    log: list[dict[str, Any]]


def learn_events(
    model: PreTrainedModel,
    rows: Any,
    new_tokens: Sequence[int],
    training: EventTraining | None = None,
    *,
    folder: str | Path | None = None,
    progress: bool = True,
) -> EventModel:
    """Train a sparse ``model`` on the next token of ``rows``.

    The routers learn from the model's dense attention, then all is trained by `training.lora.adapt`; both go on where a
    run in ``folder`` was stopped, and leave what is there as it was where they fail.

    Args:
        model: a sparse causal language model, extended by `token_embeddings.extend_model`.
        rows: the training part of `log_rows`, rows of one length.
        new_tokens: what `extend_model` returned: ids whose embeddings are trained as well.
        training: settings.
        folder: for checkpoints.
        progress: show progress bars on the terminal.

    Raises:
        PlantDataError: the model has no routers, or there are no rows, or rows of several lengths.
        ValueError: ``folder`` holds another run, or rows are shorter than what routers select from.
        NonFiniteLossError: a loss that is NaN or infinite; the state before it was saved.
        NonFiniteError: the same during distillation.
    """
    training = training or EventTraining()
    if not routers(model):
        raise PlantDataError(no_routers(model), ["sparsify(model, {…})", "load it with sparse_attention={…}"])
    rows = token_rows(rows)
    seen = np.unique(np.linspace(0, len(rows) - 1, min(training.distilled, len(rows))).round().astype(int))
    place = None if folder is None else Path(folder)
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    report = distill(
        model,
        [{"input_ids": rows[int(at)]["input_ids"]} for at in seen],
        training.distillation,
        checkpoint=None if place is None else place / ROUTERS,
        progress=progress,
    )
    trained, log = adapt(
        model,
        rows,
        training.adaptation,
        steps=training.steps,
        folder=None if place is None else place / ADAPTER,
        new_tokens=new_tokens,
        progress=progress,
    )
    return EventModel(trained, report, log)


def token_rows(rows: Any) -> Any:
    """Rows of `log_rows` as a Trainer takes them: ``input_ids`` and ``labels`` alone, as tensors.

    Raises:
        PlantDataError: there is no row, or the rows have several lengths.
    """
    if not len(rows):
        raise PlantDataError("there is no row to learn from", ["make rows: log_rows(…)", "take a longer record"])
    lengths = np.unique(row_lengths(rows))
    if len(lengths) > 1:
        raise PlantDataError(
            f"rows of {lengths.min()} to {lengths.max()} tokens do not make batches",
            ["take shorter rows: log_rows(…, length)", "leave out the asset with less than a row"],
        )
    return rows.select_columns(["input_ids", "labels"]).with_format("torch") if hasattr(rows, "with_format") else rows


def save_events(
    trained: EventModel, tokenizer: PreTrainedTokenizerBase, vocabulary: LogVocabulary, folder: str | Path
) -> PreTrainedModel:
    """Merge LoRA into the model and save it with its tokenizer and vocabulary, all of them or nothing; returns it.

    Raises:
        OSError: nothing can be written there.
    """
    merged: PreTrainedModel = trained.model.merge_and_unload()
    with replaced_folder(folder, valid="config.json") as new:
        merged.save_pretrained(new)
        tokenizer.save_pretrained(new)
        vocabulary.save(new)
    return merged


def row_lengths(rows: Any) -> NDArray[np.int64]:
    """Tokens of each row of a dataset or list, int64 [rows]."""
    if hasattr(rows, "with_format"):
        column = rows.with_format("arrow")[:].column("input_ids")
        return np.asarray(compute.list_value_length(column).to_numpy(), np.int64)
    return np.array([len(row["input_ids"]) for row in rows], np.int64)
