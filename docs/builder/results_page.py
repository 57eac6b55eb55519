"""``docs/results.md``: every figure, by file, with its date, machine, settings and command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import provenance, quality_tables, speed_tables
from .markdown import anchor, table

TOPICS: dict[str, dict[str, str]] = {  # topic -> file: title
    "Quality of selections": {
        "quality": "Manuals that no router saw",
        "gaps": "All selections on one window",
        "selectors": "Every selector on one play",
        "robustness": "Other kinds of text, other lengths",
        "budgets": "Budgets that vary",
        "calibration": "Calibrated for a share of the mass",
        "calibration_keys_1024": "Calibrated for an average of 1024 keys",
        "calibration_keys": "Calibrated for an average of 512 keys",
        "ablation": "What brings what",
    },
    "After training": {
        "long_documents": "LoRA on long documents",
        "logs_text": "LoRA on a system log",
        "sensors_patchtst": "Forecasts of sensors",
        "encoder_classification": "Classes of documents",
    },
    "Lookups": {
        "needles": "Hidden numbers, without training of the model",
        "first_stages": "Which first stage loses hidden numbers",
        "ruler": "RULER, after training on it",
        "lm_eval_niah_single": "A needle by lm-evaluation-harness",
        "lm_eval_niah": "Needles by lm-evaluation-harness, before retrieval heads",
        "lm_eval_ruler": "RULER by lm-evaluation-harness",
        "longlink": "Planted links",
        "longlink_seed_1": "Planted links, seed 1",
        "longlink_seed_2": "Planted links, seed 2",
        "longlink_8k": "Planted links at 8k tokens",
        "longlink_16k": "Planted links at 16k tokens",
        "longlink_two_hops": "Planted links, two hops",
        "longlink_conjunction": "Planted links, conjunction",
        "longlink_lag": "Planted links, lag between sensors",
        "longlink_count": "Planted links, count",
    },
    "Speed and memory": {
        "attention_avx2": "A layer on AVX2",
        "decode_avx2": "A decode step of a layer on AVX2",
        "model_avx2": "A whole model on AVX2",
        "demo_avx2": "The demo on AVX2",
        "attention": "A layer on AVX-512",
        "backward": "Forward and backward of a layer on AVX-512",
        "decode": "A decode step of a layer on AVX-512",
        "model": "A whole model on AVX-512",
        "training": "A training step on AVX-512",
        "router": "The router's time on AVX-512",
        "demo": "The demo on AVX-512",
    },
}
INTRODUCTION = """# Results

Every figure of this project stands here, with the file that holds it.
The page is written by `python docs/generate.py` from `recipes/results/*.json`; nothing on it is typed by hand.

* The model is SmolLM2-135M-Instruct, de-quantised from Q4_1, unless a title says otherwise.
* Figures of several machines stand in tables of their own. Compare within a table.
* "Two stages" is this library with trained routers. "Oracle" takes the blocks with the most dense softmax mass.
* The other selections are explained in [concepts](concepts.md#selections-to-compare-with).
* A shared machine measured them all. Read ratios and their spread, not seconds.
* Negative results and the way to these figures are in `LOG.md`.
"""


def page(names: Sequence[str] | None = None) -> str:
    """The page, of all results files."""
    known = provenance.names() if names is None else list(names)
    lines = INTRODUCTION.splitlines()
    for topic, titles in (*TOPICS.items(), ("Other files", _others(known))):
        here = [name for name in titles if name in known]
        if here:
            lines += ["", f"## {topic}", ""]
            lines += [f"* [{titles[name]}](#{anchor(titles[name])})" for name in here]
        for name in here:
            lines += ["", f"### {titles[name]}", "", *section(name, provenance.read(name))]
    return "\n".join(lines).rstrip() + "\n"


def _others(known: Sequence[str]) -> dict[str, str]:
    """Files that no topic names, under their own names."""
    placed = {name for titles in TOPICS.values() for name in titles}
    return {name: name.replace("_", " ") for name in known if name not in placed}


def section(name: str, results: dict[str, Any]) -> list[str]:
    """Provenance and tables of a file."""
    lines = provenance.lines(name, results) if "environment" in results else [f"`recipes/results/{name}.json`", ""]
    for show in (*quality_tables.ALL, *speed_tables.ALL):
        for caption, header, rows in show(results):
            lines += [caption, "", *table(header, rows), ""]
    return lines
