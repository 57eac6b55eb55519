"""Lines of logs and steps of sensors as segments: runs of tokens that belong to one moment."""

# shapes: n segments, t tokens of all of them

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ...system.extras import needs_extra
from ..dataset import Manifest
from ..errors import PlantDataError
from .log_templates import Match
from .log_vocabulary import LogVocabulary
from .sensor_bins import quantise
from .sensor_patches import SensorGrid
from .text_tokens import TextEncoder

with needs_extra("industry", "logs as tokens"):
    import polars as pl

Mode = Literal["template", "text"]


class Kind(IntEnum):
    """What a segment is."""

    LINE = 0
    STEP = 1


@dataclass(frozen=True)
class Segments:
    """Runs of tokens.

    Attributes:
        table: a row a segment: ``start``, ``stop`` (nanoseconds since 1970, the second not included), ``kind``,
            ``source``, ``line``, ``origin``; of a step ``line`` is its number in the grid.
        counts: tokens of each segment [n].
        ids: tokens, int32 [t].
        spans: characters of each token in the text of its line, int32 [t, 2]; −1 where it is not of the text.
    """

    table: pl.DataFrame
    counts: NDArray[np.int64]
    ids: NDArray[np.int32]
    spans: NDArray[np.int32]

    @property
    def firsts(self) -> NDArray[np.int64]:
        """First token of each segment [n]."""
        return np.cumsum(self.counts) - self.counts

    def take(self, order: NDArray[np.int64]) -> Segments:
        """The segments with these numbers, in their order."""
        counts = self.counts[order]
        ends = np.cumsum(counts)
        at = np.repeat(self.firsts[order] - (ends - counts), counts) + np.arange(counts.sum())
        return Segments(self.table[order], counts, self.ids[at], self.spans[at])

    @staticmethod
    def concatenated(parts: Sequence[Segments]) -> Segments:
        return Segments(
            pl.concat([part.table for part in parts]),
            np.concatenate([part.counts for part in parts]),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.spans for part in parts]),
        )

    def by_time(self) -> Segments:
        """In the order of their ends, lines before a step that ends with them, else as they stand."""
        order = np.lexsort((self.table["kind"].to_numpy(), self.table["stop"].to_numpy()))
        return self.take(order)


TABLE = pl.Schema(
    {
        "start": pl.Int64(),
        "stop": pl.Int64(),
        "kind": pl.UInt8(),
        "source": pl.UInt16(),
        "line": pl.UInt64(),
        "origin": pl.String(),
    }
)


class LineEncoder:
    """Events -> segments. Each starts with a place for its time gap where there is a vocabulary.

    With ``mode`` "template": gap, origin, template, parameters. With "text": gap and origin where there is a
    vocabulary, then the text and a line end by the model's own tokenizer.

    Attributes:
        unknown, nearest: lines so far whose template is the unknown one, or the nearest one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: LogVocabulary | None, mode: Mode) -> None:
        if mode == "template" and vocabulary is None:
            raise PlantDataError(
                "lines as templates need a vocabulary",
                ["fit one: LogVocabulary.fit(data)", "load that of the model", "take mode='text'"],
            )
        self.vocabulary, self.mode = vocabulary, mode
        self.ids = None if vocabulary is None else vocabulary.ids(tokenizer)
        self.text = TextEncoder(tokenizer) if mode == "text" else None
        self.unknown = self.nearest = 0

    def __call__(self, events: pl.DataFrame, manifest: Manifest) -> Segments:
        """Segments of events (schema `EVENTS`). Raises PlantDataError for one without a time."""
        if events["time"].null_count():
            row = events.filter(pl.col("time").is_null()).row(0, named=True)
            raise PlantDataError(
                "the line has no time",
                ["prepare the data again", "leave the line out"],
                file=manifest.sources[row["source"]].path,
                line=row["line"],
            )
        start = events["time"].dt.epoch("ns").alias("start")
        table = pl.DataFrame({"start": start, "stop": start + 1}).with_columns(
            pl.lit(Kind.LINE.value).alias("kind"), events["source"], events["line"], events["origin"]
        )
        return self._text_segments(events, table.cast(TABLE)) if self.text else self._line_segments(events, table)

    def _line_segments(self, events: pl.DataFrame, table: pl.DataFrame) -> Segments:
        assert self.vocabulary is not None and self.ids is not None
        tokens, match = self.vocabulary.line_tokens(events)
        self.unknown += int((match == Match.UNKNOWN).sum())
        self.nearest += int((match == Match.NEAREST).sum())
        # the gap is known only once all segments stand by time: 0 holds its place
        full = np.column_stack([np.zeros(len(tokens), np.int64), tokens])
        given = full >= 0
        ids = self.ids[full[given]]
        return Segments(table.cast(TABLE), given.sum(1), ids, np.full((len(ids), 2), -1, np.int32))

    def _text_segments(self, events: pl.DataFrame, table: pl.DataFrame) -> Segments:
        assert self.text is not None
        texts = events["text"].fill_null("").to_list()
        head = self._heads(events)
        none = np.full((head.shape[1], 2), -1, np.int32)
        # the line end is no character of the text
        encoded = [
            (ids, np.minimum(spans, len(text)))
            for text, (ids, spans) in zip(texts, self.text([f"{text}\n" for text in texts]), strict=True)
        ]
        counts = np.array([head.shape[1] + len(ids) for ids, _ in encoded], np.int64)
        ids = [part for before, (ids, _) in zip(head, encoded, strict=True) for part in (before, ids)]
        spans = [part for _, spans in encoded for part in (none, spans)]
        empty = np.zeros((0, 2), np.int32)
        return Segments(
            table, counts, np.concatenate([empty[:, 0], *ids]).astype(np.int32), np.concatenate([empty, *spans])
        )

    def _heads(self, events: pl.DataFrame) -> NDArray[np.int32]:
        """The tokens before the text [n, 2 or 0]: a place for the gap, and the origin."""
        if self.vocabulary is None or self.ids is None:
            return np.zeros((len(events), 0), np.int32)
        origins = self.ids[self.vocabulary.origin_tokens(events)]
        return np.column_stack([np.zeros(len(events), np.int32), origins])


def step_segments(grid: SensorGrid, vocabulary: LogVocabulary, ids: NDArray[np.int32]) -> Segments:
    """The steps of a grid in which something was observed: gap, step, then a token a channel.

    Raises:
        PlantDataError: the vocabulary has no tokens for sensors.
    """
    if not vocabulary.sensor_bins:
        raise PlantDataError(
            "the vocabulary has no tokens for sensors",
            ["fit it with VocabularySettings(sensor_bins=64)", "leave the sensors out"],
        )
    steps = np.flatnonzero(grid.observed.any(1))
    values = vocabulary.sensors + quantise(grid.values[steps], grid.observed[steps], vocabulary.sensor_bins)
    tokens = np.column_stack([np.zeros(len(steps), np.int64), np.full(len(steps), vocabulary.step), values])
    start = grid.start + steps * grid.step
    table = pl.DataFrame({"start": start, "stop": start + grid.step}).with_columns(
        pl.lit(Kind.STEP.value).alias("kind"),
        pl.lit(None).alias("source"),
        pl.Series("line", steps),
        pl.lit(None).alias("origin"),
    )
    counts = np.full(len(steps), tokens.shape[1], np.int64)
    flat = ids[tokens.reshape(-1)]
    return Segments(table.cast(TABLE), counts, flat, np.full((len(flat), 2), -1, np.int32))
