"""Time and memory of one call, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..system.environment import peak_bytes

PAGE_BYTES = mmap.PAGESIZE


class BenchmarkError(RuntimeError):
    """A benchmark whose output is wrong; no time is reported."""


class PeakMemory:
    """Peak memory above that at the start of a ``with`` block, in bytes.

    On a GPU what torch allocated; else the resident memory of this process, sampled every 2 ms.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return self
        _release_freed_memory()
        self._start = self._peak = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._peak = max(self._peak, _resident())

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self._peak = peak_bytes("cuda")
            return
        # the last sample may be 2 ms old
        self._peak = max(self._peak, _resident())
        self._stop.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        return self._peak - self._start


def _resident() -> int:
    try:
        # pages: the second number of statm is what is resident
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES
    except FileNotFoundError:  # no Linux
        import psutil  # accelerate brings it

        return int(psutil.Process().memory_info().rss)


def _release_freed_memory() -> None:
    """Give memory that the C library holds on to back to the system (glibc only), so that a peak is not
    hidden by it.
    """
    libc = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(libc), "malloc_trim", None) if libc else None
    if trim is not None:
        trim(0)


def timed(function: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call; on a GPU between two events on the current stream."""
    if torch.device(device).type == "cuda":
        # events, not the host's clock: a launch returns before its work is done
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def alternate(
    functions: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Times of ``repeats`` rounds in which every function runs once: what disturbs the machine meets them all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(timed(function, device))
    return times


def spread(seconds: list[float]) -> dict[str, Any]:
    """Median, least and most of some times in seconds, with their number."""
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds), "n": len(seconds)}


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Median, least and most of the speed-ups of the rounds."""
    # by round: what disturbs the machine meets both of one
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
