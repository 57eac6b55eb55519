"""Values of recipes against the type hints of what they are for: whole numbers, numbers, texts, lists of them."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
    dict: "a mapping",
    list: "a list",
}


class KindError(ValueError):
    """A value of the wrong kind; the message names the key, the value and what is allowed."""


def fitted(value: Any, hint: Any, where: str) -> Any:
    """``value`` as ``hint`` wants it; whole numbers may be written as 1e3. Raises KindError."""
    if hint is Any:
        return value
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _fitted_to_one(value, parts, where)
    if origin in (tuple, list) or hint in (tuple, list):
        return _fitted_list(value, parts, where)
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)) or hint is dict:
        if not isinstance(value, Mapping):
            raise KindError(f"{where} is {shown(value)}: must be a mapping")
        return {name: fitted(part, parts[1] if parts else Any, f"{where}.{name}") for name, part in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    # below 2⁵³ a float of a whole number is exact
    if hint is int and type(value) is float and value.is_integer() and abs(value) < 2**53:
        return int(value)
    # type, not isinstance: True is an int there
    if type(value) is not hint:
        raise KindError(f"{where} is {shown(value)}: must be {_name(hint)}{_fix(value, hint)}")
    return value


def checked_fields(values: Mapping[str, Any], cls: type, where: str) -> dict[str, Any]:
    """Values of fields of the dataclass ``cls``, each as its hint wants it; names are checked elsewhere.
    Raises KindError.
    """
    hints = get_type_hints(cls)
    return {name: fitted(value, hints[name], f"{where}.{name}") for name, value in values.items()}


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _fitted_to_one(value: Any, hints: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in hints:
        return None
    others = [hint for hint in hints if hint is not type(None)]
    for hint in others:
        try:
            return fitted(value, hint, where)
        except KindError:
            # with one kind to choose, its own error says more
            if len(others) == 1:
                raise
    raise KindError(f"{where} is {shown(value)}: must be {' or '.join(map(_name, hints))}")


def _fitted_list(value: Any, parts: tuple[Any, ...], where: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise KindError(f"{where} is {shown(value)}: must be a list")
    if parts and parts[-1] is not Ellipsis and len(parts) > 1 and len(value) != len(parts):
        raise KindError(f"{where} is {shown(value)}: must be a list of {len(parts)}")
    # tuple[int, str] has a hint for each place, tuple[int, ...] and list[int] one for all
    hints = parts if len(parts) == len(value) and Ellipsis not in parts else (parts[0] if parts else Any,) * len(value)
    return [fitted(part, hint, f"{where}[{at}]") for at, (part, hint) in enumerate(zip(value, hints, strict=True))]


def _name(hint: Any) -> str:
    return NAMES.get(hint) or NAMES.get(get_origin(hint)) or str(hint)


def _fix(value: Any, hint: Any) -> str:
    """What to write instead where a text looks like the number, or the other way round."""
    if hint in (int, float) and isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return ""
        return f", {value} without quotes"
    if hint is str and isinstance(value, int | float):
        return "; write it in quotes"
    return "; write true or false" if hint is bool and value in ("yes", "no", "on", "off") else ""
