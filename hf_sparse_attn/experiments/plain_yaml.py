"""YAML as plain data: the types of YAML 1.2's core schema, texts as keys, nothing twice, nothing endless.

``1e-4`` is a number, ``no``, ``1:30``, ``2026-01-01`` and ``010x`` are texts. PyYAML by itself reads YAML 1.1, where
the first is a text and the others are not. https://yaml.org/spec/1.2.2/#103-core-schema
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same events and nodes, some ten times as fast
MOST_CHARACTERS = 1_000_000
MOST_NODES = 20_000  # with every alias written out
MOST_LEVELS = 40
MOST_WHOLE = 2**63 - 1
WHOLE = re.compile(r"[-+]?(0|[1-9](_?[0-9])*)|0o[0-7]+|0x[0-9a-fA-F]+")
LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")  # eight to YAML 1.1, ten to 1.2
DECIMAL = re.compile(r"[-+]?(\.[0-9]+|[0-9](_?[0-9])*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


class PlainYamlError(ValueError):
    """A text that is no plain YAML; the message says where, and what to write."""


def read_yaml(text: str) -> Any:
    """The value that ``text`` holds: dicts with text keys, lists, texts, whole numbers below 2⁶³, finite numbers,
    booleans, None.

    Raises:
        PlainYamlError: it is no YAML, or holds a tag, a key that is no text or stands twice, a number that is none or
            may be read in two ways, or more than a megabyte, 40 levels or 20,000 values.
    """
    if len(text) > MOST_CHARACTERS:
        raise PlainYamlError(f"it has {len(text)} characters: at most {MOST_CHARACTERS} are read")
    try:
        _check_events(text)
        node = yaml.compose(text, Loader=LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise (
            error
            if isinstance(error, PlainYamlError)
            else PlainYamlError(f"it is not YAML: {' '.join(str(error).split())}")
        ) from error
    if node is None:
        return None
    # before values are made, which aliases multiply
    _count(node, {})
    return _value(node, "")


def _check_events(text: str) -> None:
    """Refuse what is nested too deep, which recursion would not survive, and explicit tags, which make other things
    than data.
    """
    level = 0
    for event in yaml.parse(text, Loader=LOADER):
        where = f"line {event.start_mark.line + 1}"  # type: ignore[union-attr]
        level += isinstance(event, yaml.CollectionStartEvent)
        level -= isinstance(event, yaml.CollectionEndEvent)
        if level > MOST_LEVELS:
            raise PlainYamlError(f"{where}: more than {MOST_LEVELS} levels stand inside of each other")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise PlainYamlError(f"{where}: it has the tag {tag!r}: only plain values are read, without a tag")


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node with every alias written out; ``known`` holds 0 for those whose parts are being counted."""
    if id(node) in known:
        if not known[id(node)]:
            raise PlainYamlError(f"line {node.start_mark.line + 1}: a value holds itself")
        return known[id(node)]
    known[id(node)] = 0
    total = 1 + sum(_count(part, known) for part in _parts(node))
    if total > MOST_NODES:
        raise PlainYamlError(
            f"line {node.start_mark.line + 1}: it holds more than {MOST_NODES} values, aliases written out"
        )
    known[id(node)] = total
    return total


def _value(node: yaml.Node, where: str) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(part, f"{where}[{at}]") for at, part in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, where)
    return _scalar(node, where) if _is_plain(node) else node.value


def _mapping(node: yaml.MappingNode, where: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in node.value:
        key = name.value
        # a key without quotes may be a number or a truth value
        if not isinstance(name, yaml.ScalarNode) or (_is_plain(name) and not isinstance(_scalar(name, where), str)):
            shown = key if isinstance(name, yaml.ScalarNode) else "a list or mapping"
            raise PlainYamlError(
                f"{_at(name, where)} has the key {shown}: keys are texts; write it in quotes if it is meant as one"
            )
        if key in values:
            raise PlainYamlError(f"{_at(name, where)} has the key {key!r} twice: remove one")
        values[key] = _value(value, f"{where}.{key}" if where else key)
    return values


def _is_plain(node: yaml.Node) -> bool:
    """A text without quotes, which may be something else than a text."""
    return isinstance(node, yaml.ScalarNode) and not node.style


def _scalar(node: yaml.Node, where: str) -> Any:
    text = node.value
    if text in WORDS:
        return WORDS[text]
    if LEADING_ZERO.fullmatch(text):
        raise PlainYamlError(
            f"{_at(node, where)} is {text}: write it without the leading 0, in quotes if it is a text, or 0o… if it "
            "is octal"
        )
    if WHOLE.fullmatch(text):
        return _whole(text, node, where)
    if DECIMAL.fullmatch(text) or SPECIAL.fullmatch(text):
        number = math.inf if SPECIAL.fullmatch(text) else float(text)
        if not math.isfinite(number):
            raise PlainYamlError(f"{_at(node, where)} is {text[:40]}: must be a finite number")
        return number
    return text


def _whole(text: str, node: yaml.Node, where: str) -> int:
    # digits in thousands take int() quadratic time
    number = int(text, 0 if text.startswith("0") else 10) if len(text) < 40 else MOST_WHOLE + 1
    if abs(number) > MOST_WHOLE:
        raise PlainYamlError(
            f"{_at(node, where)} is {text[:40]}{'…' * (len(text) > 40)}: whole numbers are at most 2^63 - 1"
        )
    return number


def _at(node: yaml.Node, where: str) -> str:
    return f"line {node.start_mark.line + 1}: {where or 'it'}"
