"""Numbers for objects that an operator of a compiled graph must find: a graph carries numbers and tensors only."""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

_COUNT = itertools.count(1)
_OBJECTS: WeakValueDictionary[int, Any] = WeakValueDictionary()


def number(thing: Any) -> int:
    """A new number for ``thing``, valid in this process as long as ``thing`` lives. A copy needs one of its own."""
    given = next(_COUNT)
    _OBJECTS[given] = thing
    return given


def numbered(given: int) -> Any:
    """What has the number ``given``."""
    return _OBJECTS[given]
