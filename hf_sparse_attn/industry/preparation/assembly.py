"""What was read of many files -> one folder of assets, channels numbered throughout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...system.extras import needs_extra
from ..dataset import Channel, Manifest, Source
from ..errors import PlantDataError
from ..findings import Finding
from .part_files import GROUP, TABLES, safe_names

with needs_extra("industry", "data of plants"):
    import polars as pl

MOST_SOURCES = 65_535
MOST_CHANNELS = 65_535


@dataclass(frozen=True)
class Part:
    """What was read of one file, as ``part.json`` in its folder has it."""

    folder: Path
    values: dict[str, Any]

    @property
    def assets(self) -> list[str]:
        """Its machines, by the names that the files have."""
        named = [channel["asset"] for channel in self.values["channels"]]
        return list(dict.fromkeys([*named, *(table["asset"] for table in self.values["tables"])]))

    def findings(self, folders: dict[str, str]) -> Iterator[Finding]:
        """What was found, machines by the names of their folders."""
        for values in self.values["findings"]:
            asset = values.get("asset")
            yield Finding.from_dict({**values, "asset": asset if asset is None else folders[asset]})


def assemble(parts: Sequence[Part], folder: Path, settings: dict[str, Any]) -> tuple[Manifest, list[Finding]]:
    """Write the tables of all assets into ``folder``, and say what ``dataset.json`` is to hold.

    Raises:
        PlantDataError: there are more files or channels than can be numbered.
    """
    if len(parts) > MOST_SOURCES:
        raise PlantDataError(
            f"{len(parts)} files are given, at most {MOST_SOURCES} are read",
            ["join files", "prepare them in groups", "name fewer with a narrower glob"],
        )
    folders = safe_names(list(dict.fromkeys(asset for part in parts for asset in part.assets)))
    channels, numbers = _channels(parts, folders)
    sources = [_source(part, folders) for part in parts]
    for asset, name in folders.items():
        for table in TABLES:
            _write(parts, numbers, asset, table, folder / "assets" / name / f"{table}.parquet")
    notes = {
        "ingest": settings,
        "asset_names": {name: asset for asset, name in folders.items()},
        "reading": [part.values["notes"] for part in parts],
    }
    manifest = Manifest(list(folders.values()), sources, channels, notes)
    return manifest, [finding for part in parts for finding in part.findings(folders)]


def _source(part: Part, folders: dict[str, str]) -> Source:
    values = part.values["source"]
    asset = values["asset"]
    return Source(**{**values, "asset": None if asset is None else folders.get(asset, asset)})


def _channels(parts: Sequence[Part], folders: dict[str, str]) -> tuple[list[Channel], list[list[int]]]:
    """All channels, and for each part the numbers of its own; a channel of several files is one."""
    channels: list[Channel] = []
    numbers: list[list[int]] = []
    known: dict[tuple[str, str], int] = {}
    for at, part in enumerate(parts):
        mine = []
        for values in part.values["channels"]:
            key = (values["asset"], values["name"])
            if key not in known:
                known[key] = len(channels)
                asset = folders[values["asset"]]
                channels.append(Channel(asset, values["name"], at, values["column"], values["unit"]))
            mine.append(known[key])
        numbers.append(mine)
    if len(channels) > MOST_CHANNELS:
        raise PlantDataError(
            f"the files have {len(channels)} channels, at most {MOST_CHANNELS} are numbered",
            ["name the column of the tag: --column channel=NAME", "prepare the files in groups", "leave files out"],
        )
    return channels, numbers


def _write(parts: Sequence[Part], numbers: list[list[int]], asset: str, table: str, target: Path) -> None:
    frames = []
    for at, part in enumerate(parts):
        for each in part.values["tables"]:
            if (each["asset"], each["table"]) == (asset, table):
                frames.append(_numbered(part.folder / each["file"], at, numbers[at]))
    if frames:
        target.parent.mkdir(parents=True, exist_ok=True)
        rows = pl.concat(frames).select(TABLES[table].names())
        rows.sink_parquet(target, compression="snappy", row_group_size=GROUP)


def _numbered(path: Path, source: int, numbers: list[int]) -> pl.LazyFrame:
    """The rows of one file with the numbers of their source and channels, and flags that came at its end."""
    rows = pl.scan_ipc(path)
    flags = path.with_name(f"{path.stem}-flags.arrow")
    if flags.is_file():
        rows = rows.with_row_index("row").join(pl.scan_ipc(flags), on="row", how="left", maintain_order="left")
        rows = rows.with_columns(pl.col("quality") | pl.col("flag").fill_null(0)).drop("row", "flag")
    if numbers and numbers != list(range(len(numbers))) and "channel" in TABLES[path.stem.partition("-")[2]]:
        number = pl.col("channel").replace_strict(range(len(numbers)), numbers, return_dtype=pl.UInt16)
        rows = rows.with_columns(channel=number)
    return rows.with_columns(source=pl.lit(source, dtype=pl.UInt16))
