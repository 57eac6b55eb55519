"""Messages to people on standard error: in colour on a terminal, plain elsewhere."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from tqdm import tqdm

STYLES = {"bold": "1", "dim": "2", "red": "1;31", "cyan": "1;36"}  # SGR parameters of ECMA-48


def is_terminal(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal that moves its cursor and shows colours."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


class Terminal:
    """Lines on ``file``, by default on what is standard error when they are written."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file

    def print(self, text: str, style: str = "", end: str = "\n") -> None:
        """Write ``text``, in one of `STYLES` where the stream is a terminal."""
        stream = self.file or sys.stderr
        shown = f"\x1b[{STYLES[style]}m{text}\x1b[0m" if style and is_terminal(stream) else text
        tqdm.write(shown, file=stream, end=end)  # above a bar that is being drawn
