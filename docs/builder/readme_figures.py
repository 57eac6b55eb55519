"""The one table of README.md: speed and quality, one figure a row, each looked up in its results file."""

from __future__ import annotations

from typing import Any

from . import provenance
from .markdown import anchor, table
from .results_page import TOPICS

TITLES = {name: title for files in TOPICS.values() for name, title in files.items()}


def row(rows: list[dict[str, Any]], **wanted: object) -> dict[str, Any]:
    """The row with these values; the dense one stands before each budget, always the same.

    Raises:
        ValueError: there is none, or several differ.
    """
    values = [one for one in rows if all(one.get(name) == value for name, value in wanted.items())]
    if not values or values != values[:1] * len(values):
        raise ValueError(f"{len(values)} rows have {wanted}: the table of README.md needs one")
    return values[0]


def figures() -> list[tuple[str, str, str]]:
    """(what, figure, results file) of each row of the table."""
    layer = row(provenance.read("attention_avx2")["rows"], length=32768, dtype="float32")
    step = row(provenance.read("decode_avx2")["rows"], length=32768, dtype="float32")
    model = row(provenance.read("model_avx2")["rows"], length=16384)
    quality = provenance.read("quality")["quality"]["table"]
    dense = row(quality, selection="dense", keys=None)
    kept = row(quality, selection="two stages", keys=1024)
    few = row(quality, selection="two stages", keys=512)
    lookups = provenance.read("needles")["quality"]["answers"]
    single = row(lookups, task="niah_single", selection="two stages")
    several = row(lookups, task="niah_multikey", selection="two stages")
    return [
        (
            "One layer, 32k tokens, over dense attention",
            _times(layer["speedup_with_router"]["median"]),
            "attention_avx2",
        ),
        ("The whole model, prompt of 16k tokens, over stock", _times(model["prefill_speedup"]), "model_avx2"),
        ("The whole model, next token after 16k, over stock", _times(model["decode_speedup"]), "model_avx2"),
        (
            "One layer, next token after 32k, over the best dense code",
            _times(step["speedup_with_router"]["median"]),
            "decode_avx2",
        ),
        ("Log-loss at 4096 tokens, all keys", f"{dense['prefill']:.3f}", "quality"),
        ("The same with 1024 keys", f"{kept['prefill']:.3f}", "quality"),
        ("The same with 512 keys", f"{few['prefill']:.3f}", "quality"),
        ("One hidden number found, 512 keys", _answers(single, lookups), "needles"),
        ("One of several hidden numbers found, 512 keys", _answers(several, lookups), "needles"),
    ]


def _times(ratio: float) -> str:
    return f"{ratio:.1f}×"


def _answers(answers: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """How many answers are right in every token, beside dense attention."""
    dense = row(rows, task=answers["task"], selection="dense")
    found, all_keys = (round(one["exact"] * one["n"]) for one in (answers, dense))
    return f"{found} of {answers['n']} (all keys: {all_keys})"


def lines() -> list[str]:
    """The table.

    Raises:
        ValueError: a file was measured with other settings than today's defaults.
    """
    shown = figures()
    for _, _, name in shown:
        if not provenance.with_todays_defaults(name, provenance.read(name)):
            raise ValueError(
                f"recipes/results/{name}.json was not measured with today's defaults: README.md must not show it"
            )
    return table(["", "", "measured"], [[what, figure, _link(name)] for what, figure, name in shown])


def _link(name: str) -> str:
    return f"[{TITLES[name]}](docs/results.md#{anchor(TITLES[name])})"
