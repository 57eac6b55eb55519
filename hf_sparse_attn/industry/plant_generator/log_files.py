"""Log lines as plants hand them over: a text log in one of three styles, JSON lines, and OpenTelemetry's JSON.

The OpenTelemetry file has an export request on each line, as the collector's file exporter writes it
(https://opentelemetry.io/docs/specs/otel/protocol/file-exporter/).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt

from ...system.extras import needs_extra
from .fault_injection import RowFaults, epochs
from .fault_plan import DataFault, Lines, RawFile
from .message_catalogue import OTEL, templates
from .plant_settings import PlantSettings
from .raw_files import TextFile
from .sensor_tables import time_texts

with needs_extra("industry", "generated plants"):
    import polars as pl

MINUTE = 60_000  # milliseconds; records of one minute are one export request
SEVERITY = {"INFO": 9, "WARNING": 13, "ERROR": 17}  # numbers of OpenTelemetry
PRIORITY = {"INFO": 14, "WARNING": 12, "ERROR": 11}  # RFC 5424: facility user
WITHOUT_TEMPLATE = 10  # of so many templates one has no log.record.template

# style of a text log: its form of time stamps, whether that is local time without an offset
STYLES = {
    "application": ("%Y-%m-%d %H:%M:%S,%3f", True),
    "bgl": ("%Y-%m-%d-%H.%M.%S.%6f", False),
    "syslog": ("%Y-%m-%dT%H:%M:%S%.3f%:z", False),
}


@dataclass
class Found:
    """Lines of a file that belong to an event, and numbers of its records where a line holds several."""

    lines: Lines = field(default_factory=Lines)
    records: Lines = field(default_factory=Lines)


class LogFile:
    """One log of an asset: `write` appends the lines of a chunk that go there."""

    def __init__(
        self, settings: PlantSettings, out: TextFile, log: int, style: str, faults: Sequence[DataFault]
    ) -> None:
        self.settings, self.out, self.log, self.style = settings, out, log, style
        self.rows = RowFaults(settings.seed, faults)
        self.found: dict[int, Found] = {}
        self._records = 0

    def write(self, lines: pl.DataFrame) -> None:
        """Append those lines of `LogStream.chunk` that belong to this log."""
        mine = np.array([template.log == self.log for template in templates()])[lines["template"].to_numpy()]
        lines = lines.filter(pl.Series(mine))
        times = lines["time"].to_numpy()
        texts = self._texts(lines, times)
        if self.log == OTEL:
            minute = times // MINUTE
            place = np.cumsum(np.diff(minute, prepend=minute[:1] - 1) != 0)
            texts = _requests(self.out.asset, texts, place)
        else:
            place = np.arange(1, len(times) + 1)
        numbers = place + self.out.lines
        for fault in self.rows.faults:
            fault.see(numbers[fault.covers(times)], times[fault.covers(times)])
        self._see(lines["event"].to_numpy(), numbers)
        self.out.append(texts.to_frame())

    def _see(self, events: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64]) -> None:
        for row in np.flatnonzero(events).tolist():
            found = self.found.setdefault(int(events[row]), Found())
            found.lines.see(numbers[row : row + 1])
            found.records.see(np.array([self._records + row + 1]))
        self._records += len(events)

    def _texts(self, lines: pl.DataFrame, times: npt.NDArray[np.int64]) -> pl.Series:
        if self.log == OTEL:
            return _records(lines)
        if self.style == "jsonl":
            changes = self.rows.of_kind("epoch_unit_change")
            stamps = pl.Series("stamp", epochs(changes[0] if changes else None, times))
            pieces = _json_pieces()
        else:
            stamp, local = STYLES[self.style]
            # an offset is written of local time, too
            zone = self.settings.zone if local or self.style == "syslog" else "UTC"
            stamps = time_texts(times, stamp, zone).alias("stamp")
            pieces = _text_pieces(self.style, self.out.asset)
        chosen = [piece.gather(lines["template"]) for piece in pieces]
        frame = lines.with_columns(stamps, (lines["time"] // 1000).alias("seconds"), *chosen)
        days = [time_texts(times, "%Y.%m.%d", "UTC").alias("day")] if self.style == "bgl" else []
        return frame.with_columns(days).select(pl.concat_str(*_order(self.style)).alias("line"))["line"]


def _order(style: str) -> list[str | pl.Expr]:
    """Columns whose texts are a line; literal texts between."""
    if style == "bgl":
        return [pl.lit("- "), "seconds", pl.lit(" "), "day", "before", "stamp", "middle", "text"]
    return ["before", "stamp", "middle", "text", "behind"]


def _pieces(before: list[str], middle: list[str], behind: list[str]) -> list[pl.Series]:
    named = (("before", before), ("middle", middle), ("behind", behind))
    return [pl.Series(name, texts, dtype=pl.String) for name, texts in named]


@cache
def _text_pieces(style: str, asset: str) -> list[pl.Series]:
    """What stands around stamp and text in each template's lines."""
    known = templates()
    nothing = [""] * len(known)
    if style == "application":
        return _pieces(nothing, [f" {t.level} [{t.component}] " for t in known], nothing)
    if style == "bgl":
        middle = [f" {asset} RAS {t.component.upper()} {t.level} " for t in known]
        return _pieces([f" {asset} "] * len(known), middle, nothing)
    before = [f"<{PRIORITY[t.level]}>1 " for t in known]
    return _pieces(before, [f" {asset} {t.component} - - - " for t in known], nothing)


@cache
def _json_pieces() -> list[pl.Series]:
    known = templates()
    middle = [f',"level":"{t.level}","component":"{t.component}","message":"' for t in known]
    return _pieces(['{"ts":'] * len(known), middle, ['"}'] * len(known))


@cache
def _otel_pieces() -> list[pl.Series]:
    before, middle, behind = [], [], []
    for number, template in enumerate(templates()):
        attributes = [{"key": "component", "value": {"stringValue": template.component}}]
        if number % WITHOUT_TEMPLATE:
            attributes.append({"key": "log.record.template", "value": {"stringValue": template.masked}})
        severity = f'"severityNumber":{SEVERITY[template.level]},"severityText":"{template.level}"'
        before.append('{"timeUnixNano":"')
        middle.append(f'000000",{severity},"body":{{"stringValue":"')
        behind.append('"},"attributes":' + json.dumps(attributes, separators=(",", ":")) + "}")
    return _pieces(before, middle, behind)


def _records(lines: pl.DataFrame) -> pl.Series:
    chosen = [piece.gather(lines["template"]) for piece in _otel_pieces()]
    return lines.with_columns(chosen).select(pl.concat_str("before", "time", "middle", "text", "behind"))["before"]


def _requests(asset: str, records: pl.Series, place: npt.NDArray[np.int64]) -> pl.Series:
    """Records of one place as one export request each."""
    resource = {"attributes": [{"key": "host.name", "value": {"stringValue": asset}}]}
    before = f'{{"resourceLogs":[{{"resource":{json.dumps(resource, separators=(",", ":"))},"scopeLogs":[{{"scope":'
    before += '{"name":"gateway"},"logRecords":['
    grouped = pl.DataFrame({"place": place, "record": records}).group_by("place", maintain_order=True)
    joined = grouped.agg(pl.col("record").str.join(","))["record"]
    return (before + joined + "]}]}]}").alias("line")


def log_files(asset: str, number: int) -> tuple[RawFile, str]:
    """The text log of the ``number``-th asset, and its style."""
    style = list(STYLES)[number % len(STYLES)]
    stamp, local = STYLES[style]
    return RawFile(f"raw/{asset}/controller.log", "text", local, stamp), style
