"""Files of a plant -> a whole prepared folder: read, analysed, reported on; never half of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...system.files import replaced_folder
from ..errors import PlantDataError
from .ingest import PARTS, ingest
from .ingest_settings import IngestSettings

if TYPE_CHECKING:
    from .analysis import AnalysisSettings
    from .health import Health

MANIFEST = "dataset.json"


def prepare(
    sources: Sequence[str],
    out: Path,
    settings: IngestSettings,
    language: Literal["ja", "en"] = "en",
    *,
    analysis: AnalysisSettings | None = None,
    shown: bool = False,
) -> Health:
    """Read files, analyse what they hold, and write ``dataset.json``, the tables, ``health.json`` and ``health.html``.

    ``out`` stays as it was until all is written. After a kill the same call goes on with the files that were not read.

    Args:
        sources: paths and globs.
        out: a new folder, an empty one, or one of an earlier call, which is replaced.
        settings: how files are read.
        language: of the page.
        analysis: how they are analysed; None = as `AnalysisSettings` has it.
        shown: whether progress is shown.

    Raises:
        PlantDataError: ``out`` holds something else, or a file cannot be read.
        OSError: ``out`` cannot be written.
    """
    refuse_other_folder(out)
    from .analysis import AnalysisSettings, analyse
    from .health import write_health

    with replaced_folder(out, MANIFEST) as new:
        # beside the temporary folder, which goes when the process is killed
        manifest, found = ingest(sources, new, settings, parts=out / PARTS, shown=shown)
        manifest, more = analyse(new, manifest, analysis or AnalysisSettings())
        manifest.write(new)
        health = write_health(new, manifest, [*found, *more], language)
    shutil.rmtree(out / PARTS)
    _remove_stale(out, manifest.assets)
    return health


def refuse_other_folder(out: Path) -> None:
    """Raises PlantDataError if a folder holds what prep did not write."""
    if not out.is_dir() or (out / MANIFEST).is_file() or (out / PARTS).is_dir():
        return
    if foreign := sorted(path.name for path in out.iterdir() if not path.name.startswith(".")):
        raise PlantDataError(
            f"holds {foreign[0]!r} and no dataset.json: prep writes into a folder of its own",
            ["name a new folder", "empty this one", "name a folder in it"],
            file=out,
        )


def _remove_stale(out: Path, assets: Sequence[str]) -> None:
    """Tables of machines that an earlier call had found and this one did not."""
    for folder in (out / "assets").iterdir():
        if folder.is_dir() and folder.name not in assets:
            shutil.rmtree(folder)
