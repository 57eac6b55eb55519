"""The pilot: every detector and contender judged at one alarm budget, the test of far history, and the verdict."""

# Shapes: n steps of evaluation of all assets, T steps of one asset, B blocks.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...system.files import write_json
from ..errors import PlantDataError
from .alarm_metrics import check_scores
from .baseline_detectors.detector_registry import all_detectors
from .block_bootstrap import block_numbers, default_block_seconds, drawn_weights, interval
from .detection_curves import BlockCurves, vus_base_rate
from .evaluation_period import Evaluation, Measures
from .far_history import FarHistory, far_history
from .timeline import Array, Timeline
from .verdict import RULE, ContenderGain, Verdict, decide


@dataclass(frozen=True)
class PilotSettings:
    """What a pilot is run with. Times in seconds.

    Attributes:
        near: context that is at hand anyway.
        multiples: of it that are tried.
        alarms_a_day: budget of one asset.
        cool_down: time after an alarm in which no other is raised.
        ahead: how long before a fault an alarm counts, and steps are labelled.
        tolerance: by which an alarm may miss the labelled window.
        block: of the bootstrap; None: a day, or longer if a fault is.
        target: kind of event whose causes are sought; None: the faults.
        seeds: of detectors that draw numbers.
        forecaster: folder of a TimesFM checkpoint.

    Raises:
        PlantDataError: a time, or the budget, is below what it can be.
    """

    near: float = 6 * 3600.0
    multiples: tuple[float, ...] = (4, 16, 64)
    alarms_a_day: float = 1 / 7
    cool_down: float = 86400.0
    ahead: float = 0.0
    tolerance: float = 3600.0
    block: float | None = None
    target: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    forecaster: str | None = None

    def __post_init__(self) -> None:
        for name in ("near", "alarms_a_day", "block", "cool_down", "ahead", "tolerance"):
            value, zero = getattr(self, name), name in ("cool_down", "ahead", "tolerance")
            # NaN fails both comparisons
            if value is not None and not (0 < value < float("inf") or (zero and value == 0)):
                raise PlantDataError(f"{name} is {value}", ["give a number above 0", "leave it out for the default"])


@dataclass(frozen=True)
class Contender:
    """Scores of a further model, float64 [T] of every asset by name; the first seed's stand in the table.

    Contenders of one ``family`` are one model with different ``context`` (seconds): the longest is held against the
    shortest.
    """

    name: str
    scores: dict[str, Array]
    family: str | None = None
    context: float | None = None


@dataclass(frozen=True)
class TableRow:
    """One detector: ``unavailable`` says why it has no measures; ``seeds``: average precision by seed."""

    name: str
    measures: Measures | None = None
    unavailable: str | None = None
    seeds: tuple[float, ...] = ()


