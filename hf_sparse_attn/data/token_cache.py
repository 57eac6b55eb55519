"""Rows that are tokenised once and kept on disk, memory-mapped when they are read.

Import this module inside functions only: it needs ``datasets``, which is heavy.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow
from datasets import Dataset, DatasetInfo
from filelock import FileLock
from hf_sparse_attn_kernels.caching import cache_folder

from ..files import write_atomically, write_json
from ..progress import bar
from .formats import SourceFile, changed, identity
from .packing import PackingOptions, PackingReport, Row
from .row_stream import RowStream, fingerprint, no_row
from .sources import SourceError
from .streaming import row_features
from .survey import survey
from .tokens import Encoder

logger = logging.getLogger(__name__)

BATCH = 1 << 20  # tokens that are written at a time
ROWS, REPORT = "rows.arrow", "report.json"


def cached_rows(files: Sequence[SourceFile], encoder: Encoder, options: PackingOptions, progress: bool = True) -> Dataset:
    """All rows, from ``cache_folder()/tokens/<fingerprint>``; made first unless they are there.

    12 bytes of disk a token. A process that makes them keeps others, such as the other ranks of a node, waiting; an interrupted one
    leaves nothing that would be taken for rows.

    Raises:
        SourceError: a file cannot be read or changes meanwhile, there is not one row, or the disk is full.
    """
    before = [identity(file) for file in files]
    folder = cache_folder() / "tokens" / fingerprint(files, encoder, options)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / ROWS).exists():
            for left in folder.glob(f".{ROWS}.*"):  # by a process that was killed
                left.unlink()
            _make(folder, RowStream(files, encoder, options), before, progress)
    report = (folder / REPORT).read_text(encoding="utf-8")
    info = DatasetInfo(description=report, features=row_features(options))
    return Dataset.from_file(str(folder / ROWS), info=info).with_format("torch")


def cache_report(rows: Dataset) -> PackingReport:
    """What became of the tokens when these rows were made, whatever was selected of them since."""
    return PackingReport(**json.loads(rows.info.description))


def _make(folder: Path, stream: RowStream, before: Sequence[object], progress: bool) -> None:
    logger.info("tokenising %d files into %s", len(stream.files), folder)
    try:
        write_atomically(folder / ROWS, lambda temporary: _write(temporary, folder, stream, before, progress))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise SourceError(
            f"the disk of {folder} is full: rows need 12 bytes a token; free some, set HF_SPARSE_ATTN_CACHE to another disk, or stream"
        ) from error


def _write(path: Path, folder: Path, stream: RowStream, before: Sequence[object], progress: bool) -> None:
    """The rows, then the report: the rows get their name last."""
    schema = row_features(stream.options).arrow_schema
    rows = _shown(stream, progress)
    with path.open("wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        batch: list[Row] = []
        for row in rows:
            batch.append(row)
            if len(batch) * stream.options.length >= BATCH:
                writer.write_batch(_record_batch(batch, schema))
                batch = []
        if batch:
            writer.write_batch(_record_batch(batch, schema))
    for source, found in zip(stream.files, before, strict=True):
        if identity(source) != found:
            raise changed(source.path)
    if not stream.report.rows:
        raise no_row(stream.report, stream.options)
    write_json(folder / REPORT, asdict(stream.report))


def _record_batch(rows: list[Row], schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    def column(name: str) -> pyarrow.Array:
        values = np.concatenate([row[name] for row in rows]).astype(np.int32)
        return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values), len(rows[0][name]))

    return pyarrow.RecordBatch.from_arrays([column(name) for name in schema.names], schema=schema)


def _shown(stream: RowStream, progress: bool) -> Iterator[Row]:
    """The rows, with a bar of the megabytes that were read; a table counts when it is finished, a dataset not at all."""
    sizes = [survey(file).size if file.format == "text" else file.size for file in stream.files]
    with bar(progress) as shown:
        task = shown.add_task("tokenising, MB", total=max(1, sum(sizes) >> 20), info="")
        for row in stream:
            position = stream.state()["position"]
            read = sum(sizes[: position["file"]]) + ((position["within"] or {}).get("offset") or 0)
            shown.update(task, completed=read >> 20, info=f"{stream.report.rows} rows")
            yield row
        shown.update(task, completed=max(1, sum(sizes) >> 20), info=f"{stream.report.rows} rows")
