"""Where and with what a result was made."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .precision import computed_with

GIT_SECONDS = 20
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "evaluate", "triton", "hf_sparse_attn")


def package_versions() -> dict[str, str | None]:
    """Installed versions of the packages that matter, None for those that are missing."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def environment() -> dict[str, Any]:
    """Machine, versions, commit and time, for results."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu(),
        "instruction_set": computed_with(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "packages": package_versions(),
    }


def energy_joules(powercap: Path = Path("/sys/class/powercap")) -> float | None:
    """What the processor packages (Linux' RAPL counters) have used since some time in the past;
    None where it cannot be read.
    """
    try:
        # intel-rapl:0 is a package; intel-rapl:0:1 is a part of it and counted there
        counters = [path / "energy_uj" for path in powercap.iterdir() if path.name.count(":") == 1]
        # the counters are in microjoules
        return sum(int(counter.read_text()) for counter in counters) / 1e6 if counters else None
    except (OSError, ValueError):
        return None


def peak_process_bytes() -> int:
    """Most memory that this process had resident so far."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        import psutil  # accelerate brings it

        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_bytes(device_type: str | None = None) -> int:
    """Peak memory so far: what torch allocated on the GPU (None = if there is one), else the resident memory of this
    process.
    """
    if device_type == "cuda" or (device_type is None and torch.cuda.is_available()):
        return torch.cuda.max_memory_allocated()
    return peak_process_bytes()


class Cost:
    """What a ``with`` block took: ``figures`` are seconds, the process's peak memory so far, and energy where it can be
    read.
    """

    def __enter__(self) -> Cost:
        self._start, self._before = time.monotonic(), energy_joules()
        return self

    def __exit__(self, *_: object) -> None:
        after, before = energy_joules(), self._before
        energy = None if before is None or after is None or after < before else after - before  # counters wrap around
        self.figures = {
            "seconds": time.monotonic() - self._start,
            "peak_process_bytes": peak_process_bytes(),
            "cpu_energy_joules": energy,
        }


def _commit() -> str | None:
    folder = Path(__file__).parents[1]
    try:
        head, dirty = (_git(folder, *arguments) for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    except (OSError, subprocess.SubprocessError):
        return None  # not a checkout, or one whose disk does not answer
    return f"{head}{'+changes' if dirty else ''}"


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=GIT_SECONDS
    ).stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