@dataclass(frozen=True)
class PilotResult:
    """What a pilot found. ``base_rate`` and ``vus_base_rate``: what random scores reach."""

    settings: PilotSettings
    assets: tuple[str, ...]
    faults: int
    days: float
    base_rate: float
    vus_base_rate: float
    rows: tuple[TableRow, ...]
    far: FarHistory
    verdict: Verdict
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the rule of the verdict."""
        return {**asdict(self), "rule": RULE}

    def write(self, path: str | Path) -> None:
        """Write `to_dict` as JSON, whole or not at all."""
        write_json(path, self.to_dict())

    def table(self) -> list[dict[str, str]]:
        """Rows of texts in table order: value and interval, or "not available" with the reason."""
        return [_texts(row) for row in self.rows]


def pilot(
    timelines: Sequence[Timeline], settings: PilotSettings | None = None, contenders: Sequence[Contender] = ()
) -> PilotResult:
    """Judge all detectors and contenders on the evaluation period, test for far history, and decide.

    Raises:
        PlantDataError: no timelines; timelines of one name or of different steps; scores of a contender that are
            missing or no finite numbers.
    """
    settings, timelines, names = settings or PilotSettings(), list(timelines), [t.asset for t in timelines]
    if not timelines or len(set(names)) < len(names):
        raise PlantDataError(
            f"{len(names)} timelines of assets {', '.join(names) or '(none)'}",
            ["give at least one timeline", "give every asset a name of its own"],
        )
    given = {c.name: [_scores_of(c, t) for t in timelines] for c in contenders}  # refused before hours of work
    far = far_history(
        timelines,
        near_seconds=settings.near,
        multiples=settings.multiples,
        target=settings.target,
        seed=settings.seeds[0],
    )
    blocks = block_numbers(timelines, settings.block or default_block_seconds(timelines))
    evaluation = Evaluation(timelines, settings, blocks, drawn_weights(int(blocks.max()) + 1, settings.seeds[0]))
    baselines = [_baseline_row(n, timelines, settings, evaluation) for n in range(len(all_detectors()))]
    scores = {name: evaluation.scaled(parts) for name, parts in given.items()}
    others = [TableRow(name, evaluation.measure(parts)) for name, parts in scores.items()]
    return PilotResult(
        settings=settings,
        assets=tuple(names),
        faults=evaluation.faults,
        days=evaluation.days,
        base_rate=float(evaluation.labels.mean()),
        vus_base_rate=vus_base_rate(evaluation.labels, evaluation.most_width),
        rows=(*baselines, *others),
        far=far,
        verdict=decide(far, _best(baselines), _contender_gains(contenders, scores, evaluation)),
        notes=tuple(f"{t.asset}: {note}" for t in timelines for note in t.notes),
    )


def _baseline_row(place: int, timelines: list[Timeline], settings: PilotSettings, evaluation: Evaluation) -> TableRow:
    """The row of the detector at ``place`` of the registry; those without a seed run once."""
    measures: list[Measures] = []
    previous: list[Array] = []
    for seed in settings.seeds:
        parts = []
        for timeline in timelines:
            horizon = settings.ahead or settings.near
            detector = all_detectors(seed=seed, horizon_seconds=horizon, forecaster=settings.forecaster)[place]
            if reason := detector.unavailable(timeline):
                return TableRow(detector.name, unavailable=f"{timeline.asset}: {reason}")
            parts.append(detector.fit(timeline.train()).scores(timeline))
        # a detector that draws nothing on so short a record is the same with every seed
        if previous and all(np.array_equal(a, b) for a, b in zip(parts, previous, strict=True)):
            break
        previous = parts
        measures.append(evaluation.measure(evaluation.scaled(parts)))
        if not hasattr(detector, "seed"):
            break
    precisions = [m.average_precision["value"] for m in measures]
    return TableRow(detector.name, measures[0], seeds=tuple(p for p in precisions if p is not None))


def _scores_of(contender: Contender, timeline: Timeline) -> Array:
    if timeline.asset not in contender.scores:
        raise PlantDataError(
            f"contender {contender.name!r} has no scores of asset {timeline.asset!r}",
            ["score every asset", "leave the asset out", "leave the contender out"],
        )
    return check_scores(contender.scores[timeline.asset], len(timeline), contender.name)


def _best(rows: list[TableRow]) -> str | None:
    """Name of the baseline with the highest average precision, of those that find a fault at the budget if any does;
    random scores are no choice.
    """
    judged = {
        row.name: (row.measures.found > 0, row.measures.average_precision["value"])
        for row in rows[1:]
        if row.measures is not None and row.measures.average_precision["value"] is not None
    }
    return max(judged, key=lambda name: judged[name]) if judged else None


def _contender_gains(
    contenders: Sequence[Contender], scores: dict[str, list[Array]], evaluation: Evaluation
) -> tuple[ContenderGain, ...]:
    """Longest against shortest context of every family, with intervals for all families together."""
    families: dict[str, list[Contender]] = {}
    for contender in contenders:
        if contender.family is not None and contender.context is not None:
            families.setdefault(contender.family, []).append(contender)
    pairs = [sorted(members, key=lambda c: c.context or 0) for members in families.values() if len(members) > 1]
    gains = []
    for near, *_, far in pairs:
        far_curves, near_curves = (evaluation.curves(scores[c.name]) for c in (far, near))

        def difference(w: Array, a: BlockCurves = far_curves, b: BlockCurves = near_curves) -> Array:
            above: Array = a.average_precision(w) - b.average_precision(w)
            return above

        bounds = interval(difference, evaluation.weights, 1 - 0.05 / len(pairs))
        value, low, high = (bounds[name] for name in ("value", "low", "high"))
        if value is not None and low is not None and high is not None:
            gains.append(ContenderGain(far.name, near.name, value, low, high))
    return tuple(gains)


def _texts(row: TableRow) -> dict[str, str]:
    if row.measures is None:
        return {"detector": row.name, "not available": row.unavailable or ""}
    measures = asdict(row.measures)
    cells = {"detector": row.name}
    for name, bounds in measures.items():
        if isinstance(bounds, dict):
            value, low, high = (bounds[key] for key in ("value", "low", "high"))
            cells[name] = "–" if value is None else f"{value:.3f}"
            cells[name] += f" ({low:.3f}–{high:.3f})" if None not in (value, low, high) else ""
        else:
            cells[name] = str(bounds)
    return cells
