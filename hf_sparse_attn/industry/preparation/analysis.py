"""Analysis of a prepared folder: faults of its sensors and clocks, operating states, scales, and the split by time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from ...system.extras import needs_extra
from ...system.files import write_atomically
from ..dataset import Channel, Manifest, Split
from ..errors import PlantDataError
from ..findings import Finding, Quality
from .asset_grid import AssetGrid
from .asset_readings import ChannelRows, count_rows, read_channels, write_flags
from .channel_series import SECOND, ChannelSeries, Flags
from .chronological_split import chronological_split
from .operating_states import find_states
from .robust_scaling import training_scale
from .sensor_checks import check_sampling, check_unit, check_values
from .source_clocks import SourceClock, SourceSpan, clock_findings, compare_clocks
from .source_gaps import gaps_by_source
from .unit_changes import UnitChange, find_unit_changes, first_unit

with needs_extra("industry", "the analysis of plant data"):
    import polars as pl

# of the record, where the context of the model is not known yet
UNKNOWN_CONTEXT = 0.05


@dataclass(frozen=True)
class AnalysisSettings:
    """What can be chosen.

    Attributes:
        context: seconds that the model will look back; None: not known yet, a twentieth of the record is assumed.
        train_share: of what the purge gap leaves, for training.
        correct_clocks: put times back by the offset of their clock where one is certain.
        max_clock_offset: seconds, the largest that is sought.
        max_states: operating states at most.
        state_names: what a proposed state (idle, start-up, load, state B …) is called.

    Raises:
        ValueError: a value is out of its range.
    """

    context: float | None = None
    train_share: float = 0.7
    correct_clocks: bool = False
    max_clock_offset: float = 43200.0
    max_states: int = 6
    state_names: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.context is not None and not 0 <= self.context < float("inf"):
            raise ValueError(f"context={self.context}: seconds that the model looks back, 0 or more")
        if not 0.1 < self.train_share < 0.9:
            raise ValueError(
                f"train_share={self.train_share}: a share between 0.1 and 0.9, so that both sides have data"
            )
        if not 1 <= self.max_clock_offset <= 7 * 86400:
            raise ValueError(f"max_clock_offset={self.max_clock_offset}: seconds from 1 to 604800, a week")
        if not 1 <= self.max_states <= 20:
            raise ValueError(f"max_states={self.max_states}: a number from 1 to 20")
        if len(set(self.state_names.values())) < len(self.state_names):
            raise ValueError(f"state_names={dict(self.state_names)}: two states get the same name; give each its own")


@dataclass
class _Asset:
    """What the first pass over an asset leaves for the second."""

    name: str
    folder: Path
    counts: list[ChannelRows]
    events: list[SourceSpan]

    @property
    def readings(self) -> Path:
        return self.folder / "readings.parquet"

    def spans(self, manifest: Manifest) -> list[SourceSpan]:
        spans: dict[int, SourceSpan] = {span.source: span for span in self.events}
        for count in self.counts:
            empty = SourceSpan(count.source, manifest.sources[count.source].path, 0, 0, count.start, count.end)
            span = spans.get(count.source, empty)
            start, end = min(span.start, count.start), max(span.end, count.end)
            spans[count.source] = replace(span, readings=span.readings + count.rows, start=start, end=end)
        return list(spans.values())


def analyse(folder: Path, manifest: Manifest, settings: AnalysisSettings) -> tuple[Manifest, list[Finding]]:
    """Check every asset of a prepared folder.

    Flags are added to ``readings.parquet``, which is replaced as a whole, rows as they stood; ``states.parquet`` is
    written. ``dataset.json`` is not: the caller writes the manifest that is returned, with scale and center of
    channels, clock offsets by which times were corrected, the split, and under ``settings["analysis"]`` what was set
    and what the clocks showed. Memory holds a few million readings at a time, or one channel if it has more.

    Raises:
        PlantDataError: times were corrected before, by offsets that the manifest does not hold.
    """
    assets = [_first_look(folder, manifest, name) for name in manifest.assets]
    for asset in assets:
        _refuse_unknown_shifts(asset, manifest)
    findings = [finding for asset in assets for finding in _empty_channels(asset, manifest)]
    clocks = [
        clock
        for asset in assets
        for clock in compare_clocks(asset.name, asset.folder, asset.spans(manifest), settings.max_clock_offset)
    ]
    findings += clock_findings(clocks, manifest.sources, settings.correct_clocks)
    offsets = _offsets(clocks) if settings.correct_clocks else {}
    split, short = _split(assets, manifest, settings)
    findings += short
    channels = list(manifest.channels)
    for asset in assets:
        findings += _analyse_asset(asset, manifest, settings, offsets, split, channels)
    sources = [
        replace(source, clock_offset=source.clock_offset + offsets.get(number, 0.0))
        for number, source in enumerate(manifest.sources)
    ]
    notes = {**asdict(settings), "state_names": dict(settings.state_names), "clocks": _clock_notes(clocks, manifest)}
    return (
        replace(
            manifest,
            sources=sources,
            channels=channels,
            split=split,
            settings={**manifest.settings, "analysis": notes},
        ),
        findings,
    )


def _first_look(folder: Path, manifest: Manifest, name: str) -> _Asset:
    place = folder / "assets" / name
    return _Asset(name, place, count_rows(place / "readings.parquet"), _event_spans(place, manifest))


def _event_spans(place: Path, manifest: Manifest) -> list[SourceSpan]:
    path = place / "events.parquet"
    if not path.is_file():
        return []
    time = pl.col("time").to_physical()
    spans = pl.scan_parquet(path).group_by("source").agg(pl.len(), time.min().alias("start"), time.max().alias("end"))
    return [
        SourceSpan(source, manifest.sources[source].path, 0, lines, start, end)
        for source, lines, start, end in spans.sort("source").collect(engine="streaming").iter_rows()
    ]


def _refuse_unknown_shifts(asset: _Asset, manifest: Manifest) -> None:
    for count in asset.counts:
        if count.quality & Quality.SHIFTED_CLOCK and manifest.sources[count.source].clock_offset == 0:
            raise PlantDataError(
                f"holds times of {manifest.sources[count.source].path} that were corrected, by an offset that"
                " dataset.json does not name: an earlier analysis was interrupted",
                [
                    "prepare the data again: hf-sparse-attn prep FILES --out FOLDER",
                    "prepare it into another folder",
                    "take the folder from a backup",
                ],
                file=asset.readings,
            )


def _empty_channels(asset: _Asset, manifest: Manifest) -> list[Finding]:
    numbers: dict[int, int] = {}
    for count in asset.counts:
        numbers[count.channel] = numbers.get(count.channel, 0) + count.numbers
    return [
        Finding("empty_channel", "warning", asset.name, manifest.sources[channel.source].path, channel.name, count=0)
        for number, channel in enumerate(manifest.channels)
        if channel.asset == asset.name and not numbers.get(number)
    ]


def _offsets(clocks: list[SourceClock]) -> dict[int, float]:
    """Seconds that each file's clock is ahead; of a file with several assets the most certain counts."""
    best: dict[int, tuple[float, float]] = {}
    for clock in clocks:
        for source in clock.sources:
            # a clock that was set in between has no one offset to correct by
            if clock.is_off and clock.offset is not None and clock.offset.before is None:
                best[source] = max(best.get(source, (0.0, 0.0)), (clock.offset.z, clock.offset.seconds))
    return {source: seconds for source, (_, seconds) in best.items()}


