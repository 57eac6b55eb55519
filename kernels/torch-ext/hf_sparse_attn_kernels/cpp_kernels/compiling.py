"""Compiling the C++ sources once for this processor and loading the result.

`torch.utils.cpp_extension.load` is not used: it needs ninja on the path, and the lock file of a build that was killed
blocks every later one. Here a library is kept under the hash of its content: what was cut off, changed or put there by
another user is compiled again, and never loaded. One process compiles at a time, and the system unlocks what it held if
it is killed.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from ..caching import VARIABLE, cache_folder, is_trusted, places

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "source"
FLAGS = ("-std=c++20", "-O3", "-fopenmp", "-fPIC", "-shared")
COMPILER_SECONDS = 1800  # far more than any machine needs
LEVEL_VARIABLE = "HF_SPARSE_ATTN_CPU"
# 1: for `make test-sanitizers`; the process must have loaded libasan first
SANITIZE_VARIABLE = "HF_SPARSE_ATTN_SANITIZE"
SANITIZED = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
# instruction sets of the x86-64 levels v3 and v4 as /proc/cpuinfo names them
V3 = {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
V4 = {*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# best first: what /proc/cpuinfo must list, and what the compiler is told
LEVELS: dict[str, tuple[set[str], tuple[str, ...]]] = {
    "avx512_bf16": ({*V4, "avx512_bf16"}, ("-march=x86-64-v4", "-mavx512bf16")),
    "avx512": (V4, ("-march=x86-64-v4",)),
    "avx2": (V3, ("-march=x86-64-v3",)),
}


LOADING = threading.Lock()

Function = TypeVar("Function", bound=Callable[..., object])


def constant_when_traced(function: Function) -> Function:
    """`torch.compiler.assume_constant_result` without what that imports: a second's worth of compiler, and Triton."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def compiler() -> str | None:
    """Command of the C++ compiler, quoted for a shell:
    ``$CXX``, a path or a command with options, else c++, g++ or clang++.
    """
    named = os.environ.get("CXX", "").strip()
    if not named:
        return next((shlex.quote(path) for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if path := shutil.which(named):
        return shlex.quote(path)
    try:
        program, *options = shlex.split(named)
    except ValueError:  # a quote that does not end
        return None
    return shlex.join([path, *options]) if (path := shutil.which(program)) else None


@cache
def processor_levels() -> tuple[str, ...]:
    """Those of LEVELS that this machine can run, best first."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return ()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    return tuple(name for name, (needed, _) in LEVELS.items() if needed <= flags)


def level() -> str | None:
    """What is compiled for: ``$HF_SPARSE_ATTN_CPU`` (one of LEVELS, or "none"), else the best that this
    processor has.
    """
    return os.environ.get(LEVEL_VARIABLE) or next(iter(processor_levels()), None)


def lacking() -> str | None:
    """Why the library cannot be built on this machine, or None."""
    wanted, runnable = level(), processor_levels()
    if wanted == "none":
        return f"{LEVEL_VARIABLE}=none forbids it; unset it"
    if wanted is None:
        return (
            f"{platform.system()} on {platform.machine()} is not supported; supported: Linux on x86-64 with AVX2 "
            "or AVX-512"
        )
    if wanted not in runnable:
        return f"{LEVEL_VARIABLE}={wanted!r} is not supported; supported here: {', '.join((*runnable, 'none'))}"
    if not any(SOURCE.glob("*.cpp")):  # the Hub's builds without native code hold Python files only
        return f"its C++ sources are not in {SOURCE}; pip install hf_sparse_attn"
    if compiler() is None:
        named = f" (now {os.environ['CXX']!r}, which is none)" if os.environ.get("CXX") else ""
        return f"no C++ compiler was found; install g++ 11 or later, or name one in the environment variable CXX{named}"
    return None


def folder() -> Path:
    """Where libraries are kept, where it can be written and is nobody else's."""
    return cache_folder() / "kernels"


def library(program: str, flags: tuple[str, ...]) -> Path:
    """The library that ``program`` compiles with ``flags``: ``cpu-<digest of all that it depends on>-<digest of its
    content>.so``.

    Raises:
        RuntimeError: the compiler failed; the message holds what it printed.
    """
    # torch's version is part of it: a library fits the C++ interface of one version
    digest = hashlib.sha256("\0".join([torch.__version__, program, *FLAGS, *flags]).encode())
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.read_bytes())
    name = f"cpu-{digest.hexdigest()[:16]}.so"
    for place in places("kernels"):
        if kept := _kept(place / name):
            return kept
        try:
            with _lock(place) as alone:
                compiled = _kept(place / name) or _compile(program, flags, place / name)
                if alone:
                    _clear(place, compiled)
            return compiled
        except OSError as error:
            failed = error
    raise RuntimeError(
        f"the CPU kernels cannot be kept anywhere ({failed}); set {VARIABLE} to a folder that can be written"
    )


def _kept(target: Path) -> Path | None:
    """The library ``target`` under the name that holds its digest, if it is there, whole, and nobody else's."""
    for path in sorted(target.parent.glob(f"{target.stem}-*{target.suffix}")):
        if is_trusted(path) and path == _named(target, path.read_bytes()):
            return path
        logger.warning("%s is damaged, or another user's: it is not loaded, the CPU kernels are compiled again", path)
    return None


def _named(target: Path, content: bytes) -> Path:
    return target.with_name(f"{target.stem}-{hashlib.sha256(content).hexdigest()[:32]}{target.suffix}")


@contextmanager
def _lock(place: Path) -> Iterator[bool]:
    """Wait until no other process compiles into ``place``;
    gives whether that is certain, as it is not on every network disk.
    """
    import fcntl

    with (place / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _clear(place: Path, library_file: Path) -> None:
    """Remove what killed compilations left, and damaged versions of ``library_file``."""
    for left in place.glob("tmp*"):
        shutil.rmtree(left, ignore_errors=True)
    for other in place.glob(f"{library_file.stem.rpartition('-')[0]}-*{library_file.suffix}"):
        if other != library_file:
            other.unlink(missing_ok=True)


def _compile(program: str, flags: tuple[str, ...], target: Path) -> Path:
    """Compile into a folder beside ``target``; on disk as a whole before it gets the name that holds its digest, which
    is returned.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    logger.warning("compiling the CPU kernels of sparse attention, once for this machine: about 25 s (%s)", target)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        places = [f"-isystem{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
        sources = map(str, sorted(SOURCE.glob("*.cpp")))
        command = [*shlex.split(program), *FLAGS, *flags, *places, *sources, "-lc10", "-ltorch_cpu", "-o", str(built)]
        try:
            alone = {**os.environ, "LD_PRELOAD": ""}  # a sanitizer is for this process
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=COMPILER_SECONDS, env=alone
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(
                f"compiling the CPU kernels took more than {COMPILER_SECONDS} s ({' '.join(command)})"
            ) from error
        if "No space left on device" in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(built))
        if done.returncode:
            raise RuntimeError(f"compiling the CPU kernels failed ({' '.join(command)}):\n{done.stderr[-4000:]}")
        built.chmod(0o755)
        _sync(built)
        # a rename within one file system is atomic: nobody loads half a library
        library_file = built.replace(_named(target, built.read_bytes()))
    # the name, too, must survive a power cut
    _sync(library_file.parent)
    return library_file


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@constant_when_traced
def unavailable() -> str | None:
    """Why this machine cannot run the C++ kernels, or None; builds and loads them at the first call."""
    return _load()


@cache
def _load() -> str | None:
    reason, program, chosen = lacking(), compiler(), level()
    if reason is not None or program is None or chosen is None:
        return reason
    flags = LEVELS[chosen][1] + (SANITIZED if os.environ.get(SANITIZE_VARIABLE) == "1" else ())
    try:
        with LOADING:  # several threads may come here at once
            _register(library(program, flags))
    except (RuntimeError, OSError, ValueError) as error:
        return f"{error} (kept where {VARIABLE} says: {folder()})" if isinstance(error, OSError) else str(error)
    return None


@cache
def _register(path: Path) -> None:
    from . import attention, routing

    torch.ops.load_library(path)
    attention.register()
    routing.register()
