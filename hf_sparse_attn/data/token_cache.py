"""Rows that are tokenised once and kept on disk, memory-mapped when they are read.

Import this module inside functions only: it needs ``datasets``, which is heavy.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow
from datasets import Dataset, DatasetInfo
from filelock import FileLock
from hf_sparse_attn_kernels.caching import VARIABLE, cache_folder, say_once

from ..system.files import read_json, write_atomically, write_json
from ..system.outputs import check_folder, close_to_others, is_own
from ..system.progress import bar
from .file_check import survey
from .formats import SourceFile, changed, identity
from .packing import PackingOptions, PackingReport, Row
from .row_dataset import row_features
from .row_stream import RowStream, fingerprint, no_row
from .sources import SourceError
from .tokenization import Encoder

logger = logging.getLogger(__name__)

BATCH = 1 << 20  # tokens that are written at a time
ROWS, REPORT = "rows.arrow", "report.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cached_rows(
    files: Sequence[SourceFile], encoder: Encoder, options: PackingOptions, progress: bool = True
) -> Dataset:
    """All rows, from ``cache_folder()/tokens/<fingerprint>``; made first unless they are there.

    12 bytes of disk a token. A process that makes them keeps others, such as the other ranks of a node, waiting; an
    interrupted one leaves nothing that would be taken for rows. Rows that are not this user's, that others can change,
    or that are not what was written are made again; where nothing can be kept they are made for this process alone,
    which is said once.

    Raises:
        SourceError: a file cannot be read or changes meanwhile, there is not one row, or the disk is full.
    """
    # before: a file that changes while it is tokenised is found afterwards
    before = [identity(file) for file in files]
    folder = _place(fingerprint(files, encoder, options))
    with FileLock(folder / "lock"):
        if not _is_whole(folder):
            (folder / ROWS).unlink(missing_ok=True)
            (folder / REPORT).unlink(missing_ok=True)
            _make(folder, RowStream(files, encoder, options), before, progress)
    # in the description, which stays with whatever is selected of the rows
    report = json.dumps(read_json(folder / REPORT)["report"])
    info = DatasetInfo(description=report, features=row_features(options))
    return Dataset.from_file(str(folder / ROWS), info=info).with_format("torch")


def cache_report(rows: Dataset) -> PackingReport:
    """What became of the tokens when these rows were made, whatever was selected of them since."""
    return PackingReport(**json.loads(rows.info.description))


def _place(name: str) -> Path:
    """The folder for rows of that fingerprint, which only this user can change."""
    folder = cache_folder() / "tokens" / name
    try:
        for part in (folder.parent, folder):
            part.mkdir(mode=0o755, parents=True, exist_ok=True)
            close_to_others(part)
        check_folder(folder)
    except OSError as error:
        if error.errno in FULL:
            raise _full(folder) from error
        say_once(
            f"{folder} cannot be used ({error.strerror}): rows of tokens are not kept. Set {VARIABLE} to a folder of "
            "your own"
        )
        return _of_this_process(name)
    return folder


@cache
def _of_this_process(name: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"hf_sparse_attn-{name[:8]}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether the rows are there, this user's, and as they were written;
    their hash is taken only if they were touched since.
    """
    try:
        known, status = read_json(folder / REPORT)["rows"], (folder / ROWS).stat()
        if not (is_own(folder / ROWS) and is_own(folder / REPORT)) or status.st_size != known["size"]:
            return False
        return bool(status.st_mtime_ns == known["mtime_ns"] or _digest(folder / ROWS) == known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _full(folder: Path) -> SourceError:
    return SourceError(
        f"the disk of {folder} is full: rows need 12 bytes a token; free some, set {VARIABLE} to another disk, or "
        "stream"
    )


def _make(folder: Path, stream: RowStream, before: Sequence[object], progress: bool) -> None:
    logger.info("tokenising %d files into %s", len(stream.files), folder)
    try:
        write_atomically(folder / ROWS, lambda temporary: _write(temporary, folder, stream, before, progress))
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise _full(folder) from error


def _write(path: Path, folder: Path, stream: RowStream, before: Sequence[object], progress: bool) -> None:
    """The rows, then the report: the rows get their name last."""
    schema = row_features(stream.options).arrow_schema
    rows = _shown(stream, progress)
    with path.open("wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        batch: list[Row] = []
        for row in rows:
            batch.append(row)
            # by tokens, so that memory does not grow with the length of a row
            if len(batch) * stream.options.length >= BATCH:
                writer.write_batch(_record_batch(batch, schema))
                batch = []
        if batch:
            writer.write_batch(_record_batch(batch, schema))
    for source, survey_result in zip(stream.files, before, strict=True):
        if identity(source) != survey_result:
            raise changed(source.path)
    if not stream.report.rows:
        raise no_row(stream.report, stream.options)
    close_to_others(path)
    written = path.stat()
    seal = {"size": written.st_size, "mtime_ns": written.st_mtime_ns, "sha256": _digest(path)}
    write_json(folder / REPORT, {"report": asdict(stream.report), "rows": seal})
    close_to_others(folder / REPORT)


def _record_batch(rows: list[Row], schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    def column(name: str) -> pyarrow.Array:
        # three columns of int32: 12 bytes a token
        values = np.concatenate([row[name] for row in rows]).astype(np.int32)
        return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values), len(rows[0][name]))

    return pyarrow.RecordBatch.from_arrays([column(name) for name in schema.names], schema=schema)


def _shown(stream: RowStream, progress: bool) -> Iterator[Row]:
    """The rows, with a bar of the megabytes that were read;
    a table counts when it is finished, a dataset not at all.
    """
    sizes = [survey(file).size if file.format == "text" else file.size for file in stream.files]
    with bar(progress) as shown:
        task = shown.add_task("tokenising, MB", total=max(1, sum(sizes) >> 20), info="")
        for row in stream:
            position = stream.state()["position"]
            read = sum(sizes[: position["file"]]) + ((position["within"] or {}).get("offset") or 0)
            shown.update(task, completed=read >> 20, info=f"{stream.report.rows} rows")
            yield row
        shown.update(task, completed=max(1, sum(sizes) >> 20), info=f"{stream.report.rows} rows")
