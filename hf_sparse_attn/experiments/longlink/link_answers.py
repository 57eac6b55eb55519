"""How well a model answers the questions of a LongLink set, by distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ...attention.call import SparseCall
from ...evaluation.metrics import AnswerMatch
from .ceilings import ceiling, chance
from .link_metrics import NormalisedAccuracy
from .planting import Planted

TOKENS_AT_ONCE = 16384  # of one forward pass: bounds memory


def sequences_at_once(planted: Planted) -> int:
    """How many of the set's sequences one forward pass reads."""
    return max(1, TOKENS_AT_ONCE // planted.config.length)


@torch.no_grad()
def predicted(model: PreTrainedModel, planted: Planted, call: SparseCall) -> np.ndarray:
    """The token that ``model`` finds most likely behind every link's question, int64 [links]."""
    ids, rows = torch.from_numpy(planted.input_ids), sequences_at_once(planted)
    predictions: list[torch.Tensor] = []
    by_sequence = [[link.effect for link in planted.links if link.sequence == at] for at in range(len(ids))]
    for start in range(0, len(ids), rows):
        hidden = model.base_model(
            ids[start : start + rows].to(model.device), use_cache=False, sparse_call=call
        ).last_hidden_state
        for row, effects in zip(hidden, by_sequence[start : start + rows], strict=True):
            # the answer is the token behind the question: the question's hidden state predicts it
            predictions.append(model.get_output_embeddings()(row[effects]).argmax(-1).cpu())
    tokens: np.ndarray = torch.cat(predictions).numpy()
    return tokens


def right_tokens(planted: Planted) -> np.ndarray:
    """The token that is the right answer of every link, int64 [links]."""
    return np.array([planted.config.tokens.value(link.answer) for link in planted.links], dtype=np.int64)


def accuracy(planted: Planted, tokens: np.ndarray, chosen: np.ndarray | slice = slice(None)) -> dict[str, Any]:
    """`NormalisedAccuracy` of the ``tokens`` predicted for the ``chosen`` links of a set."""
    metric = NormalisedAccuracy()
    metric.add_batch(predictions=tokens[chosen], references=right_tokens(planted)[chosen])
    scores: dict[str, Any] = metric.compute(chance=chance(planted.config), ceiling=ceiling(planted.config))
    return scores


def by_distance(planted: Planted, tokens: np.ndarray) -> list[dict[str, Any]]:
    """Accuracy of the links in each doubling of the distance."""
    # octave o: distances from 2^o up to 2^(o + 1)
    octaves = np.array([int(math.log2(link.distance)) for link in planted.links])
    return [
        {"from": 1 << octave, "to": 2 << octave, **accuracy(planted, tokens, octaves == octave)}
        for octave in sorted(set(octaves.tolist()))
    ]


def reach(rows: Sequence[dict[str, Any]], least: float) -> int | None:
    """D50 or D90: the distance up to which the normalised accuracy is at least ``least`` in every octave;
    None if in none.
    """
    far = None
    for row in rows:
        if row["normalised"] is None or row["normalised"] < least:
            break
        far = row["to"]
    return far


def pairs_told_apart(planted: Planted, tokens: np.ndarray) -> float:
    """Of a counterfactual set the share of pairs of which both changed links, the first of each sequence, were answered
    right.
    """
    # backwards, so that the first link of a sequence is what stays
    first = {link.sequence: at for at, link in reversed(list(enumerate(planted.links)))}
    # sequences 2 i and 2 i + 1 are a pair
    pairs = np.array([[first[at], first[at + 1]] for at in range(0, planted.config.sequences, 2)])
    metric = AnswerMatch()
    metric.add_batch(predictions=tokens[pairs], references=right_tokens(planted)[pairs])
    return float(metric.compute()["exact"])
