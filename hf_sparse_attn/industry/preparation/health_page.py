"""The Data Health Report: one offline HTML page, in English or Japanese, with times in the plant's zone."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from ...system.extras import needs_extra
from ..dataset import Manifest, PlantDataset
from ..errors import PlantDataError
from ..findings import Finding
from ..offline_page import render_page
from .channel_series import iso_utc
from .finding_words import KIND_WORDS
from .health_status import RANK, TOPICS, Health
from .health_timeline import AssetTimeline, asset_timelines
from .health_words import DURATIONS, VALUE_WORDS, WORDS, Language

with needs_extra("industry", "the report on data health"):
    import polars as pl

SHOWN = 20  # findings of one kind that are written out
SYMBOLS = {"green": "●", "yellow": "▲", "red": "■"}  # a light is told by its shape and its word, not by colour alone


def health_page(folder: Path, manifest: Manifest, health: Health, language: Language) -> str:
    """The page as HTML, without a request to anywhere.

    Raises:
        ValueError: a language other than "ja" and "en".
        PlantDataError: the manifest names a time zone that is not known.
    """
    if language not in get_args(Language):
        raise ValueError(f"language={language!r}: one of {', '.join(get_args(Language))}")
    view = _View(manifest, language)
    timelines = asset_timelines(folder, manifest, health.findings)
    return render_page(
        "health.html",
        language=language,
        words=view.words,
        symbols=SYMBOLS,
        light=("green", "yellow", "red")[health.status],
        status=health.status,
        topics=health.topics,
        facts=view.facts(timelines),
        timelines=[(line, view.time(iso_utc(line.start)), view.time(iso_utc(line.end))) for line in timelines],
        groups=view.groups(health.findings),
        states=[(asset, view.states(PlantDataset(folder).states(asset))) for asset in manifest.assets],
        clocks=manifest.settings.get("analysis", {}).get("clocks", []),
        split=view.split(),
    )


class _View:
    """Findings and facts in the words of one language and the times of one zone."""

    def __init__(self, manifest: Manifest, language: Language) -> None:
        self.manifest, self.language = manifest, language
        self.words, self.kinds = WORDS[language], KIND_WORDS[language]
        name = str(manifest.settings.get("ingest", {}).get("zone") or "UTC")
        try:
            self.zone = ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError):
            raise PlantDataError(
                f"zone {name!r} in dataset.json is no known time zone",
                ["name one as in Asia/Tokyo", "name UTC", "install the package tzdata if the zone is right"],
            ) from None
        self.zone_name = name

    def time(self, text: str) -> str:
        """An ISO time in UTC as local time with its offset; fractions are left out."""
        at = datetime.fromisoformat(f"{text.partition('.')[0].removesuffix('Z')}+00:00").astimezone(self.zone)
        offset = at.strftime("%z")
        return f"{at:%Y-%m-%d %H:%M:%S} ({offset[:3]}:{offset[3:5]})"

    def facts(self, timelines: Sequence[AssetTimeline]) -> list[tuple[str, str]]:
        manifest, words = self.manifest, self.words
        facts = [
            (words["assets"], str(len(manifest.assets))),
            (words["channels"], str(len(manifest.channels))),
            (words["files"], str(len(manifest.sources))),
            (words["zone"], self.zone_name),
        ]
        if timelines:
            first, last = min(line.start for line in timelines), max(line.end for line in timelines)
            facts.append((words["period"], f"{self.time(iso_utc(first))} – {self.time(iso_utc(last))}"))
        return facts

    def groups(self, findings: Sequence[Finding]) -> list[dict[str, Any]]:
        """Findings by kind, the worst kinds first; of each kind the worst and longest are written out."""
        groups = []
        for kind in (kind for kinds in TOPICS.values() for kind in kinds):
            mine = [finding for finding in findings if finding.kind == kind]
            if mine:
                worst = max(mine, key=lambda finding: RANK[finding.severity]).severity
                shown = sorted(mine, key=lambda finding: (-RANK[finding.severity], -finding.count))[:SHOWN]
                groups.append(
                    {
                        "words": self.kinds[kind],
                        "severity": worst,
                        "light": ("green", "yellow", "red")[RANK[worst]],
                        "count": len(mine),
                        "rows": sum(finding.count for finding in mine),
                        "shown": [(finding.severity, self.details(finding)) for finding in shown],
                        "further": len(mine) - len(shown),
                    }
                )
        return sorted(groups, key=lambda group: -RANK[group["severity"]])

    def details(self, finding: Finding) -> list[tuple[str, str]]:
        """Where and how much, by name."""
        words = self.words
        times = [(words[f"{name}_time"], at) for name, at in (("from", finding.start), ("to", finding.end)) if at]
        lines = finding.lines
        return [
            *([(words["asset"], finding.asset)] if finding.asset else []),
            *([(words["channel"], finding.channel)] if finding.channel else []),
            *([(words["file"], finding.source)] if finding.source else []),
            *([(words["lines"], f"{lines[0]:,}–{lines[1]:,}")] if lines else []),
            *[(name, self.time(at)) for name, at in times],
            (words["rows_concerned"], f"{finding.count:,}"),
            *[self.value(name, value) for name, value in (finding.values or {}).items()],
        ]

    def value(self, name: str, value: Any) -> tuple[str, str]:
        """A number behind a finding; one without a word of its own goes by its key."""
        at = 0 if self.language == "en" else 1
        label = VALUE_WORDS[name][at] if name in VALUE_WORDS else name
        if isinstance(value, bool):
            return label, self.words["yes" if value else "no"]
        if isinstance(value, int | float):
            return label, self.duration(float(value)) if name in DURATIONS else f"{value:,.6g}"
        return label, str(value)

    def duration(self, seconds: float) -> str:
        for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 120.0)):
            if abs(seconds) >= length:
                return f"{seconds / (60.0 if unit == 'minutes' else length):.1f} {self.words[unit]}"
        return f"{seconds:.1f} {self.words['seconds_unit']}"

    def states(self, states: pl.LazyFrame) -> list[tuple[str, str, str]]:
        """Name, share of the time and number of stretches of each state, the most frequent first."""
        length = (pl.col("end") - pl.col("start")).dt.total_nanoseconds()
        rows = states.group_by("state").agg(length.sum().alias("time"), pl.len().alias("count"))
        frame = rows.sort(["time", "state"], descending=[True, False]).collect()
        total = max(float(frame["time"].sum()), 1.0)
        return [(self.state(name), f"{time / total:.1%}", f"{count:,}") for name, time, count in frame.iter_rows()]

    def state(self, name: str) -> str:
        """A proposed name in this language; a name of the user's own as it is."""
        if name in ("idle", "start-up", "load"):
            return self.words[name]
        return f"{self.words['lettered_state']} {name[-1]}" if name[:-1] == "state " else name

    def split(self) -> list[tuple[str, str]]:
        split = self.manifest.split
        if split is None:
            return []
        return [
            (self.words["train_end"], self.time(split.train_end)),
            (self.words["test_start"], self.time(split.test_start)),
        ]
