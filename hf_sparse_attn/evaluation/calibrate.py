"""Calibrating a model: the smallest budgets at which its heads keep a share of their softmax mass, checked on other
windows.

A tile's kept mass grows with its budget, so its 5th percentile over tiles reaches a share τ where the budget is the
95th percentile
of what the tiles need for τ: one pass finds the smallest budgets, without trying any. Few windows say little of that
percentile: its upper bound over resampled windows is taken.

With an average number of keys in place of τ the heads get what one threshold on the estimated mass keeps of each, see
`shared_threshold`: no guarantee, but more of the dense predictions than a uniform budget at the same cost.
"""

# Letters: τ share of the softmax mass that a tile must keep, G KV heads of a layer.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from ..config import SparseAttentionConfig
from ..data.questions import Question
from ..data.windows import Window, batches
from ..models.attach import routers
from ..models.calibration import Calibration, CalibrationError, made_with, remove_calibration, use_calibration
from ..models.convert import sparse_attention_as
from ..router.head_budgets import MOST_SHARE
from ..system.progress import counted
from ..training.passes import run_sparse
from ..training.retrieval_heads import name_retrieval_heads
from .calibration_check import LOW, TOLERANCE, read_kept, settings_of, verify
from .calibration_observers import (
    FIRST_END,
    Key,
    NeedObserver,
    TileFigures,
    length_buckets,
)
from .shared_threshold import shared_out

PRESETS = {"fast": 0.95, "balanced": 0.98, "safe": 0.99}  # share of the softmax mass that 95 % of the tiles keep
CONFIDENCE = 0.9  # that other windows of the kind need no more
LEAST_TILES = 20  # of a bucket: fewer have no 5th percentile
LEAST_WINDOWS = 0.2  # windows times 1 - τ: the rarer what may be lost, the more text it takes to see it
LEAST_WITHIN = 0.95  # on other windows this share of heads keeps τ less the tolerance
MOST_LOSS = 0.01  # of the dense log-loss that may be added
LEAST_RECALL = 0.9  # of planted links, by the heads that use them
DIGITS = 4  # of the shares in the file
RETRIEVAL_WINDOWS = 3  # in which retrieval heads are looked for


# share of a head in a bucket = upper 90 % bound, over other windows, of the 95th percentile of its tiles' needs
# need = least share of its visible keys with which a tile keeps τ, in the router's order: see `needed_share`
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

    Either such at which 95 % of the tiles keep ``mass``, or such that keep ``keys`` on average. Where the settings name
    no retrieval heads they are looked for first, and set: see `find_retrieval_heads`.

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
    on_step("looking for retrieval heads")
    retrieval = name_retrieval_heads(model, batches(windows), RETRIEVAL_WINDOWS)
    length = windows[0].ids.shape[1]
    # an average number of keys holds for all lengths: one bucket
    ends = length_buckets(length) if keys is None else (length,)
    on_step(f"reading {len(windows)} windows")
    if keys is None:
        assert mass is not None
        needs = _needs(model, windows, mass, ends)
        shares, tiles = _shares(needs.bound(1 - LOW, CONFIDENCE), settings_of(model), mass == 1), _by_bucket(needs)
    else:
        shares, tiles = _in_blocks(model, shared_out(model, windows, keys), length), []
    fit = {"windows": [w.document for w in windows], "tokens": length, "tiles": tiles, "keys": keys}
    fit["retrieval_heads"] = None if retrieval is None else [head.to_dict() for head in retrieval]
    calibration = Calibration(preset, mass, ends, shares, settings_of(model).retrieval_heads, made_with(model), fit, {})
    # checked as it will run; a check that breaks off leaves the model without a calibration
    use_calibration(model, calibration)
    try:
        fit["density"] = read_kept(model, windows[:1], ends).density
        on_step(f"checking on {len(held_out)} other windows")
        verified = verify(model, calibration, held_out, questions)
    except BaseException:
        remove_calibration(model)
        raise
    done = replace(calibration, verified=verified)
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
    # below dense_below, or with forced keys alone, nothing is cut; the first length bucket ends at FIRST_END
    length, config = lengths.pop(), settings_of(model)
    least = max(config.dense_below, config.forced_keys + config.block_size, FIRST_END)
    if length < least:
        raise CalibrationError(
            f"the windows have {length} tokens, but nothing is cut of fewer than {least} (dense_below, forced keys, "
            "the first length "
            "bucket): give longer ones"
        )
    # windows ≥ 0.2 / (1 − τ); rounded first, since 1 − τ is not exact in binary and ceil would add a window
    needed = math.ceil(round(LEAST_WINDOWS / (1 - mass), 6)) if mass is not None and mass < 1 else 1
    if len(windows) < needed:
        raise CalibrationError(f"{len(windows)} windows are too few for a mass of {mass}: give at least {needed}")
    if {w.document for w in windows} & {w.document for w in held_out}:
        raise CalibrationError("a window is in both sets: budgets are checked on other windows than they are found on")


def _needs(model: PreTrainedModel, windows: Sequence[Window], mass: float, ends: tuple[int, ...]) -> TileFigures:
    observer, forced = NeedObserver(mass, ends), settings_of(model).forced_keys
    # density · candidate_factor = 1: stage 1 passes every block on, so the order is stage 2's alone
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
    # sorted by layer and bucket, so that rows come in the order of `ends`
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
    # kept keys are means over tiles, and attention reads whole blocks
    size = settings_of(model).block_size
    rows = {layer: [float(size * round(count / size)) for count in heads.tolist()] for layer, heads in keys.items()}
    return {
        router.layer: (tuple(rows.get(router.layer, [float(length)] * router.groups)),) for router in routers(model)
    }


# up, so that less than what was found is never kept; 1e-6 forgives what floats add to a share of four digits
def _rounded_up(share: float) -> float:
    return float(math.ceil(share * 10**DIGITS - 1e-6) / 10**DIGITS)


def _by_bucket(figures: TileFigures) -> list[int]:
    """Tiles of one head in each bucket."""
    return [
        count for (layer, _), count in sorted(figures.counts().items()) if layer == min(key[0] for key in figures.found)
    ]
