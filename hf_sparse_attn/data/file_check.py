"""One pass over a file before it is used: can it be read to its end, in which encoding, and what is the hash of its
bytes?

Whether 50 GB are UTF-8, or a compressed file is whole, is known only at their end. The pass costs about a second per GB
(zstd two, gzip three), far less than tokenising; what it found is kept in ``cache_folder()/surveys`` until the file
changes.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from hf_sparse_attn_kernels.caching import cache_folder

from ..system.extras import needs_extra
from ..system.files import read_json, write_json
from .decoding import EncodingCheck
from .formats import SourceFile, changed, identity, stamp
from .sources import SourceError

CHUNK = 1 << 20  # bytes
RULES = 3  # what a pass finds, counted up when that changes
LARGEST_WHOLE = 256 << 20  # bytes of a file that can only be read as a whole
HOW_TO_TEST = {"gzip": "gzip -t", "zstd": "zstd -t"}


@dataclass(frozen=True)
class Survey:
    """What one pass over a file found."""

    encoding: str  # "utf-8", or "latin-1" if the bytes are no UTF-8; "" of Parquet
    size: int  # bytes, uncompressed
    digest: str = field(default="", compare=False)  # of these bytes


def chunks(file: SourceFile, offset: int = 0) -> Generator[bytes]:
    """The file's bytes, uncompressed, from ``offset`` on, a bounded number at a time.

    Raises:
        SourceError: the file cannot be read, is damaged, ends in the middle of compressed data, or changes while it is
            read.
    """
    try:
        with Path(file.path).open("rb") as raw:
            # a file that is written while it is read would give parts of two contents
            before = stamp(os.fstat(raw.fileno()))
            for part in _parts(file, raw, offset):
                if stamp(os.fstat(raw.fileno())) != before:
                    raise changed(file.path)
                yield part
            if stamp(os.fstat(raw.fileno())) != before:
                raise changed(file.path)
    except EOFError as error:
        raise SourceError(
            f"{file.path} is truncated: it ends in the middle of compressed data; fetch it again; {_test(file)}"
        ) from error
    except (gzip.BadGzipFile, zlib.error, _DamagedError) as error:
        raise SourceError(f"{file.path} is damaged ({error}): fetch it again; {_test(file)}") from error
    except OSError as error:
        raise SourceError(
            f"cannot read {file.path}: {error.strerror or error}; check the path and its permissions"
        ) from error


def _parts(file: SourceFile, raw: BinaryIO, offset: int) -> Iterator[bytes]:
    if file.compression is None:
        raw.seek(offset)
        return iter(lambda: raw.read(CHUNK), b"")
    if file.size == 0:
        raise EOFError
    return _without(_gzip_members(raw) if file.compression == "gzip" else _zstd_frames(raw), offset)


class _DamagedError(Exception):
    """Data that is no zstd frame."""


def _without(parts: Iterator[bytes], offset: int) -> Iterator[bytes]:
    for part in parts:
        if offset < len(part):
            yield part[offset:]
        offset = max(0, offset - len(part))


def _gzip_members(raw: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw) as file:
        yield from iter(lambda: file.read(CHUNK), b"")


def _zstd_frames(raw: BinaryIO) -> Iterator[bytes]:
    """Frames one after the other. A reader of the zstandard package would take a truncated frame for a whole one:
    raises EOFError.
    """
    with needs_extra("data", "reading a .zst file"):
        import zstandard

    frame = None
    # a little at a time: what comes out of one call is not bounded otherwise, and may be a thousand times as much
    for data in iter(lambda: raw.read(4096), b""):
        while data:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                out = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise _DamagedError(str(error)) from error
            # a file may hold several frames: what follows one is left in unused_data
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
            if out:
                yield out
    if frame is not None:
        raise EOFError


def _test(file: SourceFile) -> str:
    return f"`{HOW_TO_TEST[file.compression or '']} {file.path}` tests it"


def survey(file: SourceFile) -> Survey:
    """Read the file to its end, unless that was done before and it is unchanged.

    Raises:
        SourceError: the file is unreadable, damaged, truncated, not text, UTF-8 with bad bytes, changes meanwhile, or
            is too large for a format that must be read as a whole.
    """
    before = identity(file)
    # by what the file system says of it: a hash of the bytes would take the pass itself
    key = hashlib.sha256(json.dumps([RULES, *before]).encode()).hexdigest()[:32]
    kept = cache_folder() / "surveys" / f"{key}.json"
    # none yet, or no whole one: a second look is all that it costs
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Survey(**read_json(kept))
    result = _survey(file)
    if identity(file) != before:
        raise changed(file.path)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        write_json(kept, asdict(result))
    return result


def content(file: SourceFile) -> list[str | int]:
    """Names what is read of a file: its format, column and the hash of its bytes;
    for a dataset what `identity` says.
    """
    return (
        identity(file)
        if file.format == "hub"
        else [file.format, file.column if file.is_table else "", survey(file).digest]
    )


def _survey(file: SourceFile) -> Survey:
    size, start, end, text, digest = 0, b"", b"", EncodingCheck(file.path), hashlib.blake2b(digest_size=16)
    for part in chunks(file):
        # JSON is judged by its first and last chunk
        start = start or part[:CHUNK]
        size, end = size + len(part), (end + part)[-CHUNK:]
        digest.update(part)
        if file.format != "parquet":
            text.add(part)
    if file.format == "parquet":
        return Survey("", size, digest.hexdigest())
    encoding = text.encoding()
    if file.format == "json":
        _check_json(file, start, end, size)
    if file.format == "html":
        _check_size(file, size, "HTML", "convert it to text, or split it")
    return Survey(encoding, size, digest.hexdigest())


def _check_size(file: SourceFile, size: int, what: str, instead: str) -> None:
    if size > LARGEST_WHOLE:
        raise SourceError(f"{file.path} is {what} of {size >> 20} MB, which can only be read as a whole: {instead}")


def _check_json(file: SourceFile, start: bytes, end: bytes, size: int) -> None:
    if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        _check_size(file, size, "one JSON array", "convert it to JSON lines, e.g. `jq -c '.[]'`")
        return
    last, first = (part.splitlines() or [b""] for part in (end.strip(), start.lstrip()))
    if len(last[-1]) >= CHUNK - 1 or not first[0].rstrip().endswith(b"}"):
        return  # a row too long to be judged by its end, or one object over several lines
    try:
        json.loads(last[-1].decode("utf-8", "replace"))
    except json.JSONDecodeError as error:
        raise SourceError(
            f"{file.path} is truncated: its last line is no JSON ({error}); fetch it again, or remove that line"
        ) from error
    except (ValueError, RecursionError):
        return  # whole, but of numbers or depths that Python does not take at once: what reads the line knows
