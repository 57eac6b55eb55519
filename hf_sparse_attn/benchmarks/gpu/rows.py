"""The results of a stage, kept row by row."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ...system.environment import environment
from ...system.files import finite_results, write_json

Entry = tuple[str, Callable[[], dict[str, Any]]]


def run_entries(path: Path, entries: Iterable[Entry], seconds: float, **more: Any) -> dict[str, Any]:
    """Measure ``entries``, (label, function that returns a row), until ``seconds`` have passed; ``path`` is written
    after each.

    Returns:
        What the file holds: ``environment``, ``seconds`` taken, ``rows``, ``failed`` (label and error) and ``not_run``
        (labels), and ``more``.
    """
    start = time.monotonic()
    result: dict[str, Any] = {
        "environment": environment(),
        **more,
        "seconds": 0.0,
        "rows": [],
        "failed": [],
        "not_run": [],
    }
    for label, measure in entries:
        if time.monotonic() - start > seconds:
            result["not_run"].append(label)
            continue
        began = time.monotonic()
        try:
            row = measure()
        except Exception as error:  # one row that fails must not cost those after it
            result["failed"].append({"entry": label, "error": f"{type(error).__name__}: {error}"})
            say(f"{label}: {type(error).__name__}: {error}")
        else:
            took = time.monotonic() - began
            result["rows"].append({"entry": label, **row, "took_s": took})
            say(f"{label}: {took:.1f} s")
        result["seconds"] = time.monotonic() - start
        write_json(path, finite_results(result))
        release_memory()
    # once more: labels that were not run are noted without a row
    write_json(path, finite_results(result))
    return result


def release_memory() -> None:
    """Give back what the row before held, so that the next one's peak and room are its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
