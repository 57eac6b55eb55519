"""Gradient checkpointing of sparse models: never the reentrant kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any


def without_reentrance(function: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpointing ``function`` with ``use_reentrant=False``, which is set where nothing else was asked for.

    Raises:
        ValueError: reentrant checkpointing was asked for, or ``function`` knows no other.
    """
    # Transformers hands over a partial of torch's function with the keyword arguments that were asked for
    reentrant = getattr(function, "keywords", {}).get("use_reentrant")  # torch's default is True
    parameters = inspect.signature(function).parameters
    takes = "use_reentrant" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if reentrant or not takes:
        raise ValueError(
            "gradient checkpointing of a sparse model needs use_reentrant=False: the reentrant kind drops the "
            "gradient of what "
            'the routers learn from. Pass {"use_reentrant": False} as its keyword arguments, or none at all'
        )
    return function if reentrant is False else partial(function, use_reentrant=False)
