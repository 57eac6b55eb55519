"""Text files as blocks of lines, in UTF-8 whatever they were written in; each line has its number in the file."""

from __future__ import annotations

import codecs
import hashlib
import io
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...data.decoding import MARKS, REPLACEMENT, EncodingCheck, utf_16_of
from ...data.file_check import LARGEST_WHOLE, chunks
from ...data.formats import SourceFile
from ...data.sources import SourceError
from ...system.extras import needs_extra
from ..errors import PlantDataError

with needs_extra("industry", "data of plants"):
    import polars as pl

BLOCK = 16 << 20  # bytes of a block of lines
SAMPLE = 1 << 18  # bytes beyond ASCII, with what stands around them, by which an encoding is told
SCRIPTS = ("cp932", "euc_jp")
# kana and ideographs, of which a wrong encoding gives a few alone, never most in runs
WORDS = re.compile("[\u3040-\u30ff\u3400-\u9fff\uff10-\uff5a]{2,}")
BEYOND = re.compile(rb"[^\n]*[\x80-\xff][^\n]*")


@dataclass(frozen=True)
class TextFile:
    """A text file and how it is read."""

    file: SourceFile
    encoding: str
    carriage_returns: bool = False  # they alone end its lines


@dataclass(frozen=True)
class Block:
    """Lines that follow each other."""

    first: int  # number of the first line, from 1
    lines: pl.Series  # without their ends
    damaged: dict[int, str]  # place in ``lines``: what is wrong with its bytes


def sha256_of(path: str | Path) -> str:
    """Hash of the bytes on the disk, as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parts_of(file: SourceFile, offset: int = 0) -> Generator[bytes]:
    """The file's bytes, uncompressed. Raises PlantDataError where they cannot be read to the end."""
    try:
        yield from chunks(file, offset)
    except SourceError as error:
        raise PlantDataError(
            str(error),
            ["copy the file anew from where it came", "leave it out", "unpack it, and name what could be unpacked"],
            file=file.path,
        ) from error


def text_file(file: SourceFile, encoding: str | None) -> TextFile:
    """How a file is read, told from all its bytes; ``encoding`` is what the user says.

    Raises:
        PlantDataError: it cannot be read, or its encoding cannot be told.
    """
    start, strange, size = b"", bytearray(), 0
    check = EncodingCheck(file.path)
    wide = ""
    for part in parts_of(file):
        if not start:
            start = part
            wide = _wide(part)
        size += len(part)
        if wide or encoding:
            break
        check.add(part.replace(b"\0", b" "))
        if not part.isascii() and len(strange) < SAMPLE:
            strange += b"\n".join(BEYOND.findall(part))
    if size == 0:
        raise PlantDataError(
            "is empty", ["leave it out", "export it again", "check what should have written it"], file=file.path
        )
    told = encoding or wide or _told(check, bytes(strange), file.path)
    head = start[: 1 << 16].replace(b"\0", b"")
    return TextFile(file, told, carriage_returns=b"\r" in head and b"\n" not in head)


def _wide(start: bytes) -> str:
    for mark, name in MARKS.items():
        if start.startswith(mark):
            return name
    return utf_16_of(start[:200])


def _told(check: EncodingCheck, strange: bytes, path: str) -> str:
    check.add(b"", final=True)
    # less than one error for two bytes beyond ASCII: damaged UTF-8, whose lines are reported one by one
    if not check.bad or 2 * check.bad < check.beyond_ascii:
        return "utf-8"
    shares = {name: _share_of_words(strange, name) for name in SCRIPTS}
    best = max(shares, key=lambda name: shares[name])
    if shares[best] > 0.5:
        return best
    if 2 * check.in_words > check.beyond_ascii:
        raise PlantDataError(
            f"is in an encoding that cannot be told: not UTF-8, with {check.beyond_ascii} bytes beyond ASCII",
            ["say --encoding, such as cp1251, gb18030 or cp949", "convert it to UTF-8 with iconv", "leave it out"],
            file=path,
        )
    return "cp1252" if check.first_control is not None else "latin-1"


def _share_of_words(strange: bytes, encoding: str) -> float:
    """Share of the characters beyond ASCII that are Japanese and stand in runs; 0 where bytes are none of it."""
    cut = strange[: strange.rfind(b"\n")] if b"\n" in strange else strange
    text = cut.decode(encoding, "replace")
    beyond = sum(not sign.isascii() for sign in text)
    if not beyond or text.count(REPLACEMENT) > 0.01 * beyond:
        return 0.0
    return sum(map(len, WORDS.findall(text))) / beyond


def blocks(text: TextFile) -> Iterator[Block]:
    """The lines of a file, bounded in memory. Raises PlantDataError where they cannot be read."""
    held, line = bytearray(), 1
    for part in _utf_8_parts(text):
        held += part
        if len(held) < BLOCK:
            continue
        end = held.rfind(b"\n") + 1
        if end == 0:
            if len(held) > LARGEST_WHOLE:
                raise PlantDataError(
                    f"has a line of more than {LARGEST_WHOLE >> 20} MB",
                    ["split it", "say its --encoding, if its lines end in another way", "leave it out"],
                    file=text.file.path,
                    line=line,
                )
            continue
        block = _block(line, bytes(held[:end]), text.encoding)
        del held[:end]
        line += len(block.lines)
        yield block
    if held:
        yield _block(line, bytes(held), text.encoding)


def _utf_8_parts(text: TextFile) -> Iterator[bytes]:
    raw = parts_of(text.file)
    plain = text.encoding.lower().replace("_", "-") in ("utf-8", "utf8", "utf-8-sig", "ascii")
    parts = raw if plain else _decoded(raw, text.encoding)
    first = True
    for part in parts:
        if text.carriage_returns:
            part = part.replace(b"\r", b"\n")
        yield part.removeprefix(codecs.BOM_UTF8) if first else part
        first = False


def _decoded(parts: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    for part in parts:
        yield decoder.decode(part).encode()
    yield decoder.decode(b"", final=True).encode()


def _block(first: int, raw: bytes, encoding: str) -> Block:
    damaged: dict[int, str] = {}
    zeros = b"\0" in raw
    strange = b"" if raw.isascii() else REPLACEMENT.encode()
    try:
        lines = pl.read_lines(io.BytesIO(raw)).to_series()
    except pl.exceptions.PolarsError:  # bytes that are no UTF-8
        lines = pl.read_lines(io.BytesIO(raw.decode("utf-8", "replace").encode())).to_series()
        zeros = True
    if zeros or (strange and strange in raw):
        for at, line in enumerate(raw.split(b"\n")[: len(lines)]):
            if b"\0" in line:
                damaged[at] = "zero bytes"
            elif _is_damaged(line, encoding):
                damaged[at] = f"bytes that are no {encoding}"
    return Block(first, lines, damaged)


def _is_damaged(line: bytes, encoding: str) -> bool:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return True
    # in UTF-8 the sign may stand in the text itself
    return REPLACEMENT in text and encoding != "utf-8"
