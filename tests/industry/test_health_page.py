"""The Data Health Report: complete in both languages, offline, bounded, and true to health.json."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape

import pytest
from helpers.browser import READABLE, Browser, find_browser
from helpers.tidy_folders import clean_plant

from hf_sparse_attn.industry.dataset import Split
from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.findings import KINDS, Finding
from hf_sparse_attn.industry.preparation.finding_words import KIND_WORDS
from hf_sparse_attn.industry.preparation.health import write_health
from hf_sparse_attn.industry.preparation.health_status import TOPICS
from hf_sparse_attn.industry.preparation.health_words import VALUE_WORDS, WORDS

START, END = "2024-03-01T02:00:00Z", "2024-03-01T05:00:00Z"
EVERY = [
    Finding(kind, "warning", "press", "sensors.csv", "pressure", START, END, (10, 90), 81, {"seconds": 10800.0})
    for kind in KINDS
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    manifest = clean_plant(0, days=1).write(folder)
    return folder, replace(manifest, split=Split(START, END, 10800.0))


def page(prepared, findings, language="en"):
    folder, manifest = prepared
    health = write_health(folder, manifest, findings, language)
    return health, (folder / "health.html").read_text(encoding="utf-8")


def text_of(html):
    body = re.sub(r"<style>.*?</style>|<code>.*?</code>|<svg.*?</svg>", " ", html, flags=re.S)
    return re.sub(r"<[^>]+>", "\n", body)


def test_both_languages_have_every_word_and_kind():
    assert WORDS["en"].keys() == WORDS["ja"].keys()
    assert set(KIND_WORDS["en"]) == set(KIND_WORDS["ja"]) == set(KINDS)
    assert sorted(kind for kinds in TOPICS.values() for kind in kinds) == sorted(KINDS)
    for words in (*WORDS["ja"].values(), *(japanese for _, japanese in VALUE_WORDS.values())):
        assert words and re.search(r"[\u3040-\u30ff\u4e00-\u9fff]", words), words
    for words in KIND_WORDS["ja"].values():
        for text in (words.title, words.sentence, words.advice):
            assert re.search(r"[\u3040-\u30ff\u4e00-\u9fff]", text) and not re.search(r"[A-Za-z]{2,} [a-z]{2,}", text)


def test_a_japanese_page_has_no_english_sentence(prepared):
    html = page(prepared, EVERY, "ja")[1]
    assert 'lang="ja"' in html
    known = {"oil temperature", "room temperature", "health.json", "Asia/Tokyo"}
    text = text_of(html)
    for name in known:
        text = text.replace(name, "")
    assert not re.findall(r"[A-Za-z]{2,} +[A-Za-z]{2,}", text)


@pytest.mark.parametrize("language", ["en", "ja"])
def test_every_kind_is_shown_with_its_sentence_what_to_do_and_its_place(prepared, language):
    html = unescape(page(prepared, EVERY, language)[1])
    for words in KIND_WORDS[language].values():
        assert words.title in html and words.sentence in html and words.advice in html
    assert html.count("2024-03-01 11:00:00 (+09:00)") >= len(KINDS)  # in the plant's zone
    assert html.count("10–90") == len(KINDS) and html.count("sensors.csv") >= len(KINDS)


@pytest.mark.parametrize(
    ("severity", "status", "light"), [("information", 0, "green"), ("warning", 1, "yellow"), ("unusable", 2, "red")]
)
def test_the_worst_finding_sets_light_and_status(prepared, severity, status, light):
    health, html = page(prepared, [Finding("gap", "information"), Finding("gap", severity, "press")])
    assert health.status == status and {topic.name: topic.light for topic in health.topics}["gaps"] == light
    # told by shape and word too
    assert (
        f'<span class="light">{ {"green": "●", "yellow": "▲", "red": "■"}[light] } {WORDS["en"][light]}</span>' in html
    )


def test_health_json_has_every_finding_and_is_of_no_language(prepared):
    folder, _ = prepared
    page(prepared, EVERY, "ja")
    first = (folder / "health.json").read_text()
    page(prepared, EVERY, "en")
    assert (folder / "health.json").read_text() == first
    values = json.loads(first)
    assert [Finding.from_dict(value) for value in values["findings"]] == EVERY and values["kinds"]["gap"] == 1


def test_thousands_of_findings_make_a_page_of_bounded_size_and_are_all_counted(prepared):
    many = [replace(EVERY[n % len(EVERY)], count=n) for n in range(20_000)]
    health, html = page(prepared, many)
    assert len(html.encode()) < 1_000_000 and len(health.findings) == 20_000
    shown, further = (
        html.count("<li><p>"),
        sum(int(n.replace(",", "")) for n in re.findall(r"health\.json: ([\d,]+)", html)),
    )
    assert shown + further == 20_000


def test_the_page_asks_for_nothing_and_escapes_what_it_shows(prepared):
    evil = Finding("gap", "warning", "press", "<script>alert(1)</script>.csv", "a&b")
    html = page(prepared, [*EVERY, evil])[1]
    assert "<script" not in html and "&lt;script&gt;" in html and "a&amp;b" in html
    assert not re.search(r"(src|href)=|url\(|@import|https?://", html)
    assert "@media print" in html and 'name="viewport"' in html


def test_an_unknown_zone_or_language_is_refused_and_nothing_is_written(prepared, tmp_path):
    _, manifest = prepared
    with pytest.raises(PlantDataError, match="Asia/Edo"):
        write_health(tmp_path, replace(manifest, settings={"ingest": {"zone": "Asia/Edo"}}), [], "en")
    with pytest.raises(ValueError, match="'de'"):
        write_health(tmp_path, manifest, [], "de")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="no Chromium: make test-browser fetches one")
@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize(("width", "mobile"), [(1280, False), (390, True)], ids=["desk", "phone"])
def test_the_page_is_readable_in_a_browser(prepared, language, width, mobile):
    folder, _ = prepared
    long = replace(EVERY[0], source="exports/" + "very-long-name-" * 12 + ".csv", channel="X" * 120)
    page(prepared, [*EVERY, long], language)
    with Browser(find_browser()) as browser:
        visit = browser.visit(folder / "health.html", READABLE, width=width, height=844, mobile=mobile)
    assert (visit.errors, visit.requests) == ([], [])
    assert visit.measured == {"overflow": 0, "outside": [], "small": 0}
