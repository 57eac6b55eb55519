"""Whether bytes are UTF-8, Latin-1, or UTF-8 that was damaged."""

from __future__ import annotations

import codecs

from .sources import SourceError

ASCII = bytes(range(128))
REPLACEMENT = "\ufffd"


class EncodingCheck:
    """Reads the bytes of a text part by part; `encoding` says what they were."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.bad, self.first_bad, self.beyond_ascii, self.size = 0, 0, 0, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, part: bytes, final: bool = False) -> None:
        """Take the next part; ``final`` ends the text."""
        pending = self._decoder.getstate()[0]  # the start of a character that goes on in this part
        if part.isascii() and not pending:
            self.size += len(part)
            return
        whole = pending + part
        bad = self._decoder.decode(part, final).count(REPLACEMENT) - whole.count(REPLACEMENT.encode())
        if bad and not self.bad:
            try:
                whole.decode("utf-8")
            except UnicodeDecodeError as error:
                self.first_bad = self.size - len(pending) + error.start
        self.bad += bad
        self.beyond_ascii += len(part.translate(None, ASCII))
        self.size += len(part)

    def encoding(self) -> str:
        """ "utf-8", or "latin-1" where the bytes beyond ASCII are no UTF-8.

        Raises:
            SourceError: most of them are UTF-8, and some are not: read as Latin-1, all the others would be lost.
        """
        self.add(b"", final=True)
        if self.bad and 2 * self.bad < self.beyond_ascii:
            raise SourceError(
                f"{self.path} is UTF-8 but for {self.bad} damaged characters, the first at byte {self.first_bad}: repair it, or drop them "
                "with `iconv -c -f utf-8 -t utf-8`"
            )
        return "latin-1" if self.bad else "utf-8"
