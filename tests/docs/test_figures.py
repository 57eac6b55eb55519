"""Figures of the pages come from results files; generated pages and blocks are what their programs write now."""

from __future__ import annotations

import re
import sys

import pytest
from helpers import markdown_pages as pages
from helpers.markdown_pages import ROOT, label

# a number that somebody measured: a decimal fraction, or one with a unit
MEASURED = re.compile(r"(?<![\w.])(?:\d+\.\d+|\d+ ?(?:×|x\b|%|GB|MB|ms|µs|nats|tokens/s|TFLOP/s))")
VERSIONS = re.compile(r"(?:Python|PyTorch|Transformers|SmolLM2|SHA|version|v)[ -]?\d[\d.]*(?: to \d[\d.]*)?")
GENERATED_PAGES = ("architectures.md", "cli.md", "results.md")


@pytest.fixture(scope="module")
def generated(builder):
    return builder("generate").pages()


def test_generated_pages_are_up_to_date(generated):
    stale = [label(path) for path, text in generated.items() if path.read_text() != text]
    assert not stale, "run python docs/generate.py"


def test_a_changed_figure_is_noticed(generated, builder, monkeypatch, capsys):
    readme = ROOT / "README.md"
    monkeypatch.setattr(builder("generate"), "pages", lambda: {readme: generated[readme].replace("×", "× or more", 1)})
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert builder("generate").main() == 1
    assert "README.md is out of date" in capsys.readouterr().err


@pytest.mark.parametrize("page", [page for page in pages.PAGES if page.name not in GENERATED_PAGES], ids=label)
def test_no_figure_is_typed_by_hand(page):
    text = VERSIONS.sub("", re.sub(r"`[^`\n]*`", "", pages.LINK.sub("", pages.written(page.read_text()))))
    assert not MEASURED.findall(text)


def test_every_results_file_stands_on_the_page():
    shown = (ROOT / "docs" / "results.md").read_text()
    assert not [
        path.name
        for path in (ROOT / "recipes" / "results").glob("*.json")
        if f"recipes/results/{path.name}" not in shown
    ]


def test_the_table_of_the_readme_shows_todays_defaults(builder):
    from hf_sparse_attn import SparseAttentionConfig

    provenance, config = builder("provenance"), SparseAttentionConfig()
    assert {"sink": config.sink, "local": config.local} == provenance.TODAY
    names = {name for _, _, name in builder("readme_figures").figures()}
    assert names and all(provenance.with_todays_defaults(name, provenance.read(name)) for name in names)


def test_figures_of_other_defaults_are_refused(builder, monkeypatch):
    monkeypatch.setattr(builder("readme_figures"), "figures", lambda: [("a layer", "3×", "attention")])
    with pytest.raises(ValueError, match=r"attention.json was not measured with today's defaults"):
        builder("readme_figures").lines()


def test_the_tables_hold_the_numbers_of_the_files(builder):
    """A figure of each kind of table, looked up by other means than the page's."""
    shown, read = (ROOT / "docs" / "results.md").read_text(), builder("provenance").read
    layer = read("attention")["rows"][0]
    assert f"{layer['speedup_with_router']['median']:.2f}× (" in shown
    window = next(row for row in read("quality")["quality"]["table"] if row["selection"] == "two stages")
    assert f"| {window['prefill']:.3f} | {window['prefill_share']['share']:.3f} [" in shown
    factor = next(row for row in read("ablation")["table"] if row["level"] == "a quarter more")
    assert f"| keys kept | a quarter more | {factor['kl_above']['mean']:.3f} [" in shown


def test_the_picture_is_what_its_script_draws(builder):
    import importlib.util
    import json

    spec = importlib.util.spec_from_file_location("selection_picture", ROOT / "docs" / "pictures" / "selection.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    recorded = json.loads(script.RECORD.read_text())
    assert script.PICTURE.read_text() == script.draw(recorded)
    budget = script.SPARSE["max_keys"] // script.SPARSE["block_size"]
    for tile, blocks in enumerate(recorded["tiles"]):
        assert {0, tile} <= set(blocks) and max(blocks) <= tile and len(blocks) <= budget
    kinds = {script.kind(tile, block) for tile, blocks in enumerate(recorded["tiles"]) for block in blocks}
    assert kinds == set(script.KINDS)
