"""One asset of a plant: its plan, its raw files chunk by chunk, and what is true of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .causal_links import Plan, plan_of
from .fault_plan import DataFault, Faults, RawFile, first_days, folds
from .log_files import LogFile, log_files
from .log_stream import LogStream
from .machine_channels import Sensor, sensors_of
from .message_catalogue import JSON, OTEL, TEXT
from .operating_schedule import STATES, Schedule, schedule_of
from .plant_settings import DAY, PlantSettings, PlantSettingsError
from .plant_truth import Place, PlantTruth, iso
from .random_streams import stream
from .raw_files import ParquetFile, TextFile
from .sensor_signals import Signals
from .sensor_tables import LongTable, Span, WideTable

LOCAL, UTC, UTC_MS = "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S%.3fZ"
DAY_FIRST = "%d/%m/%Y %H:%M:%S"
HOUR = 3600
COUNTER = Sensor("energy", "", "kWh", 1.0, 122.0, 1, 0.0, 1.5, 0.0, 1, 0.0, 1e6)


@dataclass
class AssetPlan:
    """Everything about an asset that is known before a line of it is written.

    Raises:
        PlantSettingsError: the failures or data faults have no room in the record.
    """

    settings: PlantSettings
    number: int
    asset: str
    faults: Faults

    def __post_init__(self) -> None:
        self.schedule: Schedule = schedule_of(self.settings, self.asset)
        self.plan: Plan = plan_of(self.settings, self.asset, self.schedule)
        self.wide, self.long = sensors_of(self.settings, self.asset)
        self.files = self._files()
        self.data_faults = self.faults.of(self.asset, self.files, self.wide, self.schedule, self.plan)
        self.data_faults += [
            DataFault("dst_fold", self.asset, file.path, start, end, values={"zone": self.settings.zone})
            for file in self.files.values()
            for start, end in folds(self.settings)
            # one in UTC may change to local times
            if file.local or any(fault.kind == "zone_change" for fault in self._faults_in(file))
        ]

    def _files(self) -> dict[str, RawFile]:
        kinds, folder = self.faults.kinds(self.asset), f"raw/{self.asset}"
        local = self.number % 2 == 0
        stamp = DAY_FIRST if "day_first_dates" in kinds else LOCAL if local or "zone_change" in kinds else UTC
        tables = "parquet" if self.number % 2 else "csv"
        files = {
            "wide": RawFile(f"{folder}/historian.csv", "csv-wide", local, stamp),
            "long": RawFile(
                f"{folder}/process_data.{tables}", f"{tables}-long", False, UTC_MS if tables == "csv" else ""
            ),
            "text": log_files(self.asset, self.number)[0],
            "json": RawFile(f"{folder}/maintenance.jsonl", "jsonl", False),
            "otel": RawFile(f"{folder}/gateway.otlp.json", "otel", False),
        }
        if "time_ambiguous" in kinds:
            files["short"] = RawFile(f"{folder}/counter.csv", "csv-wide", True, DAY_FIRST)
        return files

    def faults_of(self, name: str) -> list[DataFault]:
        """The data faults of one of its files."""
        return self._faults_in(self.files[name])

    def _faults_in(self, file: RawFile) -> list[DataFault]:
        return [fault for fault in self.data_faults if fault.file == file.path]

    def spans(self, sensors: list[Sensor]) -> list[Span]:
        """Readings of these sensors that show planted events."""
        names = {sensor.name for sensor in sensors}
        return [
            Span(number, event.channel, *span)
            for number, (event, span) in enumerate(zip(self.plan.events, self.plan.spans, strict=True), 1)
            if event.channel in names
        ]


class AssetWriter:
    """The open files of an asset; used once."""

    def __init__(self, known: AssetPlan, folder: Path, stack: ExitStack) -> None:
        self.known, settings = known, known.settings
        self.outs = {name: self._open(folder, name, stack) for name in known.files}
        self.signals = Signals(settings, known.asset, known.schedule, known.plan.excursions)
        self.lines = LogStream(settings, known.asset, known.schedule, known.plan.lines)
        self.wide = WideTable(settings, self.outs["wide"], known.wide, known.faults_of("wide"), known.spans(known.wide))
        # the power is shown by both, and no event by it
        self.long = LongTable(settings, self.outs["long"], known.long, known.faults_of("long"), known.spans(known.long))
        styles = {"text": log_files(known.asset, known.number)[1], "json": "jsonl", "otel": "otel"}
        self.logs = [
            LogFile(settings, self.outs[name], log, styles[name], known.faults_of(name))
            for name, log in (("text", TEXT), ("json", JSON), ("otel", OTEL))
        ]
        self._written, self._ordinals = 0, np.zeros(len(known.plan.events), dtype=np.int64)

    def _open(self, folder: Path, name: str, stack: ExitStack) -> TextFile:
        file, asset = self.known.files[name], self.known.asset
        if file.form == "parquet-long":
            return stack.enter_context(closing(ParquetFile(folder, file, asset)))
        header: dict[str, list[str]] = {
            "wide": WideTable.header(self.known.wide, self.known.faults_of("wide")),
            "long": list(LongTable.HEADER),
            "short": WideTable.header([COUNTER], []),
        }
        return stack.enter_context(closing(TextFile(folder, file, asset, header.get(name))))

    def write(self, chunk_days: int, advance: Callable[[int], None]) -> None:
        """Write the whole record."""
        if "short" in self.outs:
            self._write_counter()
        begin, end = self.known.settings.begin, self.known.settings.end
        for start in range(begin, end, chunk_days * DAY):
            stop = min(start + chunk_days * DAY, end)
            times, values, moments, tags, readings = self.signals.chunk(start, stop)
            self.wide.write(times, values)
            self.long.write(moments, tags, readings)
            lines = self.lines.chunk(start, stop)
            self._count(lines["time"].to_numpy(), start * 1000, stop * 1000)
            for log in self.logs:
                log.write(lines)
            advance((stop - start) // DAY)

    def _count(self, times: np.ndarray, start: int, stop: int) -> None:
        """How many log lines of the asset stand before each event that starts in this chunk."""
        starts = np.array([begin for begin, _ in self.known.plan.spans], dtype=np.int64)
        here = (starts >= start) & (starts < stop)
        self._ordinals[here] = self._written + np.searchsorted(times, starts[here])
        self._written += len(times)

    def _write_counter(self) -> None:
        """An hourly counter over the first days of a month."""
        known = self.known
        first, last = first_days(known.settings)
        hours = np.arange(first // 1000, last // 1000, HOUR)
        within = hours[:, None] + np.arange(0, HOUR, 60)
        load = known.schedule.levels[known.schedule.at(within.ravel())].reshape(within.shape).mean(axis=1)
        noise = COUNTER.noise * stream(known.settings.seed, "counter", known.asset).standard_normal(len(hours))
        values = np.round(np.maximum(COUNTER.base + COUNTER.gain * load + noise, 0), COUNTER.decimals)
        table = WideTable(known.settings, self.outs["short"], [COUNTER], known.faults_of("short"), [])
        table.write(hours * 1000, {COUNTER.name: values})

    def tell(self, truth: PlantTruth) -> None:
        """Add what is true of this asset, after its files are closed.

        Raises:
            PlantSettingsError: a data fault is so small that no row has it.
        """
        known = self.known
        for name, out in self.outs.items():
            offset = [fault.magnitude for fault in known.faults_of(name) if fault.kind == "clock_offset"]
            truth.sources.append(out.source(offset[0] if offset else 0.0))
            truth.stamps[out.file.path] = self._stamp(name)
        truth.channels += self._channels()
        truth.states += [
            {"asset": known.asset, "start": iso(1000 * start), "end": iso(1000 * end), "state": STATES[state]}
            for start, end, state in known.schedule.changes()
        ]
        self._tell_events(truth)
        for fault in known.data_faults:
            finding = fault.finding()
            if finding is not None:
                truth.findings.append(finding)
            elif fault.kind != "dst_fold":  # which a file may have no line in
                raise PlantSettingsError(
                    f"a plant's {fault.kind} is {fault.magnitude:g}, and {fault.file} has no row that it fell on: make "
                    "it larger, or the record longer"
                )

    def _tell_events(self, truth: PlantTruth) -> None:
        plan = self.known.plan
        place = {event.id: at for at, event in enumerate(plan.events)}
        for at, event in enumerate(plan.events):
            event.places = [*self._sensor_places(at + 1), *self._log_places(at + 1)]
            if event.failure is not None:
                event.lines_between = int(self._ordinals[place[event.failure]] - self._ordinals[at])
            role = event.id.split("/")[1]
            {"cause": truth.causes, "failure": truth.failures, "distractor": truth.distractors}[role].append(event)

    def _sensor_places(self, number: int) -> Iterator[Place]:
        for table in (self.wide, self.long):
            for span in table.spans:
                if span.event == number and span.lines.pair is not None:
                    yield Place(table.out.file.path, span.lines.pair, span.lines.count, span.channel)

    def _log_places(self, number: int) -> Iterator[Place]:
        for log in self.logs:
            found = log.found.get(number)
            if found is not None and found.lines.pair is not None:
                several = found.records.pair if log.log == OTEL else None
                yield Place(log.out.file.path, found.lines.pair, found.lines.count, records=several)

    def _stamp(self, name: str) -> dict[str, str]:
        """How a file says time."""
        file = self.known.files[name]
        if name == "json":
            return {"column": "ts", "format": "epoch milliseconds", "zone": "UTC"}
        if name == "otel":
            return {"column": "timeUnixNano", "format": "epoch nanoseconds", "zone": "UTC"}
        zone = self.known.settings.zone if file.local or "%:z" in file.stamp else "UTC"
        column = {"wide": "timestamp", "short": "timestamp", "long": "time"}.get(name, "")
        return {"column": column, "format": file.stamp or "timestamp[ns]", "zone": zone}

    def _channels(self) -> list[dict[str, object]]:
        known = self.known
        wide, long = known.files["wide"].path, known.files["long"].path
        rows: dict[str, dict[str, object]] = {}
        for sensor in (*known.wide, *known.long):
            rows[sensor.name] = {
                "asset": known.asset,
                **{name: getattr(sensor, name) for name in ("name", "tag", "unit", "low", "high", "decimals")},
                "columns": {},
            }
        for column, sensor in enumerate(known.wide, 1):
            rows[sensor.name]["columns"] = {wide: column}
        for sensor in known.long:
            columns = rows[sensor.name]["columns"]
            rows[sensor.name]["columns"] = {**(columns if isinstance(columns, dict) else {}), long: sensor.tag}
        return list(rows.values())
