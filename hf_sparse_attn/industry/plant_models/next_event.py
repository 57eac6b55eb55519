"""How well a model knows the next event: accuracy and nats of templates, and what a far cause tells it."""

# Shapes: E events, L planted links, n tokens that are predicted.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...evaluation.divergence import LOGIT_POSITIONS
from ..errors import PlantDataError
from ..representation.token_segments import Kind
from ..representation.token_stream import HEADS, TokenStream
from .stream_reading import Reading, ReadWindow, backbone_states, language_model, read, reading_call
from .surprise import window_nats


@dataclass(frozen=True, eq=False)
class NextEvents:
    """Predictions of tokens, in their order.

    Attributes:
        tokens: int64 [E], places in the stream.
        nats: float64 [E], −log p.
        ranks: int64 [E], how many other tokens the model held for at least as likely; 0: its first guess.
    """

    tokens: NDArray[np.int64]
    nats: NDArray[np.float64]
    ranks: NDArray[np.int64]

    def accuracy(self, top: int = 1) -> float:
        """Share of events among the model's ``top`` guesses."""
        return float((self.ranks < top).mean()) if len(self.ranks) else float("nan")

    def summary(self) -> dict[str, float]:
        """``events``, ``top_1``, ``top_5`` and mean ``nats``."""
        nats = float(self.nats.mean()) if len(self.nats) else float("nan")
        return {"events": len(self.nats), "top_1": self.accuracy(), "top_5": self.accuracy(5), "nats": nats}

    def at(self, tokens: NDArray[np.int64]) -> NextEvents:
        """Those of some of the tokens. Raises PlantDataError for one that was not predicted."""
        order = np.argsort(self.tokens)
        place = np.searchsorted(self.tokens, tokens, sorter=order)
        found = order[np.minimum(place, len(order) - 1)] if len(order) else np.zeros(len(tokens), np.int64)
        if not len(order) or (self.tokens[found] != tokens).any():
            raise PlantDataError(
                f"{len(tokens)} tokens, not all of which are among the {len(self.tokens)} that were predicted",
                ["name tokens of templates: template_tokens(stream)", "predict them, too: next_events(…, tokens=…)"],
            )
        return NextEvents(tokens, self.nats[found], self.ranks[found])


def template_tokens(stream: TokenStream) -> NDArray[np.int64]:
    """The token of each line's template, int64 [E].

    Raises:
        PlantDataError: the stream holds lines as text, which has no templates.
    """
    if stream.meta["mode"] != "template":
        raise PlantDataError(
            "the stream holds lines as text: no single token says what the event is",
            ["make it in template mode: token_streams(…, mode='template')", "measure surprise instead"],
            file=stream.folder,
        )
    lines = stream.segments["kind"].to_numpy() == Kind.LINE
    firsts: NDArray[np.int64] = stream.segments["first"].to_numpy()[lines]
    return firsts + HEADS["template"].index("template")


def next_events(
    model: Any,
    ids: NDArray[np.int32],
    tokens: NDArray[np.int64],
    reading: Reading | None = None,
    *,
    bos: int | None = None,
) -> NextEvents:
    """Predictions of ``tokens`` (int64, ascending) of a stream's ``ids``, each from all before it in its window.

    The time gap and the origin of a line stand before its template and are known when it is predicted. Guesses are
    over all tokens of the model.

    Raises:
        PlantDataError: the model lacks routers or tokens, or ``tokens`` lie outside of the stream or do not ascend.
    """
    if len(tokens) and not (tokens[0] >= 0 and tokens[-1] < len(ids) and (np.diff(tokens) > 0).all()):
        raise PlantDataError(
            f"the tokens to predict must ascend within the {len(ids)} of the stream",
            ["sort them: numpy.unique", "take those of the same stream"],
        )
    parts = [_predicted(model, ids, window, tokens) for window in read(model, ids, reading or Reading(), bos=bos)]
    return NextEvents(
        np.concatenate([tokens[:0], *(part.tokens for part in parts)]),
        np.concatenate([np.zeros(0), *(part.nats for part in parts)]),
        np.concatenate([tokens[:0], *(part.ranks for part in parts)]),
    )


