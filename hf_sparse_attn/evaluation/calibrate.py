"""Calibrating a model: the smallest budgets at which its heads keep a share of their softmax mass, checked on other
windows.

A tile's kept mass grows with its budget, so its 5th percentile over tiles reaches a share τ where the budget is the
95th percentile
of what the tiles need for τ: one pass finds the smallest budgets, without trying any. Few windows say little of that
percentile: its upper bound over resampled windows is taken.

With an average number of keys in place of τ the heads get what one threshold on the estimated mass keeps of each, see
`sharing`: no guarantee, but more of the dense predictions than a uniform budget at the same cost.
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
from ..models.calibration import Calibration, CalibrationError, made_with, remove_calibration, use_calibration
from ..models.convert import sparse_attention_as
from ..router.budget import make_plan
from ..router.head_budgets import MOST_SHARE
from ..system.progress import counted
from ..training.mass_threshold import run_sparse
from .calibration_observers import (
    FIRST_END,
    KeptObserver,
    Key,
    NeedObserver,
    PlantedObserver,
    TileFigures,
    length_buckets,
    visible_keys,
)
from .divergence import last_hidden, predictions
from .shared_threshold import shared_out
from .statistics import loss_above

PRESETS = {"fast": 0.95, "balanced": 0.98, "safe": 0.99}  # share of the softmax mass that 95 % of the tiles keep
LOW = 0.05  # of the tiles may keep less
CONFIDENCE = 0.9  # that other windows of the kind need no more
LEAST_TILES = 20  # of a bucket: fewer have no 5th percentile
LEAST_WINDOWS = 0.2  # windows times 1 - τ: the rarer what may be lost, the more text it takes to see it
TOLERANCE, LEAST_WITHIN = 0.01, 0.95  # on other windows this share of heads keeps τ less the tolerance
MOST_LOSS = 0.01  # of the dense log-loss that may be added
LEAST_RECALL = 0.9  # of planted links, by the heads that use them
STEPS = 20  # of the search for a uniform budget of the same cost
DIGITS = 4  # of the shares in the file


def calibrate(
    model: PreTrainedModel,
    windows: Sequence[Window],
    held_out: Sequence[Window],
    questions: Sequence[Question],
    *,
    mass: float | None = None,
    keys: int | None = None,
    preset: str | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Find budgets by layer, KV head and length bucket, use them, and measure what they do.

    Either such at which 95 % of the tiles keep ``mass``, or such that keep ``keys`` on average.

    Args:
        model: a sparse model without adapters, whose routers should be trained.
        windows: texts of one length on which the budgets are found.
        held_out: windows of other texts, of the same length, on which they are checked.
        questions: windows of that length with a planted link (see `ask`), of other texts than ``windows``.
        mass: τ in (0, 1]; at 1 every head is dense.
        keys: the average budget, forced keys included.
        preset: the name under which the result is known, if ``mass`` is that of one of `PRESETS`.

    Returns:
        The calibration, which the model then uses. `failures` says which checks it did not pass.

    Raises:
        CalibrationError: both or none of ``mass`` and ``keys`` is given, τ is impossible, there are too few windows for
            it, or they are too short to have something to select.
        ValueError: ``keys`` is no possible budget.
    """
    if (mass is None) == (keys is None):
        raise CalibrationError(
            f"mass is {mass} and keys is {keys}: give the share of the mass to keep, or the average number of keys"
        )
    _check(model, windows, held_out, mass)
    remove_calibration(model)
    length = windows[0].ids.shape[1]
    ends = length_buckets(length) if keys is None else (length,)
    on_step(f"reading {len(windows)} windows")
    if keys is None:
        assert mass is not None
        needs = _needs(model, windows, mass, ends)
        shares, tiles = _shares(needs.bound(1 - LOW, CONFIDENCE), _config(model), mass == 1), _by_bucket(needs)
    else:
        shares, tiles = _in_blocks(model, shared_out(model, windows, keys), length), []
    fit = {"windows": [w.document for w in windows], "tokens": length, "tiles": tiles, "keys": keys}
    calibration = Calibration(preset, mass, ends, shares, made_with(model), fit, {})
    use_calibration(model, calibration)
    try:
        fit["density"] = _kept(model, windows[:1], ends).density
        on_step(f"checking on {len(held_out)} other windows")
        verified = _verify(model, calibration, held_out, questions)
    except BaseException:
        remove_calibration(model)
        raise
    done = Calibration(preset, mass, ends, shares, calibration.made_with, fit, verified)
    use_calibration(model, done)
    return done


