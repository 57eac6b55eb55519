"""What is true of a generated plant, as ``truth.json`` holds it: what was planted, where it stands, what follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ...system.files import read_json, write_json
from ..dataset import Source
from ..errors import PlantDataError
from ..findings import Finding

FILE = "truth.json"
FORMAT = 1


def iso(milliseconds: float) -> str:
    """Milliseconds since 1970 as ISO 8601 in UTC."""
    moment = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=round(milliseconds))
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass
class Place:
    """Where something stands: first and last line of a file, from 1, both included (of Parquet: rows).

    Attributes:
        count: how many of these lines, or of the records in them, belong to it.
        channel: the sensor, if it is one.
        records: the same two as numbers of log records, where a line holds several (OpenTelemetry).
    """

    file: str
    lines: tuple[int, int]
    count: int
    channel: str | None = None
    records: tuple[int, int] | None = None


@dataclass
class PlantedEvent:
    """A cause, a failure or a distractor.

    Attributes:
        id: e.g. ``press-1/cause/3``.
        kind: of causes "valve", "seal", "pressure dip" (of the failure "overheating") and "bearing noise" (near
            precursor of the failure "trip"); of distractors "valve look-alike", "seal look-alike", "hot spell".
        start, end: ISO 8601, UTC; of a single log line both are its time.
        channel: the sensor that shows it, if one does.
        templates: texts of its log lines, with ``<*>`` for parameters.
        causes: of a failure, ids of its causes; of two each would have been enough.
        failure: of a cause, id of what it leads to; None where nothing is linked.
        lag_s: of a cause, seconds from its start to that of the failure.
        lines_between: of a cause, log lines of the asset between the two starts.
        places: where it stands.
    """

    id: str
    asset: str
    kind: str
    start: str
    end: str
    channel: str | None = None
    templates: list[str] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    failure: str | None = None
    lag_s: float | None = None
    lines_between: int | None = None
    places: list[Place] = field(default_factory=list)


@dataclass
class PlantTruth:
    """Everything that was planted, and the files that it was written to.

    Attributes:
        settings: those of the plant.
        lag_s: the plant's lag, around which the single ones lie, also of a null plant, whose causes lead to nothing.
        begin, end: of the record, ISO 8601, UTC; the end is not included.
        sources: the raw files, paths from the plant's folder.
        stamps: by path, how the file says time: ``column``, ``format``, ``zone``.
        channels: by asset and sensor: ``asset``, ``name``, ``tag``, ``unit``, ``low``, ``high``, ``decimals``, and the
            files and columns that hold it.
        states: ``asset``, ``start``, ``end``, ``state``.
        causes, failures, distractors: see `PlantedEvent`.
        findings: the data faults, and ``dst_fold`` where the record has one.
    """

    settings: dict[str, Any]
    lag_s: float
    begin: str
    end: str
    assets: list[str]
    sources: list[Source] = field(default_factory=list)
    stamps: dict[str, dict[str, str]] = field(default_factory=dict)
    channels: list[dict[str, Any]] = field(default_factory=list)
    states: list[dict[str, str]] = field(default_factory=list)
    causes: list[PlantedEvent] = field(default_factory=list)
    failures: list[PlantedEvent] = field(default_factory=list)
    distractors: list[PlantedEvent] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    format: int = FORMAT

    @property
    def rows(self) -> int:
        """Lines of all files."""
        return sum(source.lines for source in self.sources)

    def links(self) -> list[tuple[PlantedEvent, PlantedEvent]]:
        """(cause, failure) of every planted link; none of a null plant's far failures."""
        failures = {failure.id: failure for failure in self.failures}
        return [(cause, failures[cause.failure]) for cause in self.causes if cause.failure is not None]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; without what is None."""
        values: dict[str, Any] = asdict(self)
        values["findings"] = [finding.to_dict() for finding in self.findings]
        # settings that are None say something
        return {name: value if name == "settings" else _whole(value) for name, value in values.items()}

    def write(self, folder: Path) -> None:
        """Write ``folder/truth.json``."""
        write_json(folder / FILE, self.to_dict())

    @classmethod
    def read(cls, folder: str | Path) -> PlantTruth:
        """Read ``folder/truth.json``. Raises PlantDataError if there is none, or of another format."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise PlantDataError(
                f"holds no generated plant: there is no {FILE}",
                ["write one: hf-sparse-attn synth FOLDER --plant", "name the folder that was given there"],
                file=folder,
            )
        values = read_json(path)
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, Mapping) else None
            raise PlantDataError(
                f"is of format {found!r}, this version reads {FORMAT}",
                ["write the plant again with this version", "install the version that wrote it"],
                file=path,
            )
        known = {name: values[name] for name in (f.name for f in fields(cls)) if name in values}
        known["sources"] = [Source(**source) for source in values["sources"]]
        known["findings"] = [Finding.from_dict(finding) for finding in values["findings"]]
        for name in ("causes", "failures", "distractors"):
            known[name] = [_event(event) for event in values[name]]
        return cls(**known)


def _event(values: Mapping[str, Any]) -> PlantedEvent:
    places = [Place(**{**place, "lines": tuple(place["lines"])}) for place in values["places"]]
    for place in places:
        place.records = None if place.records is None else (place.records[0], place.records[1])
    return PlantedEvent(**{**values, "places": places})


def _whole(value: Any) -> Any:
    """Without keys whose value is None; tuples as lists, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _whole(part) for key, part in value.items() if part is not None}
    return [_whole(part) for part in value] if isinstance(value, list | tuple) else value
