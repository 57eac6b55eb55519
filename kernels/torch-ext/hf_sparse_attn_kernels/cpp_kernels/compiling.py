"""Compiling the C++ sources once for this processor and loading the result.

`torch.utils.cpp_extension.load` is not used: it needs ninja on the path, and the lock file of a build that was killed
blocks every later one. Here a library is written under a temporary name and renamed: builds at the same time are harmless.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from ..caching import cache_folder

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "source"
FLAGS = ("-std=c++20", "-O3", "-fopenmp", "-fPIC", "-shared")
LEVEL_VARIABLE = "HF_SPARSE_ATTN_CPU"
V3 = {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
V4 = {*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# best first: what /proc/cpuinfo must list, and what the compiler is told
LEVELS: dict[str, tuple[set[str], tuple[str, ...]]] = {
    "avx512_bf16": ({*V4, "avx512_bf16"}, ("-march=x86-64-v4", "-mavx512bf16")),
    "avx512": (V4, ("-march=x86-64-v4",)),
    "avx2": (V3, ("-march=x86-64-v3",)),
}


Function = TypeVar("Function", bound=Callable[..., object])


def constant_when_traced(function: Function) -> Function:
    """`torch.compiler.assume_constant_result` without what that imports: a second's worth of compiler, and Triton."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def compiler() -> str | None:
    """Path of the C++ compiler: ``$CXX``, else c++, g++ or clang++."""
    named = os.environ.get("CXX")
    return next((found for name in ([named] if named else ["c++", "g++", "clang++"]) if (found := shutil.which(name))), None)


@cache
def processor_levels() -> tuple[str, ...]:
    """Those of LEVELS that this machine can run, best first."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return ()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = set(next((line for line in lines if line.startswith("flags")), "").split())
    return tuple(name for name, (needed, _) in LEVELS.items() if needed <= found)


def level() -> str | None:
    """What is compiled for: ``$HF_SPARSE_ATTN_CPU`` (one of LEVELS, or "none"), else the best that this processor has."""
    return os.environ.get(LEVEL_VARIABLE) or next(iter(processor_levels()), None)


def lacking() -> str | None:
    """Why the library cannot be built on this machine, or None."""
    wanted, runnable = level(), processor_levels()
    if wanted == "none":
        return f"{LEVEL_VARIABLE}=none forbids it; unset it"
    if wanted is None:
        return f"{platform.system()} on {platform.machine()} is not supported; supported: Linux on x86-64 with AVX2 or AVX-512"
    if wanted not in runnable:
        return f"{LEVEL_VARIABLE}={wanted!r} is not supported; supported here: {', '.join((*runnable, 'none'))}"
    if not any(SOURCE.glob("*.cpp")):  # the Hub's builds without native code hold Python files only
        return f"its C++ sources are not in {SOURCE}; pip install hf_sparse_attn"
    if compiler() is None:
        return "no C++ compiler was found; install g++ 11 or later, or name one in the environment variable CXX"
    return None


def folder() -> Path:
    """Where libraries are kept."""
    return cache_folder() / "kernels"


def library(program: str, flags: tuple[str, ...]) -> Path:
    """The library that ``program`` compiles with ``flags``; its name is a digest of all that it depends on.

    Raises:
        RuntimeError: the compiler failed; the message holds what it printed.
    """
    digest = hashlib.sha256("\0".join([torch.__version__, program, *FLAGS, *flags]).encode())
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.read_bytes())
    target = folder() / f"cpu-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        _compile(program, flags, target)
    return target


def _compile(program: str, flags: tuple[str, ...], target: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    logger.warning("compiling the CPU kernels of sparse attention, once for this machine: about 25 s (%s)", target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        places = [f"-isystem{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
        sources = map(str, sorted(SOURCE.glob("*.cpp")))
        command = [program, *FLAGS, *flags, *places, *sources, "-lc10", "-ltorch_cpu", "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"compiling the CPU kernels failed ({' '.join(command)}):\n{done.stderr[-4000:]}")
        built.replace(target)


@constant_when_traced
def unavailable() -> str | None:
    """Why this machine cannot run the C++ kernels, or None; builds and loads them at the first call."""
    return _load()


@cache
def _load() -> str | None:
    reason, program, chosen = lacking(), compiler(), level()
    if reason is not None or program is None or chosen is None:
        return reason
    try:
        _register(library(program, LEVELS[chosen][1]))
    except (RuntimeError, OSError) as error:
        return str(error)
    return None


@cache
def _register(path: Path) -> None:
    from . import attention, routing

    torch.ops.load_library(path)
    attention.register()
    routing.register()
