"""Surprise of each line and each sensor step: the negative log-likelihood of its tokens under a model."""

# Shapes: S segments, n tokens that are predicted.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...evaluation.divergence import token_losses
from ..representation.token_stream import TokenStream
from .stream_reading import Reading, ReadWindow, language_model, read


@dataclass(frozen=True, eq=False)
class Surprise:
    """Of every segment of a stream, by time.

    Attributes:
        times: int64 [S], the last nanosecond (since 1970) that it covers: of a line its time, of a sensor step its
            end, when it is known.
        kinds: uint8 [S], `token_segments.Kind`.
        nats: float64 [S], −Σ log p over its tokens that were predicted.
        tokens: int64 [S], how many these are: all but the stream's very first, which nothing predicts without ``bos``.
        window_starts: int64 [S], the token of the stream at which the window starts that predicted its first token:
            what lies before had no say.
        reading: how it was read.
    """

    times: NDArray[np.int64]
    kinds: NDArray[np.uint8]
    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    window_starts: NDArray[np.int64]
    reading: Reading

    def __len__(self) -> int:
        return len(self.times)


# nats_s = −Σ_{i ∈ s} log p(token i | tokens of its window before i)
def surprise(model: Any, stream: TokenStream, reading: Reading | None = None, *, bos: int | None = None) -> Surprise:
    """Surprise of every segment of ``stream``; one window of states and logits exists at a time.

    Args:
        model: a causal language model with the vocabulary of the stream.
        stream: of one asset.
        reading: how the model attends, and in what windows.
        bos: the token that rows were made with, if they were.

    Raises:
        PlantDataError: the model lacks routers or tokens, see `stream_reading.read`.
        NonFiniteError: a state is NaN or infinite.
    """
    reading = reading or Reading()
    table = stream.segments
    firsts = table["first"].to_numpy()
    nats, counts = np.zeros(len(firsts)), np.zeros(len(firsts), np.int64)
    starts = np.zeros(len(firsts), np.int64)
    for window in read(model, stream.ids, reading, bos=bos):
        tokens, losses = window_nats(model, stream.ids, window)
        segments = np.searchsorted(firsts, tokens, side="right") - 1
        np.add.at(nats, segments, losses)
        np.add.at(counts, segments, 1)
        begun = np.searchsorted(firsts, [window.first, window.stop])
        starts[begun[0] : begun[1]] = window.start
    return Surprise(
        table["stop"].to_numpy() - 1,
        table["kind"].to_numpy(),
        nats,
        counts,
        starts,
        reading,
    )


@torch.no_grad()
def window_nats(
    model: Any, ids: NDArray[np.int32], window: ReadWindow, tokens: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(Tokens, nats [n]) of the new tokens of a window, or of those among ``tokens``, that something predicts."""
    if tokens is None:
        tokens = np.arange(window.first, window.stop, dtype=np.int64)
    # the state before a token predicts it
    tokens = tokens[(tokens >= window.first) & (tokens < window.stop) & (tokens > window.start - window.before)]
    if not len(tokens):
        return tokens, np.zeros(0)
    hidden = window.states(tokens - 1)
    targets = torch.from_numpy(ids[tokens].astype(np.int64)).to(hidden.device)
    losses = token_losses(language_model(model), hidden[None], targets[None])
    return tokens, losses.double().cpu().numpy()
