"""A tidy dataset of a plant: a folder of Parquet files by asset, each row with the file and line it came from.

```
FOLDER/dataset.json                     sources, channels, settings, split
FOLDER/assets/ASSET/readings.parquet    numbers of sensors, schema `READINGS`
FOLDER/assets/ASSET/events.parquet      lines of logs, schema `EVENTS`
FOLDER/assets/ASSET/states.parquet      operating states, schema `STATES`
FOLDER/health.json, health.html         what was found
```

Rows stand in the order in which they stood in their files, file after file: nothing is sorted. `PlantDataset.readings`
and `events` sort by time when they are asked to, rows of equal time as they stood.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..system.extras import needs_extra
from ..system.files import read_json, write_json
from .errors import PlantDataError

with needs_extra("industry", "data of plants"):
    import polars as pl

FORMAT = 1
TIME: pl.DataType = pl.Datetime("ns", "UTC")

# source: number of the file in `Manifest.sources`; line: from 1, in a Parquet file the row from 1;
# quality: bits of `Quality`
READINGS = pl.Schema(
    {
        "time": TIME,
        "channel": pl.UInt16(),
        "value": pl.Float64(),
        "quality": pl.UInt16(),
        "source": pl.UInt16(),
        "line": pl.UInt64(),
    }
)
# origin: what wrote the line (component, service, node); template: as given by OpenTelemetry, else null;
# label: of a labelled benchmark, else null
EVENTS = pl.Schema(
    {
        "time": TIME,
        "origin": pl.String(),
        "level": pl.String(),
        "text": pl.String(),
        "template": pl.String(),
        "label": pl.String(),
        "quality": pl.UInt16(),
        "source": pl.UInt16(),
        "line": pl.UInt64(),
    }
)
STATES = pl.Schema({"start": TIME, "end": TIME, "state": pl.String()})


@dataclass(frozen=True)
class Source:
    """A file that was read. ``form``: csv-wide, csv-long, parquet-wide, parquet-long, jsonl, text, otel."""

    path: str
    form: str
    sha256: str
    bytes: int
    lines: int
    asset: str | None = None  # None: it names assets itself
    clock_offset: float = 0.0  # seconds that its clock is ahead; its times are corrected by it


@dataclass(frozen=True)
class Channel:
    """A sensor: its number in READINGS is its place in `Manifest.channels`."""

    asset: str
    name: str
    source: int
    column: int | None = None  # of a wide file, from 0
    unit: str | None = None
    # median and scale (1.4826 · median absolute deviation) of the training period, None before they are known
    center: float | None = None
    scale: float | None = None


@dataclass(frozen=True)
class Split:
    """Times (ISO 8601, UTC): training ends, then a gap of ``purge`` seconds, then evaluation starts."""

    train_end: str
    test_start: str
    purge: float


@dataclass
class Manifest:
    """What ``dataset.json`` holds."""

    assets: list[str]
    sources: list[Source]
    channels: list[Channel]
    settings: dict[str, Any] = field(default_factory=dict)
    split: Split | None = None
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write ``folder/dataset.json``, whole or not at all."""
        write_json(folder / "dataset.json", asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read ``folder/dataset.json``. Raises PlantDataError if there is none, or of another format."""
        path = folder / "dataset.json"
        if not path.is_file():
            raise PlantDataError(
                "holds no prepared data: there is no dataset.json",
                ["prepare it: hf-sparse-attn prep FILES --out FOLDER", "name the folder that --out of prep named"],
                file=folder,
            )
        values = read_json(path)
        if values.get("format") != FORMAT:
            raise PlantDataError(
                f"is of format {values.get('format')!r}, this version reads {FORMAT}",
                ["prepare the data again with this version", "install the version that wrote it"],
                file=path,
            )
        return cls(
            assets=values["assets"],
            sources=[Source(**source) for source in values["sources"]],
            channels=[Channel(**channel) for channel in values["channels"]],
            settings=values["settings"],
            split=None if values["split"] is None else Split(**values["split"]),
        )


class PlantDataset:
    """A prepared folder, opened for reading; nothing is loaded before it is asked for.

    Raises:
        PlantDataError: the folder holds no prepared data, or data of another format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)

    def readings(self, asset: str, *, in_order: bool = True) -> pl.LazyFrame:
        """Numbers of an asset's sensors, schema `READINGS`; ``in_order``: by time."""
        return self._frame(asset, "readings", READINGS, in_order)

    def events(self, asset: str, *, in_order: bool = True) -> pl.LazyFrame:
        """Lines of an asset's logs, schema `EVENTS`; ``in_order``: by time."""
        return self._frame(asset, "events", EVENTS, in_order)

    def states(self, asset: str) -> pl.LazyFrame:
        """Operating states of an asset, schema `STATES`."""
        return self._frame(asset, "states", STATES, False)

    def _frame(self, asset: str, name: str, schema: pl.Schema, in_order: bool) -> pl.LazyFrame:
        if asset not in self.manifest.assets:
            raise PlantDataError(
                f"has no asset {asset!r}", [f"name one of {', '.join(self.manifest.assets)}"], file=self.folder
            )
        path = self.folder / "assets" / asset / f"{name}.parquet"
        frame = pl.scan_parquet(path) if path.is_file() else pl.LazyFrame(schema=schema)
        return frame.sort("time", maintain_order=True) if in_order else frame
