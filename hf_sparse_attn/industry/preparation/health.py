"""The health of prepared data as files: one for programs, one page for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...system.files import write_json, write_text
from ..dataset import Manifest
from ..findings import Finding
from .health_page import health_page
from .health_status import Health, Topic
from .health_words import Language

__all__ = ["Health", "Topic", "write_health"]


def write_health(folder: Path, manifest: Manifest, findings: Sequence[Finding], language: Language) -> Health:
    """Write ``health.json`` and the page ``health.html`` into a prepared folder.

    Raises:
        ValueError: a language other than "ja" and "en"; a number of a finding is not finite.
        PlantDataError: the manifest names a time zone that is not known.
    """
    health = Health(tuple(findings))
    page = health_page(folder, manifest, health, language)
    write_json(folder / "health.json", health.to_dict())
    write_text(folder / "health.html", page)
    return health
