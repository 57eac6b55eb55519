"""Classes that are made at run time: a mixin in front of a stock class, one for each stock class."""

from __future__ import annotations

import sys
from threading import Lock
from typing import Any

_LOCK = Lock()
_MADE: dict[tuple[type, ...], type] = {}


class MadeMixin:
    """Base of the mixins: an instance pickles as mixin, stock class and state, and so loads in a process that made no class yet."""

    @classmethod
    def over(cls, stock: type) -> type:
        """The class made of this mixin and ``stock``."""
        return make_class(cls, stock)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        cls = type(self)
        return (_blank, cls.__bases__, *reduced[2:]) if _MADE.get(cls.__bases__) is cls else reduced


def _blank(mixin: type[MadeMixin], stock: type) -> Any:
    cls: Any = mixin.over(stock)
    return cls.__new__(cls)


def make_class(mixin: type, stock: type, **namespace: Any) -> type:
    """``Sparse<stock>``, made once; an attribute of the mixin's module, where pickle looks for the class itself."""
    with _LOCK:  # two threads that load models must not make two classes
        if (mixin, stock) not in _MADE:
            name = f"Sparse{stock.__name__}"
            made = type(name, (mixin, stock), {"__module__": mixin.__module__, "__qualname__": name, **namespace})
            setattr(sys.modules[mixin.__module__], name, made)
            _MADE[mixin, stock] = made
        return _MADE[mixin, stock]