def failures(calibration: Calibration) -> list[str]:
    """What the figures of a calibration fail in, one sentence each; empty if it passed all checks."""
    reasons, verified = [], calibration.verified
    if verified["heads_within"] is not None and verified["heads_within"] < LEAST_WITHIN:
        reasons.append(
            f"only {verified['heads_within']:.1%} of the heads keep {calibration.mass} − {TOLERANCE} of their mass on "
            "other windows "
            f"({LEAST_WITHIN:.0%} must): calibrate on more windows, of the kind of text that the model is meant for"
        )
    if verified["added_loss"] > MOST_LOSS:
        reasons.append(
            f"the log-loss is {verified['added_loss']:.2%} above dense (at most {MOST_LOSS:.0%}): take a larger mass "
            "or more keys"
        )
    recall = verified["planted"]["recall"]
    if recall is not None and recall < LEAST_RECALL:
        reasons.append(
            f"only {recall:.1%} of the planted links are kept by the heads that use them ({LEAST_RECALL:.0%} must "
            "be): take a larger mass "
            "or more keys"
        )
    return reasons


def _config(model: PreTrainedModel) -> SparseAttentionConfig:
    return routers(model)[0].config


def _check(model: PreTrainedModel, windows: Sequence[Window], held_out: Sequence[Window], mass: float | None) -> None:
    if mass is not None and not 0 < mass <= 1:
        raise CalibrationError(
            f"the mass to keep is {mass!r}: must be in (0, 1], or one of the presets {', '.join(PRESETS)}"
        )
    lengths = {w.ids.shape[1] for w in (*windows, *held_out)}
    if len(lengths) != 1:
        raise CalibrationError(
            f"the windows have lengths {sorted(lengths)}: all must have the same, and there must be some of both kinds"
        )
    length, config = lengths.pop(), _config(model)
    least = max(config.dense_below, config.forced_keys + config.block_size, FIRST_END)
    if length < least:
        raise CalibrationError(
            f"the windows have {length} tokens, but nothing is cut of fewer than {least} (dense_below, forced keys, "
            "the first length "
            "bucket): give longer ones"
        )
    needed = math.ceil(round(LEAST_WINDOWS / (1 - mass), 6)) if mass is not None and mass < 1 else 1
    if len(windows) < needed:
        raise CalibrationError(f"{len(windows)} windows are too few for a mass of {mass}: give at least {needed}")
    if {w.document for w in windows} & {w.document for w in held_out}:
        raise CalibrationError("a window is in both sets: budgets are checked on other windows than they are found on")


def _needs(model: PreTrainedModel, windows: Sequence[Window], mass: float, ends: tuple[int, ...]) -> TileFigures:
    observer, forced = NeedObserver(mass, ends), _config(model).forced_keys
    every = {
        "density": MOST_SHARE,
        "min_keys": forced,
        "max_keys": None,
        "mass_threshold": None,
        "candidate_factor": 1 / MOST_SHARE,
    }
    with sparse_attention_as(model, **every):
        run_sparse(model, counted(batches(windows), "reading windows"), observer)
    few = {bucket: count for (_, bucket), count in observer.needs.counts().items() if count < LEAST_TILES}
    if few and mass < 1:
        bucket, count = next(iter(sorted(few.items())))
        raise CalibrationError(
            f"only {count} tiles up to {ends[bucket]} keys were read, at least {LEAST_TILES} are needed for a 5th "
            "percentile: "
            "give more windows"
        )
    return observer.needs


