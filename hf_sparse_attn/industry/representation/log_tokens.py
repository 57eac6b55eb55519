"""Logs and sensors of a prepared folder as rows of tokens: tokenised once, cut into windows, split by time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from filelock import FileLock
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ...config import IGNORE_INDEX
from ...data.tokenization import Encoder
from ..dataset import PlantDataset
from ..errors import PlantDataError
from .log_vocabulary import LogVocabulary
from .sensor_patches import NANOSECONDS, GridSettings, SensorGrid
from .splitting import Part, split_parts, window_starts
from .token_segments import LineEncoder, Mode, Segments, step_segments
from .token_stream import TokenStream, is_whole, write_stream

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

BATCH = 50_000  # lines that are tokenised at a time
FORMAT = 1  # changes with anything here that changes tokens


def token_streams(
    data: PlantDataset,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: LogVocabulary | None = None,
    *,
    mode: Mode = "template",
    grid: GridSettings | None = None,
    assets: Sequence[str] | None = None,
    cache: str | Path | None = None,
) -> dict[str, TokenStream]:
    """The tokens of each asset, tokenised once and then read from disk.

    Lines of all origins and, with ``grid``, the steps of sensors stand in one stream by time; a step stands at its end,
    when its values are known. Steps without any reading have no tokens: the time gap tells them.

    Args:
        data: the prepared folder.
        tokenizer: that of the model, extended where there is a vocabulary.
        vocabulary: templates, gaps, origins and bins; "text" can do without.
        mode: lines as template tokens, or as their text.
        grid: how sensors are put on a grid; None: logs only.
        assets: all by default.
        cache: the folder for tokens; that of the data by default. Anything that changes a token has another place.

    Raises:
        PlantDataError: the vocabulary is missing or not the tokenizer's, there is no such asset or channel, a line has
            no time.
        OSError: nothing can be written into the cache.
    """
    names = data.manifest.assets if assets is None else list(assets)
    place = Path(cache) if cache is not None else data.folder / "tokens"
    if grid is not None and vocabulary is None:
        raise PlantDataError("sensors as tokens need a vocabulary", ["fit one: LogVocabulary.fit(data, …)"])
    encoder = LineEncoder(tokenizer, vocabulary, mode)  # refuses what cannot be encoded, before anything is read
    # the ids of the vocabulary are all that templates need of a tokenizer
    tokens = Encoder(tokenizer, end_of_text=False).digest if encoder.ids is None or mode == "text" else ""
    settings = [FORMAT, mode, tokens, [] if encoder.ids is None else encoder.ids.tolist()]
    settings += [None if vocabulary is None else vocabulary.digest, None if grid is None else asdict(grid)]
    streams = {}
    for asset in names:
        folder = place / _key(data, asset, settings) / asset
        if not is_whole(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            # the other processes of a training run wait for the first
            with FileLock(f"{folder}.lock"):
                if not is_whole(folder):
                    _write(folder, data, asset, encoder, grid)
        streams[asset] = TokenStream(folder, data)
    return streams


def log_rows(
    streams: Mapping[str, TokenStream], length: int, stride: int | None = None, *, bos: int | None = None
) -> DatasetDict | Dataset:
    """Rows of ``length`` tokens for training and evaluation: ``input_ids``, ``labels``, ``asset``, ``first``.

    Token i of a row is token ``first + i`` of ``streams[asset]``, which says where it comes from. Every token is a
    label in one row: where windows overlap (``stride`` < ``length``, and the last window of a part, which ends with it)
    the earlier row has it, and later ones have it as context. A part with fewer tokens is one shorter row. The
    description of each dataset counts rows, labels, shorter rows and the tokens between the parts, which are in none.

    Args:
        streams: by asset.
        length: tokens of a row.
        stride: tokens from one row to the next; ``length`` by default.
        bos: a token to put before each row, for models that expect one; it is no label. Token 0 of a row then comes
            from no line, and ``first + 1`` is the first that does.

    Returns:
        ``train`` and ``test`` by the split of the data, or one dataset where nothing is split.

    Raises:
        PlantDataError: a part has no token, or the lengths make no rows.
    """
    from datasets import DatasetDict

    head = np.array([] if bos is None else [bos], np.int32)
    size = length - len(head)
    step = size if stride is None else stride
    if size < 1 or length < 2 or not 1 <= step <= size:
        raise PlantDataError(
            f"rows of {length} tokens with a stride of {step}",
            ["take a length of 2 or more", f"take a stride from 1 to {max(size, 1)}"],
        )
    if not streams:
        raise PlantDataError("there is no stream of tokens", ["name an asset in token_streams"])
    parts = split_parts(next(iter(streams.values())).data.manifest.split)
    sets = {part.name: _part_rows(streams, part, size, step, head) for part in parts}
    return sets["all"] if len(parts) == 1 else DatasetDict(sets)


def _part_rows(
    streams: Mapping[str, TokenStream], part: Part, size: int, stride: int, head: NDArray[np.int32]
) -> Dataset:
    from datasets import Dataset, DatasetInfo, Features, List, Value

    numbers = List(Value("int32"))
    features = Features({"input_ids": numbers, "labels": numbers, "asset": Value("string"), "first": Value("int64")})
    tables, counts = list[pa.Table](), {"rows": 0, "labels": 0, "short": 0, "outside": 0}
    for asset, stream in streams.items():
        begin, end = _part_tokens(stream, part)
        starts = [begin + at for at in window_starts(end - begin, size, stride)]
        counts["outside"] += len(stream) - (end - begin)
        counts["rows"] += len(starts)
        counts["labels"] += end - begin
        counts["short"] += int(0 < end - begin < size)
        if starts:
            tables.append(_table(asset, stream, starts, min(size, end - begin), head).cast(features.arrow_schema))
    if not tables:
        raise PlantDataError(
            f"no token lies in part {part.name!r} of {', '.join(streams)}",
            ["prepare the data with another split", "name other assets", "see that the asset has logs or sensors"],
        )
    return Dataset(pa.concat_tables(tables), info=DatasetInfo(description=json.dumps(counts), features=features))


def _table(asset: str, stream: TokenStream, starts: list[int], size: int, head: NDArray[np.int32]) -> pa.Table:
    """Rows of ``size`` tokens of the stream; labels are those that no earlier row has."""
    ids = [np.concatenate([head, stream.ids[start : start + size]]) for start in starts]
    labels = [row.copy() for row in ids]
    for at, row in enumerate(labels):
        known = starts[at - 1] + size - starts[at] if at else 0
        row[: len(head) + known] = IGNORE_INDEX
    firsts = [start - len(head) for start in starts]
    columns = {"input_ids": _lists(ids), "labels": _lists(labels), "asset": pa.array([asset] * len(ids))}
    return pa.table({**columns, "first": pa.array(firsts, pa.int64())})


def _lists(rows: list[Any]) -> pa.Array:
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(np.concatenate(rows)))


def _part_tokens(stream: TokenStream, part: Part) -> tuple[int, int]:
    """The tokens [begin, end) of segments that lie in a part as a whole."""
    table = stream.segments
    # by time of their ends: what ends in time is a head of the stream, and what starts in time has a tail
    stop = int((table["stop"] <= part.stop).sum())
    early = (table["start"] < part.start).arg_true()
    start = int(early[-1]) + 1 if len(early) else 0
    if start >= stop:
        return 0, 0
    return table["first"][start], table["first"][stop] if stop < len(table) else len(stream)


def _key(data: PlantDataset, asset: str, settings: Sequence[Any]) -> str:
    """Names everything that decides about the tokens of an asset."""
    files = [data.folder / "assets" / asset / f"{name}.parquet" for name in ("events", "readings")]
    stamps = [(file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None for file in files]
    # the split decides about rows and about scales that are still open
    parts = [asdict(data.manifest), asset, stamps, *settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _write(folder: Path, data: PlantDataset, asset: str, encoder: LineEncoder, grid: GridSettings | None) -> None:
    head = encoder.mode if encoder.mode == "template" or encoder.vocabulary is None else "text with vocabulary"
    counts = {"lines": 0, "unknown": 0, "nearest": 0, "steps": 0}
    steps = _steps(data, asset, encoder, grid)
    meta = {"asset": asset, "mode": encoder.mode, "head": head, "counts": counts}
    write_stream(folder, _batches(data, asset, encoder, steps, counts), meta, grid)


def _steps(data: PlantDataset, asset: str, encoder: LineEncoder, grid: GridSettings | None) -> Segments | None:
    if grid is None or encoder.vocabulary is None or encoder.ids is None:
        return None
    return step_segments(SensorGrid(data, asset, grid), encoder.vocabulary, encoder.ids)


def _batches(
    data: PlantDataset, asset: str, encoder: LineEncoder, steps: Segments | None, counts: dict[str, int]
) -> Iterator[Segments]:
    """Segments by time, their gaps filled in; the counts are right after the last one."""
    taken, before = 0, None
    encoder.unknown = encoder.nearest = 0
    for events in data.events(asset).collect_batches(chunk_size=BATCH, maintain_order=True):
        if not len(events):
            continue
        batch = encoder(events, data.manifest)
        counts["lines"] += len(events)
        if steps is not None:
            # a step that ends with the last line of the batch waits: more lines may end then
            due = int(np.searchsorted(steps.table["stop"].to_numpy(), int(batch.table["stop"][-1])))
            batch = Segments.concatenated([batch, steps.take(np.arange(taken, due))]).by_time()
            taken = due
        yield _with_gaps(batch, before, encoder)
        before = int(batch.table["stop"][-1])
    if steps is not None and taken < len(steps.counts):
        yield _with_gaps(steps.take(np.arange(taken, len(steps.counts))), before, encoder)
    counts.update(unknown=encoder.unknown, nearest=encoder.nearest, steps=0 if steps is None else len(steps.counts))


def _with_gaps(batch: Segments, before: int | None, encoder: LineEncoder) -> Segments:
    """The batch with the tokens of its time gaps; ``before``: the end of the segment before it."""
    if encoder.vocabulary is None or encoder.ids is None:
        return batch
    stops = batch.table["stop"].to_numpy()
    # integers first: nanoseconds since 1970 do not fit a float
    gaps = np.diff(stops, prepend=stops[0] if before is None else before) / NANOSECONDS
    if before is None:
        gaps[0] = np.nan
    batch.ids[batch.firsts] = encoder.ids[encoder.vocabulary.gap_tokens(gaps)]
    return batch
