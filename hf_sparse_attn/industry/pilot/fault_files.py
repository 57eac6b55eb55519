"""Files that say when assets failed: CSV or JSON of intervals, or the truth about a generated plant."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...system.files import read_json
from ..errors import PlantDataError
from .time_texts import nanoseconds
from .timeline import Timeline

WAYS = (
    "write a CSV file with the columns asset, start, end, and kind if there are several kinds",
    "name truth.json of a generated plant",
    "say labels, where events of the data are labelled",
)


@dataclass(frozen=True)
class Fault:
    """``start`` and ``end``: ISO 8601, UTC without a zone, the end excluded; ``kind`` empty where none is given."""

    asset: str
    start: str
    end: str
    kind: str


def read_faults(path: str | Path, assets: Sequence[str]) -> list[Fault]:
    """Faults of a CSV file with the columns asset, start, end and perhaps kind, of a JSON list of objects with these
    keys, or of a ``truth.json``. Without ``asset`` they are of the only asset.

    Raises:
        PlantDataError: the file is missing or empty, a column or time is, or an asset is none of ``assets``.
    """
    path = Path(path)
    if not path.is_file():
        raise PlantDataError("there is no such file of faults", WAYS, file=path)
    rows = _json_rows(path) if path.suffix.lower() == ".json" else _csv_rows(path)
    faults = [_fault(values, line, path, assets) for line, values in rows]
    if not faults:
        raise PlantDataError("holds no fault", WAYS, file=path)
    return faults


def kinds_of(faults: Sequence[Fault]) -> list[str]:
    """The kinds that are named, sorted."""
    return sorted({fault.kind for fault in faults} - {""})


def of_kind(faults: Sequence[Fault], kind: str | None) -> list[Fault]:
    """Faults of one kind, all for None. Raises PlantDataError if there are none of it."""
    chosen = [fault for fault in faults if kind in (None, fault.kind)]
    if not chosen:
        known = ", ".join(kinds_of(faults)) or "none: the file names no kinds"
        raise PlantDataError(
            f"no fault is of kind {kind!r}", [f"name one of {known}", "leave it out to take all faults together"]
        )
    return chosen


def spans_of(faults: Sequence[Fault], asset: str) -> list[tuple[str, str]]:
    """(Start, end) of every fault of an asset."""
    return [(fault.start, fault.end) for fault in faults if fault.asset == asset]


def within_record(timeline: Timeline) -> Timeline:
    """The same without faults that lie outside of the record; a note says how many.

    Raises:
        PlantDataError: all of them do.
    """
    begin, end = int(timeline.times[0]), int(timeline.times[-1]) + timeline.step
    inside = (timeline.faults[:, 1] > begin) & (timeline.faults[:, 0] < end)
    if inside.all():
        return timeline
    if not inside.any():
        first, last = (str(timeline.times[n].astype("datetime64[ns]").astype("datetime64[s]")) for n in (0, -1))
        raise PlantDataError(
            f"all {len(inside)} faults of asset {timeline.asset!r} lie outside of its record, {first} to {last} UTC",
            ["give times with their zone, as in 2024-03-01T12:00:00+09:00", "check the year", "leave the asset out"],
        )
    note = f"{int((~inside).sum())} of {len(inside)} faults lie outside of the record"
    return replace(timeline, faults=timeline.faults[inside], notes=(*timeline.notes, note))


def _json_rows(path: Path) -> Iterator[tuple[int | None, Mapping[str, Any]]]:
    try:
        values = read_json(path)
    except ValueError as error:
        raise PlantDataError(f"is no JSON ({error})", WAYS, file=path) from error
    rows = values.get("failures") if isinstance(values, Mapping) else values
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise PlantDataError("is neither a list of faults nor a truth.json", WAYS, file=path)
    # JSON has no lines: the place is the number of the fault
    yield from enumerate(rows, 1)


def _csv_rows(path: Path) -> Iterator[tuple[int | None, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            for column in ("start", "end"):
                if column not in names:
                    raise PlantDataError(f"has the columns {', '.join(names)}", WAYS, file=path, column=column)
            for row in reader:
                yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise PlantDataError(f"is no CSV file in UTF-8 ({error})", WAYS, file=path) from error


def _fault(values: Mapping[str, Any], line: int | None, path: Path, assets: Sequence[str]) -> Fault:
    asset = values.get("asset", assets[0] if len(assets) == 1 else None)
    if asset not in assets:
        raise PlantDataError(
            f"asset {asset!r} is not in the data",
            [f"name one of {', '.join(assets)}", "prepare its files, too", "drop the line"],
            file=path,
            line=line,
            column="asset",
        )
    texts = {name: values.get(name) for name in ("start", "end")}
    start, end = (nanoseconds(_text(text), path, line, name) for name, text in texts.items())
    if end < start:
        raise PlantDataError(
            f"a fault ends before it starts: {texts['start']}, {texts['end']}",
            ["swap the two", "correct them", "drop the line"],
            file=path,
            line=line,
        )
    return Fault(str(asset), str(texts["start"]), str(texts["end"]), str(values.get("kind") or ""))


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)
