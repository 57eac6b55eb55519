"""Subclasses that are made at run time, one for each stock class."""

from __future__ import annotations

import sys
from typing import Any

_MADE: dict[tuple[type, type], type] = {}


def subclass(mixin: type, stock: type, **namespace: Any) -> type:
    """The class ``Sparse<Stock>`` with ``mixin`` in front of ``stock``; always the same one for the same pair."""
    if (mixin, stock) not in _MADE:
        name = f"Sparse{stock.__name__}"
        made = type(name, (mixin, stock), {"__module__": __name__, "__qualname__": name, **namespace})
        _MADE[mixin, stock] = made
        setattr(sys.modules[__name__], name, made)  # picklable
    return _MADE[mixin, stock]
