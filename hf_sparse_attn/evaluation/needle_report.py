"""What sparse attention finds of the facts that dense attention finds in a long text, as figures and one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..config import SparseAttentionConfig
from .statistics import loss_above

FOUND, LOST, NOT_JUDGED = "found", "lost", "dense misses it"


@dataclass(frozen=True)
class NeedleReading:
    """One fact, read under both: ``dense`` and ``sparse`` are log-losses of its answer, nats a token.

    ``depth`` is the share of the prompt before the fact, ``distance`` the tokens from its number to the answer. An
    answer is found if each of its tokens is the most likely one in its place.
    """

    length: int
    depth: float
    distance: int
    word: str
    number: str
    dense: float
    sparse: float
    found_dense: bool
    found_sparse: bool

    @property
    def outcome(self) -> str:
        """Sparse attention is judged by what dense attention finds, and by nothing else."""
        return NOT_JUDGED if not self.found_dense else FOUND if self.found_sparse else LOST


@dataclass(frozen=True)
class Remedy:
    """Settings with which the questions of lost facts were read again, after the prefill that there was, and how many
    were then found.
    """

    changes: Mapping[str, Any]
    found: int
    tried: int

    def __str__(self) -> str:
        return ", ".join(f"{name}={value:g}" for name, value in self.changes.items())


@dataclass(frozen=True)
class NeedleReport:
    """Readings of all facts; ``kept`` holds the mean keys that tiles of question and answer kept, by length (None: all
    that they see).
    """

    readings: tuple[NeedleReading, ...]
    kept: Mapping[int, float | None]
    settings: SparseAttentionConfig
    calibrated: bool = False
    remedies: Sequence[Remedy] = field(default_factory=tuple)

    @property
    def judged(self) -> list[NeedleReading]:
        """Those that dense attention finds."""
        return [reading for reading in self.readings if reading.found_dense]

    @property
    def lost(self) -> list[NeedleReading]:
        return [reading for reading in self.readings if reading.outcome == LOST]

    def loss_above_dense(self) -> dict[str, Any] | None:
        """How much the log-loss (nats a token) of what dense attention finds is above dense, with a 95 % interval over
        facts, paired, and their number n; None without any.
        """
        judged = self.judged
        if not judged:
            return None
        sparse, dense = (np.array([getattr(reading, name) for reading in judged]) for name in ("sparse", "dense"))
        return {**loss_above(sparse, dense), "n": len(judged)}

    def by_length(self) -> list[dict[str, Any]]:
        """For every length: facts, how many of them dense attention finds and sparse attention loses, mean losses."""
        rows = []
        for length in sorted(self.kept):
            here = [reading for reading in self.readings if reading.length == length]
            figures = {name: float(np.mean([getattr(r, name) for r in here])) for name in ("dense", "sparse")}
            counts = {"n": len(here), "found_dense": sum(r.found_dense for r in here)}
            lost = sum(r.outcome == LOST for r in here)
            rows.append({"length": length, "kept": self.kept[length], **counts, "lost": lost, **figures})
        return rows

    def verdict(self) -> str:
        """What came out, and what to do about it, in one line."""
        if not self.judged:
            return (
                f"Dense attention finds none of the {len(self.readings)} facts, so this model cannot be judged by "
                "them. Try shorter lengths or a longer-trained model, or measure its log-loss with hf-sparse-attn eval."
            )
        found = f"Dense attention finds {len(self.judged)} of {len(self.readings)} facts"
        above = self.loss_above_dense()
        assert above is not None
        cost = (
            f"log-loss {above['mean']:+.3f} [{above['low']:+.3f}, {above['high']:+.3f}] nats a token, n = {above['n']}"
        )
        if not self.lost:
            return f"{found}, and sparse attention all of these, with {self._budgets(self.kept)} ({cost})."
        lengths = sorted({reading.length for reading in self.lost})
        return (
            f"{found}; sparse attention loses {len(self.lost)} of these {len(self.judged)}, with "
            f"{self._budgets(lengths)} ({cost}). {self._advice()}"
        )

    def _budgets(self, lengths: Sequence[int] | Mapping[int, Any]) -> str:
        kept = {length: self.kept[length] for length in sorted(lengths)}
        return ", ".join(f"{'all' if keys is None else round(keys)} keys of {length}" for length, keys in kept.items())

    def _advice(self) -> str:
        helped = [remedy for remedy in sorted(self.remedies, key=lambda r: r.found, reverse=True) if remedy.found]
        steps = [f"set {remedy}, which finds {remedy.found} of the {remedy.tried} lost" for remedy in helped]
        if not self.settings.bookkeeping.trained:
            steps.insert(0, "train the routers (hf-sparse-attn distill)")
        elif not self.settings.retrieval_heads:
            steps.insert(0, "let hf_sparse_attn.find_retrieval_heads look for heads that need all candidates")
        if self.calibrated:
            steps.append("calibrate with a larger mass (hf-sparse-attn calibrate)")
        elif not helped:
            tried = ", nor with ".join(str(remedy) for remedy in self.remedies)
            alone = f"; the question alone was not answered with {tried}" if tried else ""
            steps.append(f"keep layers that do lookups dense (dense_layers){alone}")
        advice = ", or ".join(steps)
        return f"{advice[0].upper()}{advice[1:]}. Then run this again."

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "verdict": self.verdict(),
            "facts": len(self.readings),
            "found_dense": len(self.judged),
            "lost": len(self.lost),
            "loss_above_dense": self.loss_above_dense(),
            "by_length": self.by_length(),
            "remedies": [{**vars(remedy), "changes": dict(remedy.changes)} for remedy in self.remedies],
            "readings": [{**vars(reading), "outcome": reading.outcome} for reading in self.readings],
        }
