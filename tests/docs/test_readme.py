"""README.md can be read by somebody who has never seen the project: short, few numbers, short sentences."""

from __future__ import annotations

import re

import pytest
from helpers import markdown_pages as pages
from helpers.markdown_pages import ROOT, label

README = (ROOT / "README.md").read_text()
MOST_BYTES, MOST_NUMBERS, MOST_WORDS = 8192, 2.0, 35  # numbers of 100 words, words of a sentence


def words(text):
    return re.findall(r"[\w'’-]*[A-Za-z][\w'’-]*", text)


def test_the_readme_is_short():
    assert len(README.encode()) <= MOST_BYTES


def test_the_readme_has_few_numbers_outside_its_table():
    text = re.sub(r"\b[A-Za-z]\w*[\d.-]+\w*", "name", pages.prose(README))  # Apache-2.0, AVX2
    numbers = re.findall(r"\d+(?:[.,]\d+)*", text)
    assert len(numbers) <= MOST_NUMBERS * len(words(text)) / 100, numbers


def test_the_readme_has_one_table():
    assert len(re.findall(r"^\|[-|]+\|$", README, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    "page", [page for page in pages.PAGES if page.name not in ("cli.md", "results.md", "architectures.md")], ids=label
)
def test_sentences_are_short(page):
    long = [one for one in pages.sentences(page.read_text()) if len(words(one)) > MOST_WORDS]
    assert not long


def test_a_long_sentence_is_found():
    text = "Short.\n\n* one\n* " + "word " * 40 + "\n\n| " + "cell " * 50 + "|\n"
    assert [len(words(one)) > MOST_WORDS for one in pages.sentences(text)] == [False, False, True]


def test_a_stranger_finds_installation_example_and_limits_in_this_order():
    titles = re.findall(r"^## (.+)$", README, re.MULTILINE)
    assert titles[:2] == ["Install", "Example"] and titles.index("Figures") < titles.index("Limits") < titles.index(
        "Licence and citation"
    )
    assert "](docs/pictures/selection.svg)" in README.split("## Install")[0]


def test_the_training_example_has_twelve_lines():
    code = next(block.code for block in pages.blocks(README) if "SparseTrainer(" in block.code)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
