"""The chronological split of a prepared folder, and windows that cover a part of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from ..dataset import Split
from ..errors import PlantDataError

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EARLIEST, LATEST = -(1 << 63), (1 << 63) - 1


@dataclass(frozen=True)
class Part:
    """A stretch of time in nanoseconds since 1970: what starts at ``start`` or later and ends by ``stop``."""

    name: str
    start: int
    stop: int


def nanoseconds(time: str) -> int:
    """Nanoseconds since 1970 of an ISO 8601 time, in UTC where it names no zone."""
    moment = datetime.fromisoformat(time)
    return (moment.replace(tzinfo=moment.tzinfo or UTC) - EPOCH) // timedelta(microseconds=1) * 1000


def split_parts(split: Split | None) -> list[Part]:
    """``train`` and ``test``, or ``all`` where nothing is split. What lies in the gap between them is in neither.

    Raises:
        PlantDataError: evaluation starts before training ends.
    """
    if split is None:
        return [Part("all", EARLIEST, LATEST)]
    end, start = nanoseconds(split.train_end), nanoseconds(split.test_start)
    if start < end:
        raise PlantDataError(
            f"evaluation starts ({split.test_start}) before training ends ({split.train_end})",
            ["prepare the data again with a split", "correct split in dataset.json"],
        )
    return [Part("train", EARLIEST, end), Part("test", start, LATEST)]


def window_starts(size: int, length: int, stride: int) -> list[int]:
    """Starts of windows of ``length`` that cover ``size`` places; the last one ends with them.

    One window of less than ``length`` where there are no more places.
    """
    if size <= 0:
        return []
    starts = list(range(0, max(size - length, 0), stride))
    return [*starts, max(size - length, 0)]
