"""What was read of one file, as Arrow by asset, until it is put together with the others."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as arrow

from ...system.extras import needs_extra
from ..dataset import EVENTS, READINGS
from ..errors import PlantDataError

with needs_extra("industry", "data of plants"):
    import pandera.polars as pa
    import polars as pl

TABLES = {"readings": READINGS, "events": EVENTS}
CHECKED = 1000  # rows of a chunk that are checked against the schema
GROUP = 1_000_000  # rows of a row group at most
WAITING = 200_000  # rows of an asset that wait for others before they are written
UNSAFE = re.compile(r'[\x00-\x1f<>:"/\\|?*]')
RESERVED = re.compile(r"(?i)(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$)")
LONGEST = 100  # bytes of the name of a folder

CHECKS = {
    "readings": pa.DataFrameSchema(
        {
            "time": pa.Column(pl.Datetime("ns", "UTC")),
            "channel": pa.Column(pl.UInt16),
            "value": pa.Column(pl.Float64, nullable=True),
            "quality": pa.Column(pl.UInt16, pa.Check.lt(2048)),
            "source": pa.Column(pl.UInt16),
            "line": pa.Column(pl.UInt64, pa.Check.ge(1)),
        },
        strict=True,
        ordered=True,
    ),
    "events": pa.DataFrameSchema(
        {
            "time": pa.Column(pl.Datetime("ns", "UTC")),
            **{name: pa.Column(pl.String, nullable=name != "text") for name in EVENTS if EVENTS[name] == pl.String},
            "quality": pa.Column(pl.UInt16, pa.Check.lt(2048)),
            "source": pa.Column(pl.UInt16),
            "line": pa.Column(pl.UInt64, pa.Check.ge(1)),
        },
        strict=True,
        ordered=True,
    ),
}


def safe_names(names: list[str]) -> dict[str, str]:
    """A folder name for each machine, readable and different from the others, also where case does not count."""
    taken: set[str] = set()
    folders: dict[str, str] = {}
    for name in names:
        plain = UNSAFE.sub("_", name).strip(" .") or "asset"
        plain = plain.encode()[:LONGEST].decode(errors="ignore").strip(" .")
        plain = f"_{plain}" if RESERVED.match(plain) else plain
        chosen, number = plain, 1
        while chosen.casefold() in taken:
            number += 1
            chosen = f"{plain}-{number}"
        taken.add(chosen.casefold())
        folders[name] = chosen
    return folders


class PartWriter:
    """Writes rows of several assets, each table into its own file ``NUMBER-TABLE.arrow`` of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[tuple[str, str], int] = {}  # (asset, table): how many
        self._assets: list[str] = []
        self._open: dict[tuple[str, str], arrow.ipc.RecordBatchFileWriter] = {}
        self._waiting: dict[tuple[str, str], list[pl.DataFrame]] = {}

    def path(self, asset: str, table: str) -> Path:
        """Where the rows of an asset are."""
        if asset not in self._assets:
            self._assets.append(asset)
        return self.folder / f"{self._assets.index(asset)}-{table}.arrow"

    def write(self, asset: str, table: str, frame: pl.DataFrame) -> None:
        """Append rows; some may wait until `close`. Raises PlantDataError if they are not of the schema."""
        if frame.is_empty():
            return
        try:
            CHECKS[table].validate(frame.head(CHECKED))
        except (pa.errors.SchemaError, pa.errors.SchemaErrors) as error:
            raise PlantDataError(
                f"rows that were read are not of the schema of {table}: {error}",
                ["report this as a fault of prep", "name the form: --form", "leave the file out"],
            ) from error
        key = (asset, table)
        self.rows[key] = self.rows.get(key, 0) + frame.height
        waiting = self._waiting.setdefault(key, [])
        waiting.append(frame)
        if sum(each.height for each in waiting) >= WAITING:
            self._flush(key)

    def _flush(self, key: tuple[str, str]) -> None:
        frames = self._waiting.pop(key, [])
        if not frames:
            return
        table = pl.concat(frames).to_arrow()
        if key not in self._open:
            options = arrow.ipc.IpcWriteOptions(compression="lz4")
            self._open[key] = arrow.ipc.new_file(self.path(*key), table.schema, options=options)
        self._open[key].write_table(table)

    def close(self) -> None:
        """Write what waits, and end the files."""
        for key in list(self._waiting):
            self._flush(key)
        for writer in self._open.values():
            writer.close()
        self._open.clear()
