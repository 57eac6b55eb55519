"""The pilot's page: everything in both languages, offline, with the verdict on top and a drawing that is true."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.browser import READABLE, Browser, find_browser
from helpers.pilot_plants import plant

from hf_sparse_attn.industry.pilot import pilot_table
from hf_sparse_attn.industry.pilot.baseline_detectors.detector_registry import all_detectors
from hf_sparse_attn.industry.pilot.context_gain import ContextGain
from hf_sparse_attn.industry.pilot.gain_chart import HEIGHT, WIDTH, gain_chart
from hf_sparse_attn.industry.pilot.pilot_page import PilotView, pilot_page
from hf_sparse_attn.industry.pilot.pilot_table import PilotSettings, pilot
from hf_sparse_attn.industry.pilot.pilot_words import ANSWERS, DETECTORS_JA, WORDS, detector_name, sentence

JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")


class Elements(HTMLParser):
    """Tags that are open, attributes that would ask another place for something, and texts."""

    def __init__(self, page):
        super().__init__()
        self.open, self.requests, self.texts = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "line", "circle"):
            self.open.append(tag)
        self.requests += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open[-1] != "style":
            self.texts.append(data.strip())


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        cheap = [d for d in all_detectors() if d.name in ("random", "max |z|", "pretrained forecaster residual")]
        patch.setattr(pilot_table, "all_detectors", lambda **_: cheap)
        line = replace(plant(0, lag=96, pairs=16, days=60, step=30, kinds=6, channels=2), asset="press <1>")
        note = "2 of 7 faults lie outside of the record"
        yield pilot([replace(line, notes=(note,))], PilotSettings(seeds=(0, 1)))


@pytest.mark.parametrize("language", ["en", "ja"])
def test_the_page_is_whole_offline_and_starts_with_the_verdict(result, language):
    page = pilot_page(result, language, "hf-sparse-attn pilot <folder>")
    elements = Elements(page)
    assert not elements.open and not elements.requests and "url(" not in page and "<script" not in page
    texts = elements.texts
    at = next(n for n, text in enumerate(texts) if result.verdict.sentence[language] in text)
    assert at <= 3 and all(reason[language] in texts for reason in result.verdict.reasons)
    assert "press &lt;1&gt;" in page and "hf-sparse-attn pilot &lt;folder&gt;" in page and "{" not in "".join(texts)


def test_every_detector_stands_on_the_page_with_its_numbers_or_the_reason_why_not(result):
    texts = Elements(pilot_page(result, "en")).texts
    for row in result.rows:
        assert row.name in texts
        if row.measures:
            assert any(text.startswith(f"{row.measures.average_precision['value']:.3f}") for text in texts)
    assert any("no checkpoint of TimesFM was named" in text for text in texts)
    assert f"{result.base_rate:.4f}" in texts


def test_all_words_are_there_in_both_languages_with_the_same_fields():
    assert set(WORDS["en"]) == set(WORDS["ja"]) and set(ANSWERS) <= set(WORDS["en"])
    for name, english in WORDS["en"].items():
        japanese = WORDS["ja"][name]
        assert JAPANESE.search(japanese) or japanese == english == "VUS-PR", name
        assert not JAPANESE.search(english) and english.strip()
        assert sorted(re.findall(r"\{\w+\}", english)) == sorted(re.findall(r"\{\w+\}", japanese)), name


def test_the_japanese_page_has_no_english_sentence(result):
    texts = Elements(pilot_page(result, "ja")).texts
    english = [text for text in texts if re.search(r"[a-z]+ [a-z]+ [a-z]+", text) and not JAPANESE.search(text)]
    assert not english
    assert any("故障7件のうち2件は記録の期間外です" in text for text in texts)


def test_every_detector_and_every_reason_of_theirs_is_known_in_japanese():
    line = plant(0, lag=4, pairs=2, days=3, step=30, kinds=6, channels=2, linked=False)
    nothing = replace(line, values=np.full_like(line.values, np.nan), counts=np.zeros_like(line.counts))
    reasons = [d.unavailable(each) for d in all_detectors() for each in (line, nothing)]
    reasons += [d.unavailable(line) for d in all_detectors(forecaster="no/such")]
    assert len({reason for reason in reasons if reason}) >= 6
    for reason in filter(None, reasons):
        assert JAPANESE.search(sentence(f"press: 1: {reason}", "ja")), reason
        assert sentence(f"press: {reason}", "ja").startswith("press: ")
    assert {d.name for d in all_detectors()} == set(DETECTORS_JA)
    assert detector_name("my model", "ja") == "my model"


def test_the_drawing_keeps_the_order_of_the_numbers_and_stays_inside():
    gains = [
        ContextGain(1.0, -0.2, -0.4, 0.1),
        ContextGain(4, 0.0, 0.0, 0.0),
        ContextGain(16, 1.5, 0.9, 2.1, 0.0, 0.05),
    ]
    chart = gain_chart(gains)
    for gain, mark in zip(gains, chart.marks, strict=True):
        # y goes down
        assert mark.high <= mark.value <= mark.low and 0 < mark.x < WIDTH
        assert np.sign(chart.zero - mark.value) == np.sign(gain.gain)
        assert mark.high >= 0 and mark.low <= HEIGHT - 30
    by_label = dict(chart.ticks)
    assert by_label["0"] == chart.zero and len(chart.ticks) <= 8
    per_bit = by_label["0"] - by_label["1"]
    assert chart.zero - chart.marks[2].value == pytest.approx(1.5 * per_bit, abs=0.2)
    assert chart.marks[0].shuffled is None and chart.marks[2].shuffled == chart.zero


@pytest.mark.parametrize("gain", [0.0, -0.001, 1e-9, 250.0])
def test_gains_of_any_size_are_drawn(gain):
    chart = gain_chart([ContextGain(1.0, gain, gain, gain)])
    assert len(chart.ticks) >= 2 and all(0 <= y <= HEIGHT for _, y in chart.ticks)
    assert len({label for label, _ in chart.ticks}) == len(chart.ticks)


def test_without_candidates_the_page_says_so(result):
    far = replace(result.far, gains=(), anywhere=None, far=None, detectable=None)
    page = pilot_page(replace(result, far=far), "en")
    assert "no gain was measured" in page and "<svg" not in page


def test_another_language_is_refused(result):
    with pytest.raises(ValueError, match="language='de'"):
        pilot_page(result, "de")


def test_a_table_row_has_a_cell_for_every_column(result):
    view = PilotView(result, "ja")
    for row in map(view.row, result.rows):
        assert len(row["cells"]) in (0, len(view.columns()) - 1)
        assert bool(row["cells"]) != bool(row["missing"])


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="no Chromium: make test-browser fetches one")
@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize(("width", "mobile"), [(1280, False), (390, True)], ids=["desk", "phone"])
def test_the_page_is_readable_in_a_browser(result, tmp_path, language, width, mobile):
    page = tmp_path / "pilot.html"
    page.write_text(pilot_page(result, language, "hf-sparse-attn pilot " + "a-long-name-" * 20), encoding="utf-8")
    with Browser(find_browser()) as browser:
        visit = browser.visit(page, READABLE, width=width, height=844, mobile=mobile)
    assert (visit.errors, visit.requests) == ([], [])
    assert visit.measured == {"overflow": 0, "outside": [], "small": 0}
