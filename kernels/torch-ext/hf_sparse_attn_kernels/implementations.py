"""Which implementation runs an operation: the one that was named, or the best that can."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

from .cpp_kernels.compiling import constant_when_traced, unavailable

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("reference", "torch", "cpp", "triton")
SCORE_IMPLEMENTATIONS = ("torch", "cpp", "triton")

_preferred: str | None = None


@constant_when_traced
def default_choice(device_type: str) -> tuple[str, str]:
    """The implementation used when none is named, and why; logged once per kind of device.

    On a CPU this compiles the C++ kernels if that was never done on this machine.
    """
    return _decide(device_type) if _preferred is None else (_preferred, "it was asked for")


@contextmanager
def preferred(impl: str) -> Iterator[None]:
    """Within a ``with`` block operations for which no implementation is named run ``impl`` where it can,
    else "torch".
    """
    global _preferred
    before, _preferred = _preferred, impl
    try:
        yield
    finally:
        _preferred = before


@cache
def _decide(device_type: str) -> tuple[str, str]:
    if device_type == "cuda":
        absent = "the package triton is not installed: pip install 'hf_sparse_attn[triton]'"
        chosen = ("triton", "a GPU, and triton is installed") if find_spec("triton") else ("torch", absent)
    elif device_type != "cpu":
        chosen = ("torch", "it runs on every torch device")
    elif (reason := unavailable()) is None:
        chosen = ("cpp", "its kernels are compiled for this processor")
    else:
        chosen = ("torch", f"without compiled kernels: {reason}")
    # without compiled kernels a CPU is slower, which would go unnoticed
    log = logger.warning if device_type == "cpu" and chosen[0] == "torch" else logger.info
    log("sparse attention on %s: implementation %r (%s)", device_type, *chosen)
    return chosen


def only_causal(impl: str) -> str:
    """Why a compiled implementation cannot score a bidirectional call."""
    return f'impl="{impl}": bidirectional attention is not supported by the scores; supported: causal. Use impl="torch"'


def choose(
    impl: str | None, supported: tuple[str, ...], device_type: str, lacking: Mapping[str, Callable[[], str | None]]
) -> str:
    """``impl`` if it is named and can run, else the default, else "torch".

    ``lacking[name]()`` says why an implementation cannot run on the inputs at hand, or None.

    Raises:
        ValueError: ``impl`` is unknown, or was named and cannot run: a named implementation is never replaced.
    """
    if impl is not None and impl not in supported:
        raise ValueError(f"impl={impl!r} is not an implementation of this operation; supported: {', '.join(supported)}")
    chosen = impl or default_choice(device_type)[0]
    reason = lacking[chosen]() if chosen in lacking else None
    if impl is not None and reason is not None:
        raise ValueError(reason)
    return chosen if chosen in supported and reason is None else "torch"
