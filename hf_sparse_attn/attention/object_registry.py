"""Numbers for objects that an operator of a compiled graph must find: a graph carries numbers and tensors only."""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_COUNT = itertools.count(1)
# weak: a number must not keep a layer or a cache alive
_OBJECTS: WeakValueDictionary[int, Any] = WeakValueDictionary()


def number(thing: Any) -> Tensor:
    """A new number for ``thing``, valid in this process as long as ``thing`` lives: int64 []. A copy needs one of its
    own.

    It is a tensor because a graph takes tensors from the object that it runs with: one graph serves all layers of a
    kind, and one that was kept on disk holds no number of the process that compiled it.
    """
    given = next(_COUNT)
    _OBJECTS[given] = thing
    return torch.tensor(given, dtype=torch.int64, device="cpu")


def numbered(given: Tensor) -> Any:
    """What has the number ``given``; None if it lives no more."""
    return _OBJECTS.get(int(given))
