"""Files of a plant -> a folder of assets, events and readings, each row with its file and line."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data.formats import COMPRESSIONS, SourceFile, identity, source_files
from ...data.sources import SourceError
from ...system.files import read_json, write_json
from ...system.progress import Progress, bar
from ..dataset import FORMAT, Manifest
from ..errors import PlantDataError
from ..findings import Finding
from .assembly import Part, assemble
from .clock_times import SurveyNeededError
from .file_reader import FilePart, FileReader
from .ingest_settings import IngestSettings
from .opened_file import OpenedFile, opened
from .text_blocks import sha256_of

PARTS = ".parts"  # folder of what was read of each file, until all are read
READ = 1  # of how files are read, counted up when that changes
RECORD = "part.json"


def ingest(
    sources: Sequence[str],
    folder: Path,
    settings: IngestSettings,
    *,
    parts: Path | None = None,
    shown: bool = False,
) -> tuple[Manifest, list[Finding]]:
    """Read files into ``folder``; what was read before a kill, of files that did not change since, is not read again.

    Args:
        sources: paths and globs.
        folder: gets ``assets/``; ``dataset.json`` is written by whoever calls.
        settings: how files are read.
        parts: folder that keeps what was read of each file, and is left to the caller; None = one in ``folder``, which
            goes when all is done.
        shown: whether progress is shown.

    Returns:
        What ``dataset.json`` is to hold, and what was found.

    Raises:
        PlantDataError: a file cannot be read; the message names the place and ways on.
    """
    files = _files(sources)
    assets = asset_names(files, settings)
    place = parts or folder / PARTS
    place.mkdir(parents=True, exist_ok=True)
    read: list[Part] = []
    with bar(shown) as progress:
        task = progress.add_task("reading", total=sum(file.size for file in files))
        for file, asset in zip(files, assets, strict=True):
            read.append(_part(file, asset, settings, place, progress, task))
            progress.update(task, advance=file.size, info=Path(file.path).name)
    manifest, findings = assemble(read, folder, settings.to_dict())
    if parts is None:
        shutil.rmtree(place)
    return manifest, findings


def _files(sources: Sequence[str]) -> list[SourceFile]:
    try:
        return source_files(sources)
    except SourceError as error:
        raise PlantDataError(
            str(error),
            ["name files, or globs in quotes", "name the files of folders: 'FOLDER/*.csv'", "check the folder"],
        ) from error


def asset_names(files: Sequence[SourceFile], settings: IngestSettings) -> list[str]:
    """The machine of each file: by the globs of the user, else its name without endings.

    Where folders hold files of one name, each folder is a machine, and its name that of its files.

    Raises:
        PlantDataError: a glob of the user matches no file.
    """
    used: set[str] = set()
    names = []
    stems = [_stem(file) for file in files]
    folders: dict[str, set[Path]] = {}
    for file, stem in zip(files, stems, strict=True):
        folders.setdefault(stem, set()).add(Path(file.path).resolve().parent)
    by_folder = any(len(places) > 1 for places in folders.values())
    for file, stem in zip(files, stems, strict=True):
        chosen = next((name for name, globs in settings.assets.items() if _matches(file.path, globs)), None)
        if chosen is not None:
            used.add(chosen)
        names.append(chosen or (Path(file.path).resolve().parent.name if by_folder else stem))
    if missing := [name for name in settings.assets if name not in used]:
        raise PlantDataError(
            f"asset {missing[0]!r} has no file: none matches {', '.join(settings.assets[missing[0]])}",
            [
                "quote the glob, so that the shell leaves it",
                f"give its files, too: there are {len(files)}",
                "leave this asset out",
            ],
        )
    return names


def _matches(path: str, globs: Sequence[str]) -> bool:
    full = str(Path(path).resolve())
    return any(
        fnmatch.fnmatch(each, glob)
        for each in (path, full, Path(path).name)
        for glob in (*globs, *map(os.path.abspath, globs))
    )


def _stem(file: SourceFile) -> str:
    name = Path(file.path).name
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return Path(name).stem or name


def _part(file: SourceFile, asset: str, settings: IngestSettings, place: Path, progress: Progress, task: int) -> Part:
    """What is read of a file: kept from an earlier run, or new."""
    if file.format == "hub":
        raise PlantDataError(
            f"{file.path} is a dataset of the Hub", ["save it as Parquet", "name the files of a copy", "leave it out"]
        )
    try:
        same = json.dumps([FORMAT, READ, identity(file), asset, settings.to_dict()])
    except SourceError as error:
        raise PlantDataError(
            str(error), ["check its path", "check its permissions", "name a copy of it"], file=file.path
        ) from error
    target = place / hashlib.sha256(same.encode()).hexdigest()[:32]
    if (target / RECORD).is_file():
        return Part(target, read_json(target / RECORD))
    scratch = place / f".{target.name}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()

    def advance(line: int) -> None:
        progress.update(task, info=f"{Path(file.path).name}, line {line:,}")

    open_file = opened(file, settings, scratch)
    part = _read(open_file, asset, settings, scratch, advance)
    write_json(scratch / RECORD, _record(open_file, part, asset))
    scratch.rename(target)
    return Part(target, read_json(target / RECORD))


def _read(open_file: OpenedFile, asset: str, settings: IngestSettings, folder: Path, advance: Any) -> FilePart:
    reader = FileReader(open_file, asset, settings, folder)
    try:
        return reader.read(advance)
    except SurveyNeededError:
        reader.writer.close()
    reader = FileReader(open_file, asset, settings, folder)
    reader.survey()
    return reader.read(advance)


def _record(open_file: OpenedFile, part: FilePart, asset: str) -> dict[str, Any]:
    path = open_file.file.path
    named = {each for each, _ in part.writer.rows}
    return {
        "source": {
            "path": path,
            "form": open_file.form,
            "sha256": sha256_of(path),
            "bytes": os.stat(path).st_size,
            "lines": part.lines,
            "asset": asset if named <= {asset} else None,
        },
        "channels": [
            {
                "asset": each.asset,
                "name": each.name,
                "column": each.column,
                "unit": each.unit or next(iter(each.units), None),
            }
            for each in part.tables.channels
        ],
        "tables": [
            {"asset": each, "table": table, "file": part.writer.path(each, table).name}
            for each, table in part.writer.rows
        ],
        "findings": [finding.to_dict() for finding in part.findings],
        "notes": {
            "encoding": open_file.text.encoding if open_file.text else None,
            "decimal": open_file.decimal,
            "separator": open_file.separator,
            "empty_fields": {each.name: each.empty for each in part.tables.channels if each.empty},
        },
    }
