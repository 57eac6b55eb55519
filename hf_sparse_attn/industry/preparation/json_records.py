"""JSON of sensors and logs: one object a line, or arrays and objects over many lines; OpenTelemetry's logs among them.

Each record has the line in which its object starts. OpenTelemetry: the JSON encoding of OTLP, ``resourceLogs`` ->
``scopeLogs`` -> ``logRecords`` (opentelemetry-proto, logs/v1).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from json.decoder import JSONObject  # type: ignore[attr-defined]
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any

from ...data.file_check import LARGEST_WHOLE
from ...system.extras import needs_extra
from ..errors import PlantDataError
from .csv_fields import BadLine
from .text_blocks import TextFile, blocks

with needs_extra("industry", "data of plants"):
    import polars as pl

AT = "\0at"  # key of the place of an object in its text; no key of JSON in use
ROWS = 100_000  # records of a chunk
TEMPLATE = "log.record.template"
EVENT_COLUMNS = ("stamp", "origin", "level", "text", "template", "label")
Record = tuple[int, dict[str, Any]]  # line, object


def is_lines(text: TextFile) -> bool:
    """Whether each line is an object of its own; else objects go over lines."""
    for block in blocks(text):
        for line in block.lines:
            if line.strip():
                return bool(line.lstrip().startswith("{") and line.rstrip().endswith("}"))
    return True


def records(text: TextFile) -> Iterator[tuple[list[Record], list[BadLine]]]:
    """The objects of a file, some at a time, and the lines that hold none.

    Raises:
        PlantDataError: objects go over lines, and the file is larger than can be read as a whole, or is no JSON.
    """
    yield from _by_line(text) if is_lines(text) else _whole(text)


def _by_line(text: TextFile) -> Iterator[tuple[list[Record], list[BadLine]]]:
    decoder = json.JSONDecoder(parse_float=str, parse_int=str)
    for block in blocks(text):
        found: list[Record] = []
        bad = [BadLine(block.first + at, what) for at, what in block.damaged.items()]
        for line, raw in enumerate(block.lines, block.first):
            if not raw.strip() or line - block.first in block.damaged:
                continue
            try:
                value = decoder.decode(raw)
            except (ValueError, RecursionError) as error:
                bad.append(BadLine(line, f"no JSON ({error}): {raw[:60]!r}"))
                continue
            if isinstance(value, dict):
                found.append((line, value))
            else:
                bad.append(BadLine(line, f"no object: {raw[:60]!r}"))
            if len(found) >= ROWS:
                yield found, bad
                found, bad = [], []
        yield found, bad


class _PlacedDecoder(json.JSONDecoder):
    """Puts the place of every object into it; in Python, as the scanner in C has no such hook."""

    def __init__(self) -> None:
        super().__init__(parse_float=str, parse_int=str)

        def placed(source: tuple[str, int], *rest: Any) -> tuple[dict[str, Any], int]:
            values, end = JSONObject(source, *rest)
            values[AT] = source[1] - 1
            return values, end

        self.parse_object = placed
        self.scan_once = py_make_scanner(self)


def _whole(text: TextFile) -> Iterator[tuple[list[Record], list[BadLine]]]:
    whole, size = [], 0
    for block in blocks(text):
        size += sum(map(len, block.lines)) + len(block.lines)
        if size > LARGEST_WHOLE:
            raise PlantDataError(
                f"holds JSON over several lines, more than {LARGEST_WHOLE >> 20} MB, which is read as a whole",
                [
                    "write one object a line: jq -c '.[]', or jq -c '.resourceLogs[]' for OpenTelemetry",
                    "split it",
                    "leave it out",
                ],
                file=text.file.path,
            )
        whole += block.lines.to_list()
    content = "\n".join(whole)
    starts = [0]
    for line in whole:
        starts.append(starts[-1] + len(line) + 1)
    found: list[Record] = []
    for value in _values(content, text.file.path):
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                _place(each, starts)
                found.append((each[AT], each))
    yield found, []


def _values(content: str, path: str) -> Iterator[Any]:
    decoder, at, end = _PlacedDecoder(), 0, len(content.rstrip())
    while at < end:
        if content[at].isspace() or content[at] == ",":
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(content, at)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", content.count("\n", 0, at) + 1)
            raise PlantDataError(
                f"is no whole JSON ({error})",
                ["copy it anew: it may be cut off", "repair the place", "write one object a line"],
                file=path,
                line=line,
            ) from error
        yield value


def _place(value: Any, starts: list[int]) -> None:
    """Lines in place of places, in an object and those within it."""
    if isinstance(value, dict):
        value[AT] = bisect_right(starts, value[AT])
        value = [part for key, part in value.items() if key != AT]
    if isinstance(value, list):
        for part in value:
            _place(part, starts)


# -- flat records ---------------------------------------------------------------------------------------------------


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """(name, text) of the fields of a record, those of objects within it as ``outer.inner``; true is 1."""
    for key, value in values.items():
        if key == AT:
            continue
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            yield prefix + key, str(int(value))
        elif value is None or isinstance(value, str):
            yield prefix + key, value
        else:
            yield prefix + key, json.dumps(value, ensure_ascii=False)


def flat_rows(text: TextFile, names: list[str]) -> Iterator[tuple[pl.DataFrame, list[BadLine]]]:
    """(columns ``0``, ``1`` … of text, by the place in ``names``, and ``line``; lines that are none).

    ``names`` grows by what later records hold.
    """
    places = {name: at for at, name in enumerate(names)}
    for found, bad in records(text):
        columns: list[list[str | None]] = [[None] * len(found) for _ in names]
        for row, (_, values) in enumerate(found):
            for name, value in flat(values):
                if name not in places:
                    places[name] = len(names)
                    names.append(name)
                    columns.append([None] * len(found))
                columns[places[name]][row] = value
        data = {str(at): pl.Series(values, dtype=pl.String) for at, values in enumerate(columns)}
        lines = pl.Series("line", [line for line, _ in found], dtype=pl.UInt64)
        yield pl.DataFrame({**data, "line": lines}), bad


# -- OpenTelemetry --------------------------------------------------------------------------------------------------


def is_otel(values: dict[str, Any]) -> bool:
    """Whether an object is of OpenTelemetry's logs."""
    return any(key in values for key in ("resourceLogs", "scopeLogs", "logRecords", "timeUnixNano"))


