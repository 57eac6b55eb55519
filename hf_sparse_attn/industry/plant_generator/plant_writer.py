"""Writes a plant: raw exports of every asset, streamed in chunks of time, and the truth about them.

```
FOLDER/truth.json
FOLDER/raw/ASSET/historian.csv                     wide: time, a column for each sensor
FOLDER/raw/ASSET/process_data.csv (or .parquet)    long: time, tag, value, quality
FOLDER/raw/ASSET/controller.log                    text, of one of three styles
FOLDER/raw/ASSET/maintenance.jsonl                 JSON lines, epoch milliseconds
FOLDER/raw/ASSET/gateway.otlp.json                 OpenTelemetry, an export request on each line
FOLDER/raw/ASSET/counter.csv                       only with the fault time_ambiguous
```
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from ...system.files import replaced_folder
from ...system.locks import LOCK
from ...system.progress import bar
from ..errors import PlantDataError
from .asset_writer import AssetPlan, AssetWriter
from .causal_links import lag_of
from .fault_plan import Faults
from .plant_settings import DAY, PlantSettings
from .plant_truth import FILE, PlantTruth, iso

MACHINES = ("press", "pump", "mill", "oven", "mixer", "fan")
CHUNK_ROWS = 200_000  # of one asset at a time, about


def asset_names(settings: PlantSettings) -> list[str]:
    """Names like press-1, pump-2, …"""
    return [f"{MACHINES[number % len(MACHINES)]}-{number + 1}" for number in range(settings.assets)]


def write_plant(
    folder: str | Path, settings: PlantSettings, *, chunk_days: int | None = None, progress: bool = True
) -> PlantTruth:
    """Write the raw exports of a plant into ``folder``, and ``truth.json``; whole or not at all.

    Args:
        folder: missing, empty, or a plant of the same settings, which is written anew.
        settings: what the plant is like.
        chunk_days: days of one asset that are in memory at a time; the bytes are the same for any.
        progress: show how far it is.

    Raises:
        PlantDataError: the folder holds something else.
        PlantSettingsError: the failures or data faults have no room in the record.
    """
    folder = Path(folder)
    check_plant_folder(folder, settings)
    days = max(1, CHUNK_ROWS // _rows_of_a_day(settings)) if chunk_days is None else chunk_days
    if days < 1:
        raise ValueError(f"chunk_days is {chunk_days}: must be a whole number from 1")
    names = asset_names(settings)
    truth = PlantTruth(
        settings.to_dict(), lag_of(settings), iso(1000 * settings.begin), iso(1000 * settings.end), names
    )
    faults = Faults(settings, names)
    for number, asset in enumerate(names):
        # what has no room is found before files are written; kept it would be large
        AssetPlan(settings, number, asset, faults)
    with replaced_folder(folder, FILE) as temporary, bar(progress) as shown:
        task = shown.add_task("days of assets written", total=settings.assets * settings.days)
        for number, asset in enumerate(names):
            with ExitStack() as stack:
                writer = AssetWriter(AssetPlan(settings, number, asset, faults), temporary, stack)
                writer.write(days, lambda done: shown.update(task, advance=done))
            writer.tell(truth)
        truth.write(temporary)
    return truth


def check_plant_folder(folder: Path, settings: PlantSettings) -> None:
    """Raise PlantDataError unless ``folder`` is missing, empty, or holds the plant of these settings."""
    if not folder.is_dir() or all(path.name == LOCK for path in folder.iterdir()):
        return
    ways = ["name another folder, or one that is empty", "move what it holds away"]
    if not (folder / FILE).is_file():
        raise PlantDataError("holds something else than a generated plant", ways, file=folder)
    # a plant with other files would leave some of the old ones beside the new
    if PlantTruth.read(folder).settings != settings.to_dict():
        raise PlantDataError(
            "holds a plant of other settings", [*ways, "give the settings of its truth.json"], file=folder
        )


def _rows_of_a_day(settings: PlantSettings) -> int:
    return DAY // settings.interval * (2 + settings.channels // 4) + settings.log_lines
