"""Whether bytes are UTF-8, Latin-1, UTF-8 that was damaged, or none of these."""

from __future__ import annotations

import codecs
import re

from .formats import FORMATS
from .package_cache import SourceError

LINE_END = b"\n"
ASCII = bytes(range(128))
REPLACEMENT = "\ufffd"
# control characters in Latin-1, which no text holds; letters and quotes elsewhere
CONTROL = re.compile(rb"[\x80-\x9f]")
# no word of Latin-1 has four such letters in a row, those of other scripts have little else
WORDS = re.compile(rb"[\x80-\xff]{4,}")
SAMPLE = 64  # bytes of such words that tell another script
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class EncodingCheck:
    """Reads the bytes of a text part by part; `encoding` says what they were."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.bad, self.first_bad, self.beyond_ascii, self.in_words, self.size, self.lines = 0, 0, 0, 0, 0, 0
        self.first_control: tuple[int, int] | None = None  # (place, byte)
        self._start = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, part: bytes, final: bool = False) -> None:
        """Take the next part; ``final`` ends the text.

        Raises:
            SourceError: the text is UTF-16 or UTF-32, or holds NUL bytes.
        """
        # a byte order mark has up to four bytes, which may come in several parts
        if len(self._start) < 4:
            self._start = (self._start + part)[:4]
        self._check_wide(part, final)
        pending = self._decoder.getstate()[0]  # the start of a character that goes on in this part
        # ASCII says nothing about the encoding
        if part.isascii() and not pending:
            self.size += len(part)
            return
        whole = pending + part
        # replacement characters that the text itself holds are no damage
        bad = self._decoder.decode(part, final).count(REPLACEMENT) - whole.count(REPLACEMENT.encode())
        if bad and not self.bad:
            # the decoder that replaces does not say where
            try:
                whole.decode("utf-8")
            except UnicodeDecodeError as error:
                self.first_bad = self.size - len(pending) + error.start
        self.bad += bad
        self.beyond_ascii += len(part.translate(None, ASCII))
        if self.bad:
            self.in_words += sum(map(len, WORDS.findall(part)))
        if self.first_control is None and (control := CONTROL.search(part)):
            self.first_control = (self.size + control.start(), control[0][0])
        self.size += len(part)

    def _check_wide(self, part: bytes, final: bool) -> None:
        marked = (
            [name for mark, name in MARKS.items() if self._start.startswith(mark)]
            if len(self._start) == 4 or final
            else []
        )
        at = part.find(b"\0")
        # in UTF-16 every second byte of ASCII is zero; from an even byte on pairs stay together
        if name := marked[0] if marked else utf_16_of(part[at & ~1 : (at & ~1) + 200]) if at >= 0 else "":
            raise SourceError(
                f"{self.path} looks like {name[:6].upper()}: convert it to UTF-8, `{_convert(name, self.path)}`"
            )
        if at >= 0:
            place = f"byte {self.size + at}, line {self.lines + part.count(LINE_END, 0, at) + 1}"
            raise SourceError(
                f"{self.path} holds zero bytes (NUL), the first at {place}. In a log they are left by copytruncate or "
                "a power loss: drop "
                f"them, `{_dropped(self.path)}`. Otherwise {self.path} is not text, and its name tells no format that "
                f"is read: {FORMATS}"
            )
        self.lines += part.count(LINE_END)

    def encoding(self) -> str:
        """ "utf-8", or "latin-1" where the bytes beyond ASCII are no UTF-8.

        Raises:
            SourceError: most of them are UTF-8, and some are not: read as Latin-1, all the others would be lost; or
                they are no letters of Latin-1, so the text is in another encoding.
        """
        self.add(b"", final=True)
        if not self.bad:
            return "utf-8"
        # less than one error for two bytes beyond ASCII: damaged UTF-8, not another encoding
        if 2 * self.bad < self.beyond_ascii:
            raise SourceError(
                f"{self.path} is UTF-8 but for {self.bad} damaged characters, the first at byte {self.first_bad}: "
                "repair it, or drop them "
                "with `iconv -c -f utf-8 -t utf-8`; if it is in another encoding, convert it"
            )
        if self.first_control is not None or self.in_words > max(SAMPLE, self.beyond_ascii / 2):
            place, byte = self.first_control or (self.first_bad, None)
            what = (
                f"byte {place} is 0x{byte:02x}" if byte else f"words at byte {place} and behind are of another script"
            )
            raise SourceError(
                f"{self.path} is neither UTF-8 nor Latin-1 ({what}): convert it from its own encoding, such as "
                f"`{_convert('windows-1252', self.path)}`"
            )
        return "latin-1"


def _convert(encoding: str, path: str) -> str:
    return f"iconv -f {encoding} -t utf-8 {path}"


def _dropped(path: str) -> str:
    return rf"tr -d '\000' < {path} > NEW"


def utf_16_of(raw: bytes) -> str:
    """Every other byte of letters of ASCII is zero: which UTF-16 that is, or nothing."""
    first, second = raw[::2].count(0), raw[1::2].count(0)
    if len(raw) < 8 or (first and second) or max(first, second) < 0.2 * len(raw):
        return ""
    return "utf-16be" if first else "utf-16le"
