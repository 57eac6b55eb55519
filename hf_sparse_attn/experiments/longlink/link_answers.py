"""How well a model answers the questions of a LongLink set, by distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ...attention.layer import SparseCall
from .ceilings import ceiling, chance, normalised
from .planting import Planted

TOKENS_AT_ONCE = 16384  # of one forward pass: bounds memory


def sequences_at_once(planted: Planted) -> int:
    """How many of the set's sequences one forward pass reads."""
    return max(1, TOKENS_AT_ONCE // planted.config.length)


@torch.no_grad()
def predicted(model: PreTrainedModel, planted: Planted, call: SparseCall) -> np.ndarray:
    """The token that ``model`` finds most likely behind every link's question, int64 [links]."""
    ids, rows = torch.from_numpy(planted.input_ids), sequences_at_once(planted)
    found: list[torch.Tensor] = []
    by_sequence = [[link.effect for link in planted.links if link.sequence == at] for at in range(len(ids))]
    for start in range(0, len(ids), rows):
        hidden = model.base_model(ids[start : start + rows].to(model.device), use_cache=False, sparse_call=call).last_hidden_state
        for row, effects in zip(hidden, by_sequence[start : start + rows], strict=True):
            found.append(model.get_output_embeddings()(row[effects]).argmax(-1).cpu())
    tokens: np.ndarray = torch.cat(found).numpy()
    return tokens


def right(planted: Planted, tokens: np.ndarray) -> np.ndarray:
    """Which links were answered right: boolean [links]."""
    hits: np.ndarray = np.array([planted.config.tokens.value(link.answer) for link in planted.links]) == tokens
    return hits


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers with its standard error over links, and between guessing and the ceiling (None where these are one)."""

    accuracy: float
    error: float
    normalised: float | None
    n: int


def accuracy(planted: Planted, hits: np.ndarray) -> Accuracy:
    """Of some links of a set; ``hits`` boolean."""
    share, config = float(hits.mean()), planted.config
    scale = None if ceiling(config) == chance(config) else normalised(share, config)
    return Accuracy(share, math.sqrt(share * (1 - share) / len(hits)), scale, len(hits))


def by_distance(planted: Planted, hits: np.ndarray) -> list[dict[str, Any]]:
    """Accuracy of the links in each doubling of the distance."""
    octave = np.array([int(math.log2(link.distance)) for link in planted.links])
    rows = []
    for at in sorted(set(octave.tolist())):
        found = accuracy(planted, hits[octave == at])
        rows.append({"from": 1 << at, "to": 2 << at, **found.__dict__})
    return rows


def reach(rows: Sequence[dict[str, Any]], least: float) -> int | None:
    """D50 or D90: the distance up to which the normalised accuracy is at least ``least`` in every octave; None if in none."""
    far = None
    for row in rows:
        if row["normalised"] is None or row["normalised"] < least:
            break
        far = row["to"]
    return far


def pairs_told_apart(planted: Planted, hits: np.ndarray) -> float:
    """Of a counterfactual set the share of pairs of which both changed links were answered right."""
    first = {link.sequence: hit for link, hit in reversed(list(zip(planted.links, hits, strict=True)))}
    return float(np.mean([first[at] and first[at + 1] for at in range(0, planted.config.sequences, 2)]))
