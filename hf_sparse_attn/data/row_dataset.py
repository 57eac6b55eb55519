"""Rows as a stream of ``datasets``: shared out between ranks and workers, shuffled, and continued exactly where they
were.

Import this module inside functions only: it needs ``datasets``, which is heavy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
from datasets import DatasetInfo, Features, IterableDataset, List, Value
from datasets.iterable_dataset import StepExamplesIterable, _BaseExamplesIterable

from .formats import SourceFile
from .packing import PackingOptions, PackingReport, Row
from .row_stream import RowStream, fingerprint, no_row
from .sources import SourceError
from .tokenization import Encoder

Examples = Iterator[tuple[int, Row]]


def row_features(options: PackingOptions) -> Features:
    """Columns of a row, each a list [length]."""
    second = "attention_mask" if options.pad else "position_ids"
    return Features({name: List(Value("int32"), length=options.length) for name in ("input_ids", second, "labels")})


class RowExamples(_BaseExamplesIterable):  # type: ignore[misc]
    """The rows of files, each file a shard: what ``IterableDataset`` iterates over.

    The state is that of ``RowStream``, so going on takes as long anywhere in the data. ``datasets`` on its own would
    read and tokenise everything up to there again.
    """

    def __init__(
        self, files: Sequence[SourceFile], encoder: Encoder, options: PackingOptions, seed: int | None = None
    ) -> None:
        super().__init__()
        self.files, self.encoder, self.options, self.seed = files, encoder, options, seed

    # typed, so that rows are handed on as they are
    is_typed = True

    @property
    def features(self) -> Features:
        return row_features(self.options)

    @property
    def num_shards(self) -> int:
        return len(self.files)

    def _init_state_dict(self) -> dict[str, Any]:
        self._state_dict = {"fingerprint": None, "stream": None, "report": None, "type": type(self).__name__}
        return self._state_dict

    def __iter__(self) -> Examples:
        files = (
            self.files
            if self.seed is None
            else [self.files[i] for i in np.random.default_rng(self.seed).permutation(len(self.files))]
        )
        fingerprints = fingerprint(files, self.encoder, self.options)
        state: dict[str, Any] = self._state_dict or self._init_state_dict()
        if state["fingerprint"] not in (None, fingerprints):
            raise SourceError(
                "the saved state of the data belongs to other files, another tokenizer or other settings: "
                "restore those, or start from the first row without the state"
            )
        state["fingerprint"] = fingerprints
        stream = RowStream(files, self.encoder, self.options, state["stream"])
        with contextlib.closing(iter(stream)) as rows:
            for index, row in enumerate(rows):
                # before the row is given out: a state that is saved then continues behind it
                state.update(stream=stream.state(), report=asdict(stream.report))
                yield index, row
        state.update(report=asdict(stream.report))

    def shift_rngs(self, value: int) -> RowExamples:
        return self if self.seed is None else RowExamples(self.files, self.encoder, self.options, self.seed + value)

    def shuffle_data_sources(self, generator: np.random.Generator) -> RowExamples:
        """Itself: `datasets` asks for this at every epoch, shuffled or not;
        ``seed`` decides about the order of the files.
        """
        return self

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> RowExamples:
        chosen = self.split_shard_indices_by_worker(num_shards, index, contiguous=contiguous)
        return RowExamples([self.files[i] for i in chosen], self.encoder, self.options, self.seed)

    def reshard_data_sources(self) -> RowExamples:
        return self


class _Wrapper(_BaseExamplesIterable):  # type: ignore[misc]
    """What hands the questions of ``datasets`` on to the rows inside."""

    ex_iterable: _BaseExamplesIterable
    is_typed = True

    @property
    def features(self) -> Features:
        return self.ex_iterable.features

    @property
    def num_shards(self) -> int:
        return int(self.ex_iterable.num_shards)


class ShuffledRows(_Wrapper):
    """Rows shuffled within consecutive windows of ``window`` rows.

    ``IterableDataset.shuffle`` loses the rows of its buffer when a run is continued. Here the state is where the window
    starts and how many of its rows were given out: they are made again. A row moves by less than ``window`` places.
    """

    def __init__(self, rows: _BaseExamplesIterable, window: int, seed: int) -> None:
        super().__init__()
        self.ex_iterable, self.window, self.seed = rows, window, seed

    def _init_state_dict(self) -> dict[str, Any]:
        order = {"window": self.window, "seed": self.seed}
        self._state_dict = {
            "start": None,
            "number": 0,
            "given": 0,
            "report": None,
            "order": order,
            "type": type(self).__name__,
        }
        return self._state_dict

    def __iter__(self) -> Examples:
        inner = self.ex_iterable
        state: dict[str, Any] = self._state_dict or self._init_state_dict()
        if state.get("order") != {"window": self.window, "seed": self.seed}:
            raise SourceError(
                f"the saved state of the data is of rows in another order ({state.get('order')}) than that of window "
                f"{self.window} and "
                f"seed {self.seed}: restore those, or start from the first row without the state"
            )
        # the rows inside go on where the window began; ``given`` of the window are out
        inner._init_state_dict()
        if state["start"] is not None:
            inner.load_state_dict(state["start"])
        with contextlib.closing(iter(inner)) as rows:
            while True:
                start = inner.state_dict()
                examples = list(islice(rows, self.window))
                if not examples:
                    return
                # the order follows from seed and number of the window alone, so that it can be made again
                order = np.random.default_rng([self.seed, state["number"]]).permutation(len(examples))
                state.update(start=start, report=inner.state_dict().get("report"))
                for i in order[state["given"] :]:
                    state["given"] += 1
                    yield examples[i]
                state.update(start=inner.state_dict(), number=state["number"] + 1, given=0)

    def shift_rngs(self, value: int) -> ShuffledRows:
        return ShuffledRows(self.ex_iterable, self.window, self.seed + value)

    def shuffle_data_sources(self, generator: np.random.Generator) -> ShuffledRows:
        return self

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> ShuffledRows:
        return ShuffledRows(
            self.ex_iterable.shard_data_sources(num_shards, index, contiguous=contiguous), self.window, self.seed
        )

    def reshard_data_sources(self) -> ShuffledRows:
        return self


class EqualShare(StepExamplesIterable):  # type: ignore[misc]
    """Every ``step``-th row from ``offset`` on; rows at the end that do not make a full round are left out for every
    rank.
    """

    is_typed = True

    def __iter__(self) -> Examples:
        with contextlib.closing(iter(self.ex_iterable)) as rows:
            while len(turn := list(islice(rows, self.step))) == self.step:
                yield turn[self.offset]

    def shuffle_data_sources(self, generator: np.random.Generator) -> EqualShare:
        return EqualShare(self.ex_iterable.shuffle_data_sources(generator), self.step, self.offset)

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> EqualShare:
        return EqualShare(
            self.ex_iterable.shard_data_sources(num_shards, index, contiguous=contiguous), self.step, self.offset
        )


def as_dataset(examples: _BaseExamplesIterable) -> IterableDataset:
    """A stream whose rows are torch tensors."""
    return IterableDataset(examples, info=DatasetInfo(features=examples.features)).with_format("torch")


def stream_rows(
    files: Sequence[SourceFile], encoder: Encoder, options: PackingOptions, seed: int | None, shuffle_window: int
) -> IterableDataset:
    """The rows as a stream; with a seed, files come in an order of their own and rows are shuffled in windows, both
    anew in each epoch.

    Raises:
        SourceError: there is not one row.
    """
    # sources that are too small fail here, before a worker reads them
    probe = RowStream(files, encoder, options)
    with contextlib.closing(iter(probe)) as rows:
        if next(rows, None) is None:
            raise no_row(probe.report, options)
    examples = RowExamples(files, encoder, options, seed)
    return as_dataset(examples if seed is None else ShuffledRows(examples, shuffle_window, seed))


def equal_share(rows: IterableDataset, rank: int, world_size: int) -> IterableDataset:
    """The rows of one rank; every rank gets as many."""
    return as_dataset(EqualShare(rows._ex_iterable, world_size, rank))


def stream_report(rows: IterableDataset) -> PackingReport:
    """What became of the tokens up to the row that was given out last (with shuffling: up to the end of its window)."""
    return PackingReport(**(_find_report(rows.state_dict()) or {}))


def _find_report(state: Any) -> dict[str, int] | None:
    if not isinstance(state, dict):
        return None
    # the states of wrappers stand inside each other
    report = state.get("report")
    return report or next((nested for value in state.values() if (nested := _find_report(value))), None)
