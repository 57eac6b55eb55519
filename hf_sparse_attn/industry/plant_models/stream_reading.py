"""How a model reads a stream of tokens: dense, by its routers or window + sink, in windows that overlap, without a look
ahead.
"""

# Shapes: N tokens of a window, d hidden size, t tokens of a stream.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...attention.call import SparseCall, learned_selector
from ...config import fixed_budget
from ...data.model_inputs import NonFiniteError
from ...evaluation.baselines import make_selectors
from ...models.attach import routers
from ...models.convert import sparse_attention_as
from ...training.passes import backbone
from ..errors import PlantDataError

Attends = Literal["dense", "sparse", "window"]
WINDOW = "window + sink"  # the selector's name


@dataclass(frozen=True)
class Reading:
    """How a model reads.

    Attributes:
        attends: to all of the window (dense), to what its routers select (sparse), or to the first tokens and the
            nearest ones (window).
        keys: at most so many for a query, forced ones included; None: as the model is set up, with its calibration if
            it has one, and dense below its ``dense_below`` tokens.
        length: tokens of a window.
        past: tokens before it that each token has in its window at least, where the stream has so many.
        singly: route each query by itself, as generation does. Else ``query_tile`` neighbouring queries share one
            selection, which is several times as fast; what a tile keeps then depends on tokens up to ``query_tile`` − 1
            ahead, though none of them is read.

    Raises:
        PlantDataError: the lengths make no windows, or dense attention is given a number of keys.
    """

    attends: Attends = "dense"
    keys: int | None = None
    length: int = 4096
    past: int = 2048
    singly: bool = True

    def __post_init__(self) -> None:
        if self.length < 2 or not 1 <= self.past < self.length:
            raise PlantDataError(
                f"windows of {self.length} tokens in which each token has {self.past} before it",
                ["take a length of 2 or more", "take a past of 1 or more, shorter than the window, such as half of it"],
            )
        if self.attends not in ("dense", "sparse", "window"):
            raise PlantDataError(f"attends is {self.attends!r}", ["take 'dense'", "take 'sparse'", "take 'window'"])
        if self.attends == "dense" and self.keys is not None:
            raise PlantDataError(
                f"dense attention reads all keys, not {self.keys}", ["leave keys out", "take attends='window'"]
            )

    @property
    def name(self) -> str:
        """For tables."""
        kind = WINDOW if self.attends == "window" else self.attends
        return kind if self.keys is None else f"{kind}, {self.keys} keys"


@dataclass(frozen=True)
class ReadWindow:
    """One window that was read.

    Attributes:
        start: first token of the stream in it.
        first: first token that no earlier window had.
        stop: the token behind its last one.
        hidden: last hidden states of tokens ``start`` to ``stop`` [N, d].
        before: 1 where a token was put in front, whose state is the first of ``hidden`` then.
    """

    start: int
    first: int
    stop: int
    hidden: Tensor
    before: int = 0

    def states(self, tokens: NDArray[np.int64]) -> Tensor:
        """States [n, d] after reading the tokens (int64 [n]) of this window."""
        at = torch.from_numpy(tokens - self.start + self.before).to(self.hidden.device)
        return self.hidden[at]


def language_model(model: Any) -> Any:
    """The causal language model itself, also of a `peft.PeftModel`, whose adapters stay in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def reading_call(model: nn.Module, reading: Reading) -> Iterator[dict[str, Any]]:
    """Arguments of a forward pass that reads so. With a number of keys a calibration is set aside for as long.

    Raises:
        PlantDataError: the model is not to be read densely, but has no routers, or would run all windows densely.
        ValueError: fewer keys than what is forced.
    """
    if not routers(model):
        if reading.attends != "dense":
            raise PlantDataError(
                f"{type(model).__name__} has no routers, and attends densely alone",
                ["make it sparse: sparsify(model, {…})", "load it with sparse_attention={…}", "read it densely"],
            )
        yield {}
        return
    if reading.attends == "dense":
        yield {"sparse_call": SparseCall(dense=True)}
        return
    selector = learned_selector if reading.attends == "sparse" else make_selectors([WINDOW])[WINDOW]
    call = SparseCall(selector=selector, decode_from=0 if reading.singly else None)
    if reading.keys is None:
        _refuse_dense(routers(model)[0].config.dense_below, reading)
        yield {"sparse_call": call}
        return
    # at equal budget no window is so short that it is read densely under another name
    with sparse_attention_as(model, dense_below=0, **fixed_budget(reading.keys)):
        yield {"sparse_call": call}


def _refuse_dense(dense_below: int, reading: Reading) -> None:
    if reading.length < dense_below:
        raise PlantDataError(
            f"the model runs fewer than dense_below={dense_below} tokens densely, so all windows of {reading.length}",
            ["take longer windows", "name a number of keys", "set_sparse_attention(model, dense_below=0)"],
        )


def windows(tokens: int, reading: Reading) -> Iterator[tuple[int, int, int]]:
    """(start, first new token, stop) of windows over ``tokens`` tokens.

    Starts are ``length`` − ``past`` apart and depend on nothing behind them: what a longer record adds changes no
    earlier window.
    """
    start = first = 0
    while first < tokens:
        stop = min(start + reading.length, tokens)
        yield start, first, stop
        start, first = start + reading.length - reading.past, stop


@torch.no_grad()
def read(
    model: nn.Module, ids: NDArray[np.int32], reading: Reading, *, bos: int | None = None, begin: int = 0
) -> Iterator[ReadWindow]:
    """Read tokens [t] window by window; one window's states exist at a time.

    Args:
        model: a causal language model, with adapters or without; its mode is eval while a window is read.
        ids: the tokens, such as `TokenStream.ids`.
        reading: how.
        bos: a token to put before each window, as `log_rows` does; it takes the place of one token.
        begin: number of ``ids[0]`` in the stream.

    Raises:
        PlantDataError: see `reading_call`, or a token is none of the model's.
    """
    model = language_model(model)
    _check_ids(model, ids)
    training, device = model.training, next(model.parameters()).device
    size = Reading(reading.attends, reading.keys, reading.length - (bos is not None), reading.past, reading.singly)
    head = np.array([] if bos is None else [bos], np.int64)
    model.eval()
    try:
        with reading_call(model, reading) as call:
            for start, first, stop in windows(len(ids), size):
                row = torch.from_numpy(np.concatenate([head, ids[start:stop].astype(np.int64)]))[None].to(device)
                hidden = backbone_states(model, row, call)
                yield ReadWindow(begin + start, begin + first, begin + stop, hidden, len(head))
    finally:
        model.train(training)


def backbone_states(model: Any, row: Tensor, call: dict[str, Any]) -> Tensor:
    """Last hidden states [N, d] of one row [1, N].

    Raises:
        NonFiniteError: one is NaN or infinite.
    """
    run = backbone(model) if call else model.base_model
    hidden: Tensor = run(row, use_cache=False, **call).last_hidden_state[0]
    if not bool(torch.isfinite(hidden).all()):
        bad = int((~torch.isfinite(hidden)).any(-1).nonzero()[0])
        raise NonFiniteError(
            f"the model's state after token {bad} of a window of {row.shape[1]} is NaN or infinite: load the model in "
            "float32 if it overflows, or train it anew"
        )
    return hidden


def _check_ids(model: Any, ids: NDArray[np.int32]) -> None:
    size = int(model.get_input_embeddings().weight.shape[0])
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise PlantDataError(
            f"tokens {int(ids.min())} to {int(ids.max())}, the model has embeddings of 0 to {size - 1}",
            ["extend the model: extend_model", "load the model that was saved with this vocabulary"],
        )
