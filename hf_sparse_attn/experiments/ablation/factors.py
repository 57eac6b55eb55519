"""The factors of an ablation and their levels: each changes one thing of the default."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...config import FIXED_FIELDS, SparseAttentionConfig
from ..retired import retired
from ..scores.budget_allocation import BY_HEAD, THRESHOLD

BASELINE = "default"
JOINT_KL = "KL in the joint stage"  # its levels are trained models, see `tasks/ablation_run`
ALL_CANDIDATES = 1e6  # times the budget: stage 1 passes everything on


@dataclass(frozen=True)
class Level:
    """One value of a factor: what it changes of the default settings, routers, training or selection.

    ``sparse`` holds fields of `SparseAttentionConfig`; ``training`` multiplies the batches
    of the distillation, ``keys`` the budget; ``selection`` is a selection in place of the router's own. ``full``: of
    the full grid only.
    """

    factor: str
    name: str
    sparse: Mapping[str, Any] = field(default_factory=dict)
    training: float = 1.0
    keys: float = 1.0
    selection: str | None = None
    full: bool = False

    @property
    def retrains(self) -> bool:
        """The routers are distilled anew for it."""
        return self.training != 1 or bool(set(self.sparse) & set(FIXED_FIELDS))

    @property
    def slug(self) -> str:
        """Its name in file names."""
        return re.sub(r"[^a-z0-9.]+", "-", f"{self.factor} {self.name}".lower()).strip("-")


def _values(factor: str, name: str, values: Sequence[Any], full: Sequence[Any] = ()) -> list[Level]:
    """Levels that set the config field ``name``."""
    return [Level(factor, str(value), {name: value}, full=value in full) for value in (*values, *full)]


LEVELS = (
    Level("keys kept", "an eighth more", keys=1.125),  # what time buys there is what other factors must beat
    Level("keys kept", "a quarter more", keys=1.25),
    Level("stages", "stage 1 alone", selection="stage 1 alone"),
    Level("stages", "stage 2 alone", {"candidate_factor": ALL_CANDIDATES}),
    Level("stages", "untrained", selection="untrained"),
    *_values("candidates passed, times the budget", "candidate_factor", (1.5, 2.0, 4.0), full=(6.0,)),
    *_values("rank of stage 2", "index_dim", (16, 32), full=(48,)),
    *_values("sampled queries of stage 2", "query_samples", (8, 16, 64)),
    *_values("features of stage 1", "router_dim", (64,), full=(256,)),
    *_values("block size", "block_size", (32, 64), full=(128,)),
    *_values("query tile", "query_tile", (16, 32, 128)),
    # as many scores of stage 2 for every token
    Level("query tile with sampled queries", "32 with 16", {"query_tile": 32, "query_samples": 16}),
    Level("query tile with sampled queries", "16 with 8", {"query_tile": 16, "query_samples": 8}),
    Level("distillation batches", "a quarter", training=0.25),
    Level("distillation batches", "half", training=0.5),
    Level("distillation batches", "double", training=2.0),
    Level("budget", "by threshold", selection=THRESHOLD),
    Level("budget", "by head", selection=BY_HEAD),
    Level("dense layers", "the first", {"dense_layers": (0,)}),
    Level("dense layers", "the first three", {"dense_layers": (0, 1, 2)}),
    *_values("sink", "sink", (0, 64, 256)),
    Level("sink with local", "64 with 128", {"sink": 64, "local": 128}),
    *_values("local", "local", (0, 32, 128), full=(256,)),
)
FACTORS = (*dict.fromkeys(level.factor for level in LEVELS), JOINT_KL)
SELECTIONS_OF_STAGES = ("stage 1 alone", "untrained")
_DEFAULTS = {
    "keys kept": "as given",
    "stages": "both, trained",
    "query tile with sampled queries": "64 with 32",
    "distillation batches": "whole",
    "budget": "uniform",
    "dense layers": "none",
    "sink with local": "16 with 64",
}


def levels(factors: Sequence[str] = (), *, full: bool = False) -> list[Level]:
    """The levels of these factors (all if none is named), with ``full`` those of the full grid.

    Raises:
        ValueError: an unknown factor.
    """
    unknown = sorted(set(factors) - set(FACTORS))
    if unknown:
        named, known = ", ".join(map(repr, unknown)), ", ".join(FACTORS)
        raise ValueError(f"ablate.factors names {named}; known: {known}{retired(unknown, 'ablate.factors')}")
    return [level for level in LEVELS if (not factors or level.factor in factors) and (full or not level.full)]


def default_of(factor: str, config: SparseAttentionConfig, head_dim: int) -> str:
    """What the default is in the terms of a factor."""
    if factor in _DEFAULTS:
        return _DEFAULTS[factor]
    # the field that the factor's levels set
    name = next(iter(next(level for level in LEVELS if level.factor == factor).sparse))
    dims = {"router_dim": config.resolved_router_dim, "index_dim": config.resolved_index_dim}
    return str(dims[name](head_dim) if name in dims else getattr(config, name))