@torch.no_grad()
def _predicted(model: Any, ids: NDArray[np.int32], window: ReadWindow, tokens: NDArray[np.int64]) -> NextEvents:
    found, nats = window_nats(model, ids, window, tokens)
    ranks = [np.zeros(0, np.int64)]
    head = language_model(model).get_output_embeddings()
    for part in np.split(found, range(LOGIT_POSITIONS, len(found), LOGIT_POSITIONS)):
        logits = head(window.states(part - 1)).float()
        own = logits.gather(1, torch.from_numpy(ids[part].astype(np.int64)).to(logits.device)[:, None])
        # ties count against the model: one that knows nothing is not right by order
        ranks.append(((logits >= own).sum(1) - 1).cpu().numpy())
    return NextEvents(found, nats, np.concatenate(ranks))


@dataclass(frozen=True)
class LagClass:
    """Links whose cause lies ``low`` to ``high`` tokens (the second excluded) before the effect.

    ``nats`` and ``top_1`` are of the effects; ``gain`` is by how many nats they fall when the cause is in the context,
    NaN where that was not read.
    """

    low: int
    high: int
    links: int
    nats: float
    top_1: float
    gain: float


def by_lag(
    events: NextEvents,
    causes: NDArray[np.int64],
    effects: NDArray[np.int64],
    edges: Sequence[int],
    gains: NDArray[np.float64] | None = None,
) -> list[LagClass]:
    """Predictions of planted effects by how far their causes lie.

    Args:
        events: with all ``effects`` among them.
        causes, effects: int64 [L], tokens of the stream; those of the truth's lines: `TokenStream.tokens`.
        edges: of the classes in tokens, ascending.
        gains: float64 [L] of `cause_gains`.

    Raises:
        PlantDataError: an effect was not predicted.
    """
    lags, at = effects - causes, events.at(effects)
    classes = []
    for low, high in pairwise(edges):
        mine = (low <= lags) & (lags < high)
        if not mine.any():
            continue
        gain = float("nan") if gains is None else float(gains[mine].mean())
        nats, right = float(at.nats[mine].mean()), float((at.ranks[mine] == 0).mean())
        classes.append(LagClass(low, high, int(mine.sum()), nats, right, gain))
    return classes


# gain = nats(effect | context from behind the cause) − nats(effect | context with the cause)
def cause_gains(
    model: Any,
    stream: TokenStream,
    causes: NDArray[np.int64],
    effects: NDArray[np.int64],
    reading: Reading | None = None,
) -> NDArray[np.float64]:
    """By how many nats each planted effect falls when its cause's segment is in the context, float64 [L].

    Both contexts end with the effect. One starts with the segment of the cause, or as much before it as ``length``
    leaves room for, up to ``length`` − ``past`` tokens; the other with the segment behind it.

    Raises:
        PlantDataError: a cause does not lie before its effect, in another segment, and within ``length`` tokens of it.
    """
    reading = reading or Reading()
    firsts = stream.segments["first"].to_numpy()
    segment = np.searchsorted(firsts, causes, side="right") - 1
    begins = firsts[segment]
    ends = np.append(firsts, len(stream))[segment + 1]
    wrong = (ends > effects) | (effects - begins >= reading.length)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise PlantDataError(
            f"link {at} has its cause in tokens {begins[at]} to {ends[at] - 1} and its effect at {effects[at]}, the "
            f"context has {reading.length} tokens",
            ["leave it out", "take a longer context", "see that the truth is of this stream"],
        )
    room = np.minimum(reading.length - 1 - (effects - begins), reading.length - reading.past)
    inside = np.maximum(begins - np.maximum(room, 0), 0)
    model = language_model(model)
    was_training = model.training
    model.eval()
    try:
        with reading_call(model, reading) as call:
            pairs = [
                _last_nats(model, stream.ids, int(behind), int(effect), call)
                - _last_nats(model, stream.ids, int(start), int(effect), call)
                for start, behind, effect in zip(inside, ends, effects, strict=True)
            ]
    finally:
        model.train(was_training)
    return np.array(pairs, np.float64)


@torch.no_grad()
def _last_nats(model: Any, ids: NDArray[np.int32], start: int, token: int, call: dict[str, Any]) -> float:
    """Nats of one token from those from ``start`` on."""
    row = torch.from_numpy(ids[start:token].astype(np.int64))[None].to(next(model.parameters()).device)
    hidden = backbone_states(model, row, call)
    return float(window_nats(model, ids, ReadWindow(start, start, token + 1, hidden), np.array([token]))[1][0])