def _clock_notes(clocks: list[SourceClock], manifest: Manifest) -> list[dict[str, object]]:
    return [
        {
            "asset": clock.asset,
            "sources": [manifest.sources[number].path for number in clock.sources],
            "reference": manifest.sources[clock.reference[0]].path,
            "offset_s": None if clock.offset is None else clock.offset.seconds,
            "z": None if clock.offset is None else clock.offset.z,
        }
        for clock in clocks
    ]


def _split(assets: list[_Asset], manifest: Manifest, settings: AnalysisSettings) -> tuple[Split | None, list[Finding]]:
    spans = [span for asset in assets for span in asset.spans(manifest)]
    start, end = min((s.start for s in spans), default=0), max((s.end for s in spans), default=0)
    context = UNKNOWN_CONTEXT * (end - start) / SECOND if settings.context is None else settings.context
    try:
        return chronological_split(start, end, context, settings.train_share), []
    except PlantDataError:
        values = {"seconds": (end - start) / SECOND, "context_s": context}
        return None, [Finding("short_record", "unusable", values=values)]


def _analyse_asset(
    asset: _Asset,
    manifest: Manifest,
    settings: AnalysisSettings,
    offsets: Mapping[int, float],
    split: Split | None,
    channels: list[Channel],
) -> list[Finding]:
    """Findings of one asset; fills in scales in ``channels``."""
    flags = np.zeros(sum(count.rows for count in asset.counts), np.uint16)
    grid, units, findings = _sampling(asset, manifest, offsets, flags)
    states = find_states(grid, most=settings.max_states, names=settings.state_names)
    write_atomically(asset.folder / "states.parquet", states.frame().write_parquet)
    train_end = int(np.datetime64(split.train_end.removesuffix("Z"), "ns").astype(np.int64)) if split else 2**62
    for series in read_channels(asset.readings, channels, asset.counts, offsets):
        # what is in another unit is no other fault
        one_unit = replace(series, values=first_unit(series.values, units[series.number]))
        faults = check_values(one_unit, manifest.sources, states.at(series.times), grid)
        findings += faults.findings
        flags[series.rows] |= faults.flags
        wrong = (flags[series.rows] & ~np.uint16(Quality.AFTER_GAP)) > 0
        scale = training_scale(series.times, series.values, train_end, wrong)
        channels[series.number] = replace(channels[series.number], center=scale.center, scale=scale.scale)
    _write(asset, flags, offsets)
    return findings


