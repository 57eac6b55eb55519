"""Documents in pieces: a document may be a log of tens of GB, so it is read a bounded stretch at a time.

Pieces are cut where tokenising them one by one gives what tokenising the whole would, wherever the text has such a
place: behind a single line end between two characters that are no white space. Where a cut falls depends on the bytes
behind the last one only, so reading can be taken up at any piece.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .file_check import Survey, chunks, survey
from .formats import SourceFile
from .sources import SourceError
from .tables import TableRows
from .text_documents import text_of_html

PIECE = 1 << 17  # bytes: several are tokenised at a time, each by a thread of the tokenizer
SPACE = b" \t\r\n\v\f"
TRIES = 2000  # line ends that are looked at before the next best place is taken


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a document, and where it stands."""

    document: str  # path; for a table ``path:row``, rows counted from 0
    text: str
    first: bool  # it starts the document
    last: bool  # it ends the document
    offset: int  # of its first byte in the uncompressed file, or in the UTF-8 of a row's text
    line: int  # of its first byte in the file or in the row's text, counted from 1; for HTML always 1


def cut(raw: bytes, limit: int) -> int:
    """Where to cut ``raw`` so that at most ``limit`` (>= 4) bytes come first; ``raw`` must be longer than that.

    In order of preference: behind a line end between two characters that are no white space, behind the last of several
    line ends, behind any line end, before a space, between two characters of UTF-8.
    """
    at, second = limit, 0
    for _ in range(TRIES):
        at = raw.rfind(b"\n", 0, at)
        if at < 1:
            break
        # white space beside a line end may be one token with it, so that a cut there could change tokens
        if raw[at + 1] not in SPACE:
            if raw[at - 1] not in SPACE:
                return at + 1
            second = second or at + 1
    if second or (second := raw.rfind(b"\n", 0, limit) + 1):
        return second
    if (at := raw.rfind(b" ", 1, limit)) > 0:
        return at
    at = limit
    # a character has at most four bytes: at most three steps back
    while at > limit - 3 and raw[at] & 0xC0 == 0x80:  # a continuation byte
        at -= 1
    return at


def stretches(parts: Iterator[bytes], offset: int = 0, line: int = 1) -> Iterator[tuple[bytes, int, int, bool]]:
    """(bytes, offset, line, whether they are the last) of ``parts``, at least one and each of at most
    ``PIECE`` bytes.
    """
    buffer = bytearray()
    for part in parts:
        buffer += part
        start = 0
        while len(buffer) - start > PIECE:
            # a byte more than a piece: where to cut depends on the one behind
            window = bytes(buffer[start : start + PIECE + 1])
            raw = window[: cut(window, PIECE)]
            yield raw, offset, line, False
            start, offset, line = start + len(raw), offset + len(raw), line + raw.count(b"\n")
        del buffer[:start]
    yield bytes(buffer), offset, line, True


class PieceReader:
    """The pieces of files in order, from a position on.

    Text is found again by seeking, a compressed file by decompressing it up to there, a table by its reader's state.

    Args:
        files: what to read.
        position: what ``position()`` of a reader of the same files returned.

    Raises:
        SourceError: while iterating, a file cannot be read.
    """

    def __init__(self, files: Sequence[SourceFile], position: dict[str, Any] | None = None) -> None:
        self.files = files
        self._start: dict[str, Any] = position or {"file": 0, "within": None}
        # a function: a table's state is taken only when somebody asks for it
        self._position: Callable[[], dict[str, Any] | None] = lambda: self._start

    def position(self) -> dict[str, Any] | None:
        """Where the next piece starts, as plain data that fits into JSON;
        None between two pieces of one row of a table.
        """
        return self._position()

    def __iter__(self) -> Generator[Piece]:
        within = self._start["within"]
        for index in range(self._start["file"], len(self.files)):
            file = self.files[index]
            read = self._rows if file.is_table else self._text if file.format == "text" else self._html
            with contextlib.closing(read(file, index, within)) as pieces:
                yield from pieces
            within = None

    def _at(self, index: int, within: Any = None) -> None:
        self._position = lambda: {"file": index, "within": within}

    def _text(self, file: SourceFile, index: int, within: dict[str, int] | None) -> Generator[Piece]:
        survey_result, within = survey(file), within or {"offset": 0, "line": 1}
        with contextlib.closing(chunks(file, within["offset"])) as parts:
            for raw, offset, line, last in stretches(parts, **within):
                # before the piece is given out: whoever stops at it goes on behind it
                self._at(index + 1) if last else self._at(
                    index, {"offset": offset + len(raw), "line": line + raw.count(b"\n")}
                )
                yield Piece(file.path, _decode(raw, survey_result, file, offset), offset == 0, last, offset, line)

    def _html(self, file: SourceFile, index: int, within: None) -> Generator[Piece]:
        text = text_of_html(_decode(b"".join(chunks(file)), survey(file), file, 0))
        self._position = lambda: None
        for piece in _row_pieces(file.path, text):
            if piece.last:
                self._at(index + 1)
            yield piece

    def _rows(self, file: SourceFile, index: int, within: dict[str, Any] | None) -> Generator[Piece]:
        rows = TableRows(file, within)
        with contextlib.closing(iter(rows)) as texts:
            for row, text in texts:
                self._position = lambda: None
                for piece in _row_pieces(f"{file.path}:{row}", text):
                    if piece.last:
                        self._position = lambda: {"file": index, "within": rows.state()}
                    yield piece


def _row_pieces(document: str, text: str) -> Iterator[Piece]:
    for raw, offset, line, last in stretches(iter([text.encode()])):
        yield Piece(document, raw.decode("utf-8"), offset == 0, last, offset, line)


def _decode(raw: bytes, survey_result: Survey, file: SourceFile, offset: int) -> str:
    try:
        text = raw.decode(survey_result.encoding)
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{file.path} changed while it was read: byte {offset + error.start} is no {survey_result.encoding} any "
            "more"
        ) from error
    return text.removeprefix("\ufeff") if offset == 0 else text
