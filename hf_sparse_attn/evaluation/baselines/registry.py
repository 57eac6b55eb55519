"""Selectors by name: those of this package and those that others register."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TypeVar

from ...attention.call import Selector
from .block_selector import SelectorError

Class = TypeVar("Class", bound=type)
TAKEN = {"dense": "dense attention, which every evaluation measures by itself"}
_classes: dict[str, type] = {}  # in the order in which tables show them


def register_selector(selector: Class) -> Class:
    """Make the class ``selector`` known by its ``name``; also a decorator.

    It is made without arguments, once for every evaluation, and called as `BlockSelector` is.

    Raises:
        SelectorError: it is no class with a name and what a selector needs, or the name is taken.
    """
    if not inspect.isclass(selector):
        raise SelectorError(f"register_selector got {selector!r}: must be a class, not an instance of one")
    name = getattr(selector, "name", None)
    # commas separate names in lists of selectors
    if not isinstance(name, str) or not name.strip() or name != name.strip() or "," in name:
        raise SelectorError(f"{selector.__name__}.name is {name!r}: must be a text without commas or spaces around it")
    missing = sorted(getattr(selector, "__abstractmethods__", ()))
    if missing or not any("__call__" in vars(base) for base in selector.__mro__):
        raise SelectorError(
            f"{selector.__name__} has no {', '.join(missing) or '__call__'}: derive it from BlockSelector"
        )
    holder = TAKEN.get(name) or (_path(_classes[name]) if name in _classes else None)
    if holder is not None:
        raise SelectorError(
            f"{_path(selector)}: the name {name!r} is that of {holder}; give another, or unregister_selector({name!r})"
        )
    _classes[name] = selector
    return selector


def unregister_selector(name: str) -> None:
    """Forget a selector, as before its class is defined again in a notebook.

    Raises:
        SelectorError: there is none of this name.
    """
    del _classes[_known(name)]


def selector_names(*, every: bool = False) -> tuple[str, ...]:
    """The names of the selectors that evaluations compare, in the order of tables.

    ``every``: also of those with a true ``on_request``, which are compared only where they are named.
    """
    return tuple(name for name, selector in _classes.items() if every or not getattr(selector, "on_request", False))


def make_selectors(names: Iterable[str] | None = None) -> dict[str, Selector]:
    """Selectors by name, in this order; without ``names`` those of `selector_names`.

    Raises:
        SelectorError: a name is unknown.
    """
    return {name: _classes[_known(name)]() for name in (selector_names() if names is None else names)}


def _known(name: str) -> str:
    if name not in _classes:
        raise SelectorError(
            f"there is no selector {name!r}; known: {', '.join(_classes)}. One of your own needs register_selector "
            "first"
        )
    return name


def _path(selector: type) -> str:
    return f"{selector.__module__}.{selector.__qualname__}"
