"""The way of a `SparseCall` to attention modules whose model does not hand arguments of its forward on to them."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

from .call import SparseCall

# a context variable: threads and tasks that run models at once have a call each
_CALL: ContextVar[SparseCall | None] = ContextVar("sparse_call", default=None)


def ambient_call() -> SparseCall | None:
    """The call of the forward pass that runs now, if it has one."""
    return _CALL.get()


def taking_call(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` of a model class that also takes ``sparse_call``; its signature is as before."""

    @wraps(forward)
    def taking(model: Any, *args: Any, sparse_call: SparseCall | None = None, **kwargs: Any) -> Any:
        if sparse_call is None:
            return forward(model, *args, **kwargs)
        before = _CALL.set(sparse_call)
        try:
            return forward(model, *args, **kwargs)
        finally:
            _CALL.reset(before)

    return taking
