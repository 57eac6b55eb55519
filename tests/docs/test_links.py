"""Every link and every path that the pages name leads somewhere."""

from __future__ import annotations

import re
import shlex

import pytest
from helpers import markdown_pages as pages
from helpers.markdown_pages import ROOT, label

PATH = re.compile(r"`((?:\.ci|\.github|docs|hf_sparse_attn|kernels|model_cards|recipes|tests)/[\w./*-]*)")


@pytest.mark.parametrize("page", pages.ALL, ids=label)
def test_links_lead_to_files_and_headings(page):
    dead = []
    for target in pages.links(page.read_text()):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in pages.anchors(file.read_text())):
            dead.append(target)
    assert not dead


def test_links_of_the_documentation_stay_inside_of_it():
    """A site is built of docs/ alone; other files are named, not linked."""
    outside = [
        (page.name, target)
        for page in pages.DOCS
        for target in pages.links(page.read_text())
        if target.startswith("..")
    ]
    assert not outside


@pytest.mark.parametrize("page", pages.ALL, ids=label)
def test_paths_that_a_page_names_exist(page):
    named = {path.rstrip(".") for path in PATH.findall(page.read_text())}
    # FOLDER, CARD: what a reader fills in
    named = {path for path in named if not re.search(r"[A-Z]{3}", path.removesuffix("README.md"))}
    assert not [path for path in sorted(named) if not list(ROOT.glob(path.rstrip("/")))]


def test_a_dead_link_is_found():
    text = "# A title\n[a](README.md#nothing) `[b](x.md)` ![c](d.svg)\n```sh\n[e](f)\n```\n"
    assert pages.links(text) == ["README.md#nothing", "d.svg"] and pages.anchors(text) == ["a-title"]


def test_commands_of_the_pages_exist(command_line):
    """Verbs and options of ``hf-sparse-attn`` in blocks of shell code are those of the program."""
    unknown = []
    for page in pages.ALL:
        for block in pages.blocks(page.read_text()):
            for line in (
                block.code.replace("\\\n", " ").splitlines()
                if block.language in ("sh", "") and page.name != "cli.md"
                else ()
            ):
                words = shlex.split(line, comments=True)
                if words[:1] == ["hf-sparse-attn"]:
                    unknown += [(label(page), line) for problem in command_line(words[1:]) if problem]
    assert not unknown


@pytest.fixture(scope="module")
def command_line(builder):
    """What is wrong with the words of a call: options that its verb does not have."""
    verbs = dict(builder("cli_page").commands(builder("cli_page").application()))

    def problems(words):
        verb = next((verb for verb in (" ".join(words[:2]), words[0]) if verb in verbs), None)
        if verb is None:
            return [f"no verb {words[0]}"] if "|" not in words and "…" not in words else []
        known = {option for parameter in verbs[verb].params for option in (*parameter.opts, *parameter.secondary_opts)}
        return [word for word in words if word.startswith("--") and word.split("=")[0] not in known]

    return problems