def _sampling(
    asset: _Asset, manifest: Manifest, offsets: Mapping[int, float], flags: Flags
) -> tuple[AssetGrid, dict[int, list[UnitChange]], list[Finding]]:
    """The asset's channels on one grid, changes of unit by channel, and findings; flags go to ``flags`` (rows,)."""
    counts = [count for count in asset.counts if count.numbers > 1]
    spacing = [(count.end - count.start) / SECOND / (count.numbers - 1) for count in counts]
    shift = {source: round(seconds * SECOND) for source, seconds in offsets.items()}
    start = min((count.start - shift.get(count.source, 0) for count in counts), default=0)
    end = max((count.end - shift.get(count.source, 0) for count in counts), default=0)
    grid = AssetGrid.over(start, end, float(np.median(spacing)) if spacing else 1.0)
    findings: list[Finding] = []
    units: dict[int, list[UnitChange]] = {}
    for series in read_channels(asset.readings, manifest.channels, asset.counts, offsets):
        sampling = check_sampling(series, manifest.sources, _end_of_files(series, counts, shift))
        units[series.number] = find_unit_changes(series.values)
        unit = check_unit(series, manifest.sources, units[series.number])
        findings += sampling.findings + unit.findings
        flags[series.rows] |= sampling.flags | unit.flags
        grid.add(replace(series, values=first_unit(series.values, units[series.number])))
    channels: dict[str, int] = {}
    for count in asset.counts:
        path = manifest.sources[count.source].path
        channels[path] = channels.get(path, 0) + (count.numbers > 0)
    return grid, units, gaps_by_source(findings, channels)


def _end_of_files(series: ChannelSeries, counts: list[ChannelRows], shift: Mapping[int, int]) -> int:
    files = set(np.unique(series.sources).tolist())
    ends = [count.end - shift.get(count.source, 0) for count in counts if count.source in files]
    return max(ends, default=int(series.times[-1]))


def _write(asset: _Asset, flags: Flags, offsets: Mapping[int, float]) -> None:
    if asset.counts and (flags.any() or offsets or any(count.quality for count in asset.counts)):
        mine = {source: offsets[source] for source in offsets if source in {count.source for count in asset.counts}}
        write_flags(asset.readings, flags, mine)
    mine = {span.source: offsets[span.source] for span in asset.events if span.source in offsets}
    if mine:
        write_flags(asset.folder / "events.parquet", None, mine)
