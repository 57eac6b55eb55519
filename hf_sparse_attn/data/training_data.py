"""Training data: any texts -> rows of tokens for ``Trainer`` or a torch ``DataLoader``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from ..config import SparseAttentionConfig
from .file_check import survey
from .formats import SourceFile, source_files
from .packing import PackingOptions, PackingReport
from .tables import TableRows
from .tokenization import Encoder

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def training_rows(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    block_size: int = SparseAttentionConfig.block_size,
    streaming: bool = False,
    seed: int | None = None,
    pad: bool = False,
    end_of_text: bool = True,
    shuffle_window: int = 1000,
    progress: bool = True,
) -> Dataset | IterableDataset:
    """Rows of exactly ``length`` tokens: ``{"input_ids", "position_ids", "labels"}``, int64 tensors [length] each.

    Documents are packed: ``position_ids`` start again at 0 with each document, which attends to itself only, and the
    first token of a document has no label. How documents are cut is told in ``packing.py``, and counted by
    ``packing_report``. Collate rows with ``default_data_collator``, or leave that to a ``DataLoader``.

    Args:
        sources: files, globs, packages and datasets; see ``sources.py`` and ``formats.py``. ``rows.jsonl#message``
            names a column.
        tokenizer: a begin-of-text token that it puts before texts is put before documents.
        length: tokens of a row, a multiple of ``block_size``.
        block_size: of the sparse attention, tokens (``config.sparse_attention``).
        streaming: tokenise while training, each epoch again: a stream whose ``state_dict()`` continues in the middle of
            a document, and whose files are shared out between the workers of a ``DataLoader``. Otherwise tokenise once,
            into ``cache_folder()/tokens``, and read from there; memory stays flat in both cases.
        seed: shuffle with this seed; None keeps the order of reading. A stream is shuffled by files and, within windows
            of ``shuffle_window`` rows, by rows, in another order each epoch (``set_epoch``).
        pad: one document, or part of a long one, a row: padded on the right, with ``attention_mask`` in place of
            ``position_ids``.
        end_of_text: put the tokenizer's end-of-text token behind each document.
        shuffle_window: rows of a stream that are shuffled with each other and kept in memory (24 bytes a token).
        progress: show a bar while rows are made for the cache.

    Raises:
        SourceError: before any row is returned: ``length`` does not hold whole blocks; a token that is needed is
            missing; a source is incomplete or matches nothing; a file is unreadable, damaged, truncated or not text; a
            column is missing or holds no text; the sources yield no row. A bad row in the middle of a table is found
            when it is read: by the cache before any row is returned, by a stream when it comes there.
    """
    options = PackingOptions(length, block_size, pad, end_of_text)
    encoder = Encoder(tokenizer, end_of_text, pad)
    files = source_files(sources)
    for file in files:
        _check(file)
    if streaming:
        from .row_dataset import stream_rows

        return stream_rows(files, encoder, options, seed, shuffle_window)
    from .token_cache import cached_rows

    rows = cached_rows(files, encoder, options, progress)
    return rows if seed is None else rows.shuffle(seed=seed, keep_in_memory=True)


def _check(file: SourceFile) -> None:
    """Read a text to its end, and of a table the first row."""
    if file.is_table:
        next(iter(TableRows(file)), None)
    else:
        survey(file)


def packing_report(rows: Dataset | IterableDataset) -> PackingReport:
    """What became of the tokens: of all when the rows are a cache, of those read so far when they are a stream."""
    from datasets import Dataset

    from .row_dataset import stream_report
    from .token_cache import cache_report

    return cache_report(rows) if isinstance(rows, Dataset) else stream_report(rows)


def share_of_rank(rows: Dataset | IterableDataset, rank: int, world_size: int) -> Dataset | IterableDataset:
    """The rows of one rank of ``world_size``: every ``world_size``-th, and as many for every rank.

    ``datasets.distributed.split_dataset_by_node`` keeps the last rows too, so ranks may differ in their number, and
    ranks that wait for each other hang at the end. A rank of a stream reads and tokenises what it leaves to the others,
    too, unless each rank is given files of its own.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size}")
    from datasets import Dataset

    if isinstance(rows, Dataset):
        # rows beyond the last full round would give some ranks one more
        return rows.select(range(rank, len(rows) - len(rows) % world_size, world_size))
    from .row_dataset import equal_share

    return equal_share(rows, rank, world_size)
