"""Checking a calibration on other windows.

Kept mass, log-loss beside a uniform budget of the same cost, and planted links.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from hf_sparse_attn_kernels import TileGrid
from torch import Tensor
from transformers import PreTrainedModel

from ..attention.call import SparseCall
from ..config import SparseAttentionConfig, fixed_budget
from ..data.questions import ANSWERED, Question
from ..data.windows import Window, batches
from ..models.attach import routers
from ..models.calibration import Calibration
from ..models.convert import sparse_attention_as
from ..router.budget import make_plan
from ..system.progress import counted
from ..training.passes import run_sparse
from .calibration_observers import (
    KeptObserver,
    PlantedObserver,
    visible_keys,
)
from .divergence import last_hidden, predictions
from .statistics import loss_above

LOW = 0.05  # of the tiles may keep less
TOLERANCE = 0.01  # of the share of the mass, on other windows
STEPS = 20  # of the search for a uniform budget of the same cost
Uniform = Callable[[SparseAttentionConfig, float, int], dict[str, Any]]  # (config, share, keys of a call) -> settings


def settings_of(model: PreTrainedModel) -> SparseAttentionConfig:
    """The settings of a model's routers."""
    return routers(model)[0].config


def read_kept(model: PreTrainedModel, windows: Sequence[Window], ends: tuple[int, ...]) -> KeptObserver:
    observer = KeptObserver(ends)
    run_sparse(model, batches(windows), observer)
    return observer


def verify(
    model: PreTrainedModel, calibration: Calibration, held_out: Sequence[Window], questions: Sequence[Question]
) -> dict[str, Any]:
    kept = read_kept(model, held_out, calibration.ends)
    # an order statistic of the tiles of every KV head: no value between two tiles
    low = kept.mass.quantile(LOW, "lower")
    values = torch.cat(list(low.values()))
    layer, bucket = min(low, key=lambda key: float(low[key].min()))
    every = [share for rows in calibration.shares.values() for row in rows for share in row]
    assert kept.grid is not None
    # the kind of budget that a user would set instead: a share of the keys, or a number of them
    uniform = uniform_share if calibration.mass is not None else uniform_keys
    # kept mass is read on dense passes, losses on passes that run sparse
    results = _losses(model, held_out, uniform_budget(settings_of(model), kept.grid, kept.density, uniform))
    within = None if calibration.mass is None else float((values >= calibration.mass - TOLERANCE).float().mean())
    return {
        "windows": [w.document for w in held_out],
        "heads_within": within,
        "worst": {
            "layer": layer,
            "head": int(low[layer, bucket].argmin()),
            "keys": calibration.ends[bucket],
            "mass": float(values.min()),
        },
        "density": kept.density,
        "dense_heads": sum(share == 1 for share in every) / len(every),  # budgets in keys have none
        "planted": _planted(model, questions),
        **results,
    }


# Bisection: kept keys rise with the share. 20 halvings leave it uncertain by 1e-6.
def uniform_budget(config: SparseAttentionConfig, grid: TileGrid, density: float, uniform: Uniform) -> dict[str, Any]:
    """Settings of a uniform budget under which a call keeps the share ``density`` of all visible keys, forced ones
    included.
    """
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        plan = make_plan(config.changed(**uniform(config, middle, grid.kv_len)), grid)
        visible = plan.last + 1 if grid.causal else torch.full_like(plan.last, grid.blocks)
        # visible blocks that are not eligible are forced; of the eligible ones the free ones are kept
        kept = grid.block_size * int((visible - plan.eligible + plan.free).sum())
        low, high = (middle, high) if kept < density * visible_keys(grid) else (low, middle)
    return uniform(config, high, grid.kv_len)


def uniform_share(config: SparseAttentionConfig, share: float, keys: int) -> dict[str, Any]:
    """Every tile may keep the same share of what it sees."""
    return {"density": share, "min_keys": config.forced_keys, "max_keys": None, "mass_threshold": None}


def uniform_keys(config: SparseAttentionConfig, share: float, keys: int) -> dict[str, Any]:
    """Every tile may keep as many keys."""
    # a budget below the forced keys is refused, and they are kept anyway
    most = max(config.forced_keys, math.ceil(share * keys))
    return fixed_budget(most)


# added_loss = mean loss calibrated / mean loss dense − 1; intervals are over windows, paired
def _losses(model: PreTrainedModel, windows: Sequence[Window], uniform: Mapping[str, Any]) -> dict[str, Any]:
    """Log-loss and KL against dense of the calibrated budgets and of a uniform one, over windows, and how the two
    differ.
    """
    pairs: dict[str, list[tuple[float, float]]] = {"dense": [], "calibrated": [], "uniform": []}
    for window in counted(windows, "checking on other windows"):
        reader = _Passes(model, window)
        pairs["dense"].append(reader.read(SparseCall(dense=True)))
        pairs["calibrated"].append(reader.read(SparseCall()))
        with sparse_attention_as(model, **uniform):
            pairs["uniform"].append(reader.read(SparseCall()))
    losses = {name: np.array([loss for loss, _ in rows]) for name, rows in pairs.items()}
    kl = {name: np.array([kl for _, kl in rows]) for name, rows in pairs.items()}
    return {
        "losses": {
            name: {"loss": float(losses[name].mean()), "kl": float(kl[name].mean()), "n": len(windows)}
            for name in pairs
        },
        "added_loss": float(losses["calibrated"].mean() / losses["dense"].mean() - 1),
        "uniform": dict(uniform),
        "below_uniform": {
            "loss": loss_above(losses["uniform"], losses["calibrated"]),
            "kl": loss_above(kl["uniform"], kl["calibrated"]),
        },
    }


class _Passes:
    """Passes over one window, the dense one first."""

    def __init__(self, model: PreTrainedModel, window: Window) -> None:
        self.model, self.ids = model, window.ids
        self.states: list[Tensor] = []

    def read(self, call: SparseCall) -> tuple[float, float]:
        """(log-loss of the last half in nats a token, KL against the first pass)."""
        self.states.append(last_hidden(self.model, self.ids, call))
        prediction = predictions(self.model, self.ids, self.states[-1], self.states[0], whole=False)
        return prediction.loss, prediction.kl


def _planted(model: PreTrainedModel, questions: Sequence[Question]) -> dict[str, Any]:
    used = kept = 0
    chance = 0.0
    for question in counted(questions, "planted links"):
        answer = len(question.input_ids) - ANSWERED  # its tokens are predicted from the one before them on
        source = range(answer - question.distance, answer - question.distance + ANSWERED)
        observer = PlantedObserver(source, answer - 1)
        run_sparse(model, [{"input_ids": question.input_ids[None]}], observer)
        used, kept, chance = used + observer.used, kept + observer.kept, chance + observer.chance
    figures = {"questions": len(questions), "n": used}
    return {**figures, "recall": kept / used if used else None, "chance": chance / used if used else None}
