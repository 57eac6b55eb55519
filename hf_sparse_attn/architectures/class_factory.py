"""Classes that are made at run time: a mixin in front of a stock class, one for each stock class."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

_LOCK = Lock()
_MADE: dict[tuple[type, ...], type] = {}
_MAKERS: dict[type, Callable[[Any], type]] = {}


class MadeMixin:
    """Base of the mixins: an instance pickles as mixin, stock class and state, and so loads in a process that made no
    class yet.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the first two entries name the made class, which an unpickling process may not have: bases instead
        reduced = super().__reduce_ex__(protocol)
        cls = type(self)
        return (_blank, cls.__bases__, *reduced[2:]) if _MADE.get(cls.__bases__) is cls else reduced


def makes(mixin: type[MadeMixin]) -> Callable[[Callable[[Any], type]], Callable[[Any], type]]:
    """Decorator: the function gives the class of ``mixin`` and a stock class, also where a pickle asks for it."""

    def note(maker: Callable[[Any], type]) -> Callable[[Any], type]:
        _MAKERS[mixin] = maker
        return maker

    return note


def _blank(mixin: type[MadeMixin], stock: type) -> Any:
    # a maker does more than to derive a class, e.g. registers it; a mixin without one needs no more than its bases
    maker = _MAKERS.get(mixin) or partial(make_class, mixin)
    cls: Any = maker(stock)
    return cls.__new__(cls)


def make_class(mixin: type, stock: type, **namespace: Any) -> type:
    """``Sparse<stock>``, made once; an attribute of its module, the mixin's unless given, where pickle looks for the
    class.
    """
    with _LOCK:  # two threads that load models must not make two classes
        if (mixin, stock) not in _MADE:
            name = f"Sparse{stock.__name__}"
            cls = type(name, (mixin, stock), {"__module__": mixin.__module__, "__qualname__": name, **namespace})
            module = vars(sys.modules[cls.__module__])
            if name not in module or module[name] in _MADE.values():  # a class of the package's own keeps its name
                module[name] = cls
            _MADE[mixin, stock] = cls
        return _MADE[mixin, stock]


def accepted_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names that ``function`` takes arguments by: its parameters, and old names of them that a decorator of
    Transformers replaces.
    """
    names, inner = list(inspect.signature(function).parameters), function
    # a decorator keeps the old and the new name as variables of its closure; the signature has the new one only
    while inner is not None:
        cells = getattr(inner, "__closure__", None) or ()
        held = (
            dict(zip(inner.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True)) if cells else {}
        )
        if held.get("new_name") in names and isinstance(held.get("old_name"), str):  # `deprecate_kwarg`
            names.append(held["old_name"])
        inner = getattr(inner, "__wrapped__", None)  # type: ignore[assignment]
    return tuple(names)
