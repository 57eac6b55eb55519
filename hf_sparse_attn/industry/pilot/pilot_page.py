"""The pilot's page: one offline HTML file with the verdict, its rule and the numbers behind it."""

from __future__ import annotations

from typing import Any, get_args

from ..offline_page import render_page
from .context_gain import ContextGain
from .evaluation_period import Bounds, Measures
from .gain_chart import gain_chart
from .lag_scan import LagLink
from .pilot_table import PilotResult, TableRow
from .pilot_words import WORDS, detector_name, sentence
from .verdict import LEVEL, RULE, Language, duration

MEASURES = ("average_precision", "vus_pr", "event_f1", "alarms_a_day", "lead_hours")
LIGHTS = {"worth it": ("●", "green"), "no evidence": ("■", "grey"), "cannot tell": ("▲", "yellow")}


def pilot_page(result: PilotResult, language: Language, command: str | None = None) -> str:
    """The page as HTML, without a request to anywhere; ``command``: what it was made with.

    Raises:
        ValueError: a language other than "ja" and "en".
    """
    if language not in get_args(Language):
        raise ValueError(f"language={language!r}: one of {', '.join(get_args(Language))}")
    view, settings = PilotView(result, language), result.settings
    return render_page(
        "pilot.html",
        language=language,
        words=view.words,
        light=LIGHTS[result.verdict.answer],
        verdict=result.verdict,
        rule=RULE[language],
        chart=gain_chart(result.far.gains),
        gain_columns=[view.words[name] for name in ("context", "length", "bits", "interval", "shuffled", "p")],
        gains=[view.gain(gain) for gain in result.far.gains],
        links=[(view.words[name], view.link(getattr(result.far, name))) for name in ("anywhere", "far")],
        link_note=view.words["link_note"].format(level=LEVEL),
        detectors_note=view.words["detectors_note"].format(
            **{name: duration(getattr(settings, name), language) for name in ("ahead", "tolerance", "cool_down")}
        ),
        columns=view.columns(),
        rows=[view.row(row) for row in result.rows],
        facts=view.facts(),
        notes=view.notes(),
        command=command,
    )


class PilotView:
    """A pilot's result as texts of one language, for the page and for a terminal."""

    def __init__(self, result: PilotResult, language: Language) -> None:
        self.result, self.language, self.words = result, language, WORDS[language]

    def columns(self) -> list[str]:
        """Headings of the table of detectors."""
        return [self.words[name] for name in ("detector", *MEASURES, "found", "alarms")]

    def row(self, row: TableRow) -> dict[str, Any]:
        """``name``, and ``cells`` under `columns` or ``missing``, the reason why there are none."""
        name, seeds = detector_name(row.name, self.language), ""
        if row.measures is None:
            return {"name": name, "seeds": "", "missing": sentence(row.unavailable or "", self.language), "cells": []}
        if len(row.seeds) > 1:
            low, high = f"{min(row.seeds):.3f}", f"{max(row.seeds):.3f}"
            seeds = self.words["seeds"].format(n=len(row.seeds), low=low, high=high)
        return {"name": name, "seeds": seeds, "missing": "", "cells": self._cells(row.measures)}

    def _cells(self, measures: Measures) -> list[str]:
        found = self.words["found_of"].format(found=measures.found, faults=measures.faults)
        bounds = (_bounds(getattr(measures, name), 1 if name == "lead_hours" else 3) for name in MEASURES)
        return [*bounds, found, str(measures.alarms)]

    def gain(self, gain: ContextGain) -> list[str]:
        """Context, length, gain, interval, gain when shuffled, and p."""
        missing = "–"
        return [
            f"{gain.multiple:.3g}×",
            duration(gain.multiple * self.result.far.near, self.language),
            f"{gain.gain:.2f}",
            f"{gain.low:.2f} – {gain.high:.2f}",
            missing if gain.shuffled is None else f"{gain.shuffled:.2f}",
            missing if gain.p is None else f"{gain.p:.2f}",
        ]

    def link(self, link: LagLink | None) -> str:
        """A link in one sentence."""
        if link is None:
            return self.words["none"]
        spans = {name: duration(getattr(link, name), self.language) for name in ("lag", "low", "high")}
        numbers = {"expected": f"{link.expected:.1f}", "p": f"{link.p:.3f}"}
        return self.words["link"].format(source=link.source, hits=link.hits, effects=link.effects, **spans, **numbers)

    def facts(self) -> list[tuple[str, str]]:
        """What was judged, by name."""
        result, far, words = self.result, self.result.far, self.words
        budget = duration(86400 / result.settings.alarms_a_day, self.language)
        facts = {
            "assets": f"{len(result.assets)}: {', '.join(result.assets)}",
            "days": f"{result.days:.1f}",
            "faults": str(result.faults),
            "effects": str(far.effects),
            "base_rate": f"{result.base_rate:.4f}",
            "vus_base_rate": f"{result.vus_base_rate:.4f}",
            "budget": words["budget_value"].format(days=budget),
            "near": duration(far.near, self.language),
            "longest": duration(far.longest, self.language),
            "block": duration(far.block, self.language),
            "candidates": str(far.candidates),
            "shuffles": str(far.shuffles),
            "detectable": words["none"] if far.detectable is None else f"{far.detectable:.0%}",
            **({} if result.settings.target is None else {"target": result.settings.target}),
        }
        return [(words[name], value) for name, value in facts.items()]

    def notes(self) -> list[str]:
        """What was decided on the way, one sentence each."""
        return [sentence(note, self.language) for note in self.result.notes]

    def base_rate(self) -> str:
        """What random scores reach, in one line."""
        numbers = {"base_rate": f"{self.result.base_rate:.4f}", "vus": f"{self.result.vus_base_rate:.4f}"}
        return self.words["base_rate_line"].format(**numbers, faults=self.result.faults, days=f"{self.result.days:.1f}")


def _bounds(bounds: Bounds, digits: int) -> str:
    """Value and interval, with no break within the interval."""
    value, low, high = (None if n is None else f"{n:.{digits}f}" for n in (bounds[k] for k in ("value", "low", "high")))
    if value is None:
        return "–"
    return value if low is None or high is None else f"{value} ({low}\N{NO-BREAK SPACE}–\N{NO-BREAK SPACE}{high})"