def otel_rows(text: TextFile) -> Iterator[tuple[pl.DataFrame, list[BadLine]]]:
    """(columns stamp, origin, level, text, template, label and line; lines that are none)."""
    for found, bad in records(text):
        rows: list[tuple[str | None, ...]] = []
        lines: list[int] = []
        for line, values in found:
            before = len(rows)
            try:
                for record, service in _log_records(values, None):
                    rows.append(_event(record, service))
                    lines.append(record.get(AT, line))
            except (AttributeError, TypeError, KeyError, ValueError) as error:
                del rows[before:], lines[before:]
                bad.append(BadLine(line, f"no logs of OpenTelemetry ({type(error).__name__}: {error})"))
        frame = pl.DataFrame(rows, schema=dict.fromkeys(EVENT_COLUMNS, pl.String), orient="row")
        yield frame.with_columns(line=pl.Series(lines, dtype=pl.UInt64)), bad


def _log_records(values: dict[str, Any], service: str | None) -> Iterator[tuple[dict[str, Any], str | None]]:
    if "timeUnixNano" in values or "observedTimeUnixNano" in values:
        yield values, service
        return
    inner: tuple[tuple[str, Callable[[dict[str, Any]], str | None]], ...] = (
        ("resourceLogs", lambda each: _attributes(each.get("resource", {})).get("service.name", service)),
        ("scopeLogs", lambda each: service or each.get("scope", {}).get("name")),
        ("logRecords", lambda each: service),
    )
    if not any(key in values for key, _ in inner):
        raise ValueError("neither resourceLogs nor a record with timeUnixNano")
    for key, name in inner:
        for each in values.get(key, []):
            yield from _log_records(each, name(each))


def _attributes(values: dict[str, Any]) -> dict[str, str]:
    return {each["key"]: _any_value(each.get("value", {})) for each in values.get("attributes", [])}


def _any_value(value: Any) -> str:
    """Text of an AnyValue."""
    if not isinstance(value, dict):
        return str(value)
    for kind in ("stringValue", "intValue", "doubleValue", "boolValue", "bytesValue"):
        if kind in value:
            return str(value[kind])
    plain = {key: part for key, part in value.items() if key != AT}
    return json.dumps(plain, ensure_ascii=False, default=str) if plain else ""


def _event(record: dict[str, Any], service: str | None) -> tuple[str | None, ...]:
    attributes = _attributes(record)
    stamp = str(record.get("timeUnixNano") or "0")
    if not stamp.strip("0"):  # not known by the source
        stamp = str(record.get("observedTimeUnixNano", ""))
    level = record.get("severityText") or _severity(record.get("severityNumber"))
    return stamp, service, level, _any_value(record.get("body", "")), attributes.get(TEMPLATE), None


def _severity(number: Any) -> str | None:
    """Name of a severity number (logs data model, "SeverityNumber": four each)."""
    if number is None or not str(number).isdigit() or not 1 <= int(number) <= 24:
        return None
    return ("TRACE", "DEBUG", "INFO", "WARN", "ERROR", "FATAL")[(int(number) - 1) // 4]
