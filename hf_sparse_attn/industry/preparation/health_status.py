"""The health of prepared data: findings, a traffic light for every topic, and a status."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from ..findings import KINDS, Finding

Light = Literal["green", "yellow", "red"]

FORMAT = 1
TOPICS: dict[str, tuple[str, ...]] = {  # topic: kinds of findings that belong to it
    "times": (
        "time_unreadable",
        "time_ambiguous",
        "day_first_dates",
        "dst_fold",
        "dst_gap",
        "zone_change",
        "epoch_unit_change",
        "backward_jump",
        "equal_stamps",
    ),
    "rows": ("bad_line", "duplicates", "no_number"),
    "gaps": ("gap",),
    "sensors": ("stuck_sensor", "flat_sensor", "saturated_sensor", "empty_channel"),
    "units": ("unit_change",),
    "clocks": ("clock_offset", "clock_unverified"),
    "amount": ("short_record",),
}
LIGHTS: dict[str, Light] = {"information": "green", "warning": "yellow", "unusable": "red"}
RANK = {"information": 0, "warning": 1, "unusable": 2}


@dataclass(frozen=True)
class Topic:
    """One traffic light: ``counts`` of findings by severity."""

    name: str
    light: Light
    counts: dict[str, int]


@dataclass(frozen=True)
class Health:
    """What was found in prepared data."""

    findings: tuple[Finding, ...]

    @property
    def status(self) -> int:
        """0: fine, 1: warnings, 2: unusable."""
        return max((RANK[finding.severity] for finding in self.findings), default=0)

    @property
    def topics(self) -> tuple[Topic, ...]:
        """A traffic light for each of `TOPICS`: that of the worst finding."""
        topics = []
        for name, kinds in TOPICS.items():
            severities = [finding.severity for finding in self.findings if finding.kind in kinds]
            worst = max(severities, key=RANK.__getitem__, default="information")
            topics.append(Topic(name, LIGHTS[worst], dict(Counter(severities))))
        return tuple(topics)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready and of no language: status, lights, how many of each kind, and every finding."""
        kinds = Counter(finding.kind for finding in self.findings)
        return {
            "format": FORMAT,
            "status": self.status,
            "topics": [{"topic": t.name, "light": t.light, "findings": t.counts} for t in self.topics],
            "kinds": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
            "findings": [finding.to_dict() for finding in self.findings],
        }
