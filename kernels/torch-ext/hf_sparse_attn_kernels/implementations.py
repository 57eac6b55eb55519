"""Which implementation runs an operation: the one that was named, or the best that can."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("reference", "torch", "triton")
SCORE_IMPLEMENTATIONS = ("torch", "triton")


@cache
def default_implementation(device_type: str) -> str:
    """The implementation used when none is named, logged once per kind of device."""
    impl = "triton" if device_type == "cuda" and find_spec("triton") is not None else "torch"
    logger.info("sparse attention on %s: implementation %r", device_type, impl)
    return impl


def choose(impl: str | None, supported: tuple[str, ...], device_type: str, lacking: Callable[[], str | None]) -> str:
    """``impl`` if it is named and can run, else the default; ``lacking`` says why Triton cannot run on these inputs, or None.

    Raises:
        ValueError: ``impl`` is unknown, or was named and cannot run: a named implementation is never replaced.
    """
    if impl is not None and impl not in supported:
        raise ValueError(f"impl={impl!r} is not an implementation of this operation; supported: {', '.join(supported)}")
    chosen = impl or default_implementation(device_type)
    if chosen == "triton" and (reason := lacking()) is not None:
        if impl is not None:
            raise ValueError(reason)
        return "torch"
    return chosen