def _shares(
    bounds: Mapping[Key, Tensor], config: SparseAttentionConfig, all_dense: bool
) -> dict[int, tuple[tuple[float, ...], ...]]:
    """Shares by layer: a row for each bucket, in it one share for every KV head; 1 where a head is dense."""
    rows: dict[int, list[tuple[float, ...]]] = {}
    for layer, bucket in sorted(bounds):
        dense = all_dense or layer in config.dense_layers
        values = [_rounded_up(share) for share in bounds[layer, bucket].tolist()]
        rows.setdefault(layer, []).append(tuple(1.0 if dense or share > MOST_SHARE else share for share in values))
    assert len({len(row) for row in rows.values()}) == 1
    return {layer: tuple(row) for layer, row in rows.items()}


def _in_blocks(
    model: PreTrainedModel, keys: Mapping[int, Tensor], length: int
) -> dict[int, tuple[tuple[float, ...], ...]]:
    """Budgets in whole blocks by layer, one row each;
    a layer that runs dense selects nothing and may keep all ``length`` keys.
    """
    size = _config(model).block_size
    rows = {layer: [float(size * round(count / size)) for count in heads.tolist()] for layer, heads in keys.items()}
    return {
        router.layer: (tuple(rows.get(router.layer, [float(length)] * router.groups)),) for router in routers(model)
    }


def _rounded_up(share: float) -> float:
    return float(math.ceil(share * 10**DIGITS - 1e-6) / 10**DIGITS)


def _by_bucket(figures: TileFigures) -> list[int]:
    """Tiles of one head in each bucket."""
    return [
        count for (layer, _), count in sorted(figures.counts().items()) if layer == min(key[0] for key in figures.found)
    ]


def _kept(model: PreTrainedModel, windows: Sequence[Window], ends: tuple[int, ...]) -> KeptObserver:
    observer = KeptObserver(ends)
    run_sparse(model, batches(windows), observer)
    return observer


def _verify(
    model: PreTrainedModel, calibration: Calibration, held_out: Sequence[Window], questions: Sequence[Question]
) -> dict[str, Any]:
    kept = _kept(model, held_out, calibration.ends)
    low = kept.mass.quantile(LOW, "lower")
    values = torch.cat(list(low.values()))
    layer, bucket = min(low, key=lambda key: float(low[key].min()))
    every = [share for rows in calibration.shares.values() for row in rows for share in row]
    assert kept.grid is not None
    uniform = uniform_share if calibration.mass is not None else uniform_keys
    results = _losses(model, held_out, uniform_budget(_config(model), kept.grid, kept.density, uniform))
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


Uniform = Callable[[SparseAttentionConfig, float, int], dict[str, Any]]  # (config, share, keys of a call) -> settings


def uniform_budget(config: SparseAttentionConfig, grid: TileGrid, density: float, uniform: Uniform) -> dict[str, Any]:
    """Settings of a uniform budget under which a call keeps the share ``density`` of all visible keys, forced ones
    included.
    """
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        plan = make_plan(config.changed(**uniform(config, middle, grid.kv_len)), grid)
        visible = plan.last + 1 if grid.causal else torch.full_like(plan.last, grid.blocks)
        kept = grid.block_size * int((visible - plan.eligible + plan.free).sum())
        low, high = (middle, high) if kept < density * visible_keys(grid) else (low, middle)
    return uniform(config, high, grid.kv_len)


def uniform_share(config: SparseAttentionConfig, share: float, keys: int) -> dict[str, Any]:
    """Every tile may keep the same share of what it sees."""
    return {"density": share, "min_keys": config.forced_keys, "max_keys": None, "mass_threshold": None}


def uniform_keys(config: SparseAttentionConfig, share: float, keys: int) -> dict[str, Any]:
    """Every tile may keep as many keys."""
    most = max(config.forced_keys, math.ceil(share * keys))
    return fixed_budget(most)


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
