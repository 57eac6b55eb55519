"""Times of texts as nanoseconds since 1970."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import PlantDataError
from .timeline import Array, merged_intervals

SPANS = {"s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}  # seconds
ZONED = re.compile(r"(.*\d:?\d\d(?:\.\d+)?)\s*(?:Z|([+-])(\d\d):?(\d\d))")


def nanoseconds(text: str | None, file: Path | None = None, line: int | None = None, column: str | None = None) -> int:
    """ns since 1970 of an ISO 8601 text, UTC if it names no zone.

    Raises:
        PlantDataError: it is none; ``file``, ``line`` and ``column`` are named as its place.
    """
    zoned = ZONED.fullmatch((text or "").strip())
    sign, hours, minutes = zoned.group(2, 3, 4) if zoned else (None, None, None)
    try:
        moment = np.datetime64(zoned.group(1) if zoned else (text or "").strip(), "ns")
    except ValueError as error:
        raise PlantDataError(
            f"{text!r} is no time in ISO 8601",
            ["write it as 2024-03-01T12:00:00Z", "drop the line", "use hf-sparse-attn prep, which reads other forms"],
            file=file,
            line=line,
            column=column,
        ) from error
    if np.isnat(moment):
        raise PlantDataError("a time is missing", ["fill it in", "drop the line"], file=file, line=line, column=column)
    offset = (int(hours or 0) * 60 + int(minutes or 0)) * (-1 if sign == "-" else 1)
    return int(moment.astype(np.int64)) - offset * 60 * 10**9


def span_seconds(text: str, name: str = "the duration") -> float:
    """Seconds of a text like 90s, 5min, 6h, 2d or 1w.

    Raises:
        PlantDataError: it is no such text, or not above 0; the message calls it ``name``.
    """
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d|w)", text.strip())
    if parts is None or not float(parts[1]):
        raise PlantDataError(
            f"{name} is {text!r}",
            ["write a number above 0 and a unit, such as 5min or 6h", f"units are {', '.join(SPANS)}", "leave it out"],
        )
    return float(parts[1]) * SPANS[parts[2]]


def fault_intervals(spans: Sequence[tuple[str, str]], file: Path | None) -> Array:
    """Intervals int64 [F, 2] in ns of (start, end) texts, by time, those that touch as one; a point lasts 1 ns.

    Raises:
        PlantDataError: a text is no time, or a fault ends before it starts.
    """
    pairs = [[nanoseconds(start, file), nanoseconds(end, file)] for start, end in spans]
    for (start, end), span in zip(pairs, spans, strict=True):
        if end < start:
            raise PlantDataError(f"a fault ends before it starts: {span}", ["swap them", "drop it"], file=file)
    intervals = np.array(pairs, np.int64).reshape(-1, 2)
    intervals[:, 1] = np.maximum(intervals[:, 1], intervals[:, 0] + 1)
    return merged_intervals(intervals)
