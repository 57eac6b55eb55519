"""Training of a small model from scratch, on pieces of rows that grow longer; it is resumed where it was stopped."""

# Shapes: B rows of a step, N tokens of a row.

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as compute
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from ...config import IGNORE_INDEX
from ...system.files import read_json, replaced_folder, write_atomically, write_json
from ...system.locks import sole_use
from ...system.progress import bar
from ...training.run_identity import differences, rows_hash
from ..errors import PlantDataError
from ..representation.log_vocabulary import KEY
from .small_model import SmallModelConfig

WARM_UP = 0.1  # of the steps
SAVE_SECONDS = 60.0  # between checkpoints
CHECKPOINT, LOG, MODEL = "training.pt", "log.json", "model"


def train_small_model(
    model: PreTrainedModel,
    rows: Any,
    config: SmallModelConfig,
    *,
    folder: str | Path | None = None,
    progress: bool = True,
) -> list[float]:
    """Train all weights of ``model`` on random pieces of ``rows``, in place, deterministically by the seed.

    Args:
        model: of `new_model`.
        rows: a dataset or list of rows with ``input_ids`` [N] and ``labels`` [N], as `log_rows` makes them.
        config: the stages.
        folder: where the run is saved: at least every minute, and the model (``folder/model``) at the end. A run that
            was stopped continues from there with the same result; one that is finished is loaded.
        progress: show a progress bar on the terminal.

    Returns:
        The loss in nats a token of every step.

    Raises:
        PlantDataError: a row is shorter than the longest stage, or ``folder`` holds another run.
        NonFiniteLossError: the loss or a gradient is NaN or infinite; nothing is saved after that.
        FolderInUseError: another process trains in ``folder``.
    """
    pieces = _Pieces(rows, config)
    if folder is None:
        return _Run(model, pieces, config, None).train(progress)
    with sole_use(folder):
        return _Run(model, pieces, config, Path(folder)).train(progress)


def row_lengths(rows: Any) -> NDArray[np.int64]:
    """Tokens of each row of a dataset or list, int64 [rows]."""
    if hasattr(rows, "with_format"):
        column = rows.with_format("arrow")[:].column("input_ids")
        return np.asarray(compute.list_value_length(column).to_numpy(), np.int64)
    return np.array([len(row["input_ids"]) for row in rows], np.int64)


class _Pieces:
    """Batches of random pieces of rows: (ids, labels), both int64 [B, N]."""

    def __init__(self, rows: Any, config: SmallModelConfig) -> None:
        self.rows, self.config = rows, config
        if not len(rows):
            raise PlantDataError("there is no row to learn from", ["make rows: log_rows(…)", "take a longer record"])
        shortest = int(row_lengths(rows).min())
        if shortest < config.longest:
            raise PlantDataError(
                f"a row has {shortest} tokens, the longest stage asks for {config.longest}",
                ["make longer rows", "take shorter stages: SmallModelConfig.up_to", "leave the asset out"],
            )

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        stage, generator = self.config.stage_at(step), np.random.default_rng([self.config.seed, step])
        ids, labels = list[Any](), list[Any]()
        for _ in range(stage.batch):
            row = self.rows[int(generator.integers(len(self.rows)))]
            start = int(generator.integers(len(row["input_ids"]) - stage.length + 1))
            for column, into in (("input_ids", ids), ("labels", labels)):
                into.append(np.asarray(row[column], np.int64)[start : start + stage.length])
        return torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(labels))


class _Run:
    """A training that can be stopped."""

    def __init__(self, model: PreTrainedModel, pieces: _Pieces, config: SmallModelConfig, folder: Path | None) -> None:
        self.model, self.pieces, self.config, self.folder = model, pieces, config, folder
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, config.lr, total_steps=config.steps, pct_start=WARM_UP
        )
        self.losses: list[float] = []
        self.saved = time.monotonic()
        shape = model.config.to_dict()
        self.identity = json.loads(
            json.dumps(
                {
                    "settings": asdict(config),
                    "vocabulary": {"size": shape["vocab_size"], KEY: shape.get(KEY)},
                    "the rows": "" if folder is None else rows_hash(pieces.rows),
                }
            )
        )

    def train(self, progress: bool) -> list[float]:
        if self._is_finished():
            return self.losses
        self.model.train()
        with bar(progress) as shown:
            task = shown.add_task("learning the logs", total=self.config.steps, completed=len(self.losses), info="")
            for step in range(len(self.losses), self.config.steps):
                self.losses.append(self._step(step))
                self._save_if_due()
                length = self.config.stage_at(step).length
                shown.update(task, advance=1, info=f"{length} tokens, loss {self.losses[-1]:.3f}")
        self.model.eval()
        if self.folder is not None:
            with replaced_folder(self.folder / MODEL, valid="config.json") as new:
                self.model.save_pretrained(new)
            write_json(self.folder / LOG, {"identity": self.identity, "losses": self.losses})
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
        return self.losses

    def _step(self, step: int) -> float:
        ids, labels = (part.to(self.model.device) for part in self.pieces.batch(step))
        # a hidden state predicts the next token; logits of labelled tokens only
        hidden, target = self.model.base_model(ids, use_cache=False).last_hidden_state[:, :-1], labels[:, 1:]
        labelled = target != IGNORE_INDEX
        loss = F.cross_entropy(self.model.get_output_embeddings()(hidden[labelled]).float(), target[labelled])
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            from ...training.trainer import NonFiniteLossError  # Trainer is heavy, and only its error is needed

            raise NonFiniteLossError(
                f"the loss is {float(loss.detach())} and the gradient's norm {float(norm)} in step {step + 1} of "
                f"{self.config.steps}: lower lr ({self.config.lr:g})"
            )
        self.optimizer.step()
        self.schedule.step()
        return float(loss.detach())

    def _is_finished(self) -> bool:
        """Whether the folder holds the whole run, which is loaded then; of a part of one the state is loaded."""
        if self.folder is None:
            return False
        if (self.folder / LOG).exists():
            known = read_json(self.folder / LOG)
            self._refuse_another(known["identity"])
            self.model.load_state_dict(LlamaForCausalLM.from_pretrained(self.folder / MODEL).state_dict())
            self.model.eval()
            self.losses = known["losses"]
            return True
        if (self.folder / CHECKPOINT).exists():
            state = torch.load(self.folder / CHECKPOINT, weights_only=True, map_location="cpu")
            self._refuse_another(state["identity"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.losses = state["losses"]
        return False

    def _refuse_another(self, known: dict[str, Any]) -> None:
        if different := differences(known, self.identity):
            raise PlantDataError(
                f"holds another run, different in {different}",
                ["give another folder", "remove the folder", "take the settings and rows that it was begun with"],
                file=self.folder,
            )

    def _save_if_due(self) -> None:
        if self.folder is None or time.monotonic() - self.saved < SAVE_SECONDS:
            return
        state = {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "losses": self.losses,
        }
        write_atomically(self.folder / CHECKPOINT, lambda temporary: torch.save(state, temporary))
        self.saved = time.monotonic()
