"""What every report has for readers of all kinds, read from its HTML alone: no browser is needed."""

from __future__ import annotations

from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise

import pytest
from helpers.reports import REPORTS, written_report

from hf_sparse_attn.experiments.recipe import Quality
from hf_sparse_attn.experiments.reports import figures, rendering, study_figures
from hf_sparse_attn.experiments.reports.words import SELECTIONS, explained
from hf_sparse_attn.experiments.scores.budget_allocation import FITTED

EMPTY = {"meta", "img", "br", "hr", "link"}
HEADINGS = ("h1", "h2", "h3", "h4")


class Element(dict):
    """A tag with its attributes, what it stands in and what stands in it."""

    def __init__(self, tag, attributes, parent):
        super().__init__(attributes)
        self.tag, self.parent, self.children = tag, parent, []

    def __iter__(self):
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child

    def named(self, *tags):
        return [element for element in self if element.tag in tags]

    def around(self):
        element = self.parent
        while element is not None:
            yield element
            element = element.parent

    @property
    def text(self):
        return " ".join("".join(c.text if isinstance(c, Element) else c for c in self.children).split())


class Tree(HTMLParser):
    """Elements of a page; a tag that is closed out of order is an error."""

    def __init__(self, page):
        super().__init__()
        self.root = self.open = Element("", {}, None)
        self.feed(page)
        assert self.open is self.root

    def handle_starttag(self, tag, attributes):
        element = Element(tag, attributes, self.open)
        self.open.children.append(element)
        if tag not in EMPTY:
            self.open = element

    def handle_endtag(self, tag):
        assert tag == self.open.tag, f"</{tag}> closes <{self.open.tag}> at line {self.getpos()[0]}"
        self.open = self.open.parent

    def handle_data(self, data):
        self.open.children.append(data)


@pytest.fixture(scope="module", params=REPORTS)
def page(request, tmp_path_factory):
    # drawing takes longer than everything else; test_reports_in_a_browser looks at figures
    with pytest.MonkeyPatch.context() as patch:
        for module in (figures, study_figures):
            patch.setattr(module, "figure", lambda *_, **__: "data:image/svg+xml;base64,AAAA")
        return Tree(written_report(request.param, tmp_path_factory.mktemp("pages")).read_text(encoding="utf-8")).root


def test_a_page_says_what_it_is(page):
    (html,) = page.named("html")
    assert html["lang"] == "en"
    (title,), (heading,) = page.named("title"), page.named("h1")
    assert len(title.text) > 20 and len(heading.text) > 10
    assert [m["content"] for m in page.named("meta") if m.get("name") == "viewport"] == [
        "width=device-width, initial-scale=1"
    ]
    levels = [HEADINGS.index(h.tag) for h in page.named(*HEADINGS)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(page.named("main")) == 1
    first = page.named("p")[0]
    assert "attention every token reads all keys" in first.text


def test_tables_are_named_and_their_headers_have_a_scope(page):
    assert page.named("table")
    for table in page.named("table"):
        (head,) = table.named("thead")
        columns = head.named("th")
        assert table["aria-label"] and all(cell["scope"] == "col" and cell.text for cell in columns)
        box = table.parent
        assert (box["class"], box["role"], box["tabindex"]) == ("scroll", "region", "0") and box["aria-label"]
        figure = next(element for element in table.around() if element.tag == "figure")
        assert len(figure.named("figcaption")[0].text) > 40
        rows = [row for row in table.named("tr") if row.parent is not head]
        assert len(rows) > 1
        for row in rows:
            first, *others = [cell for cell in row.children if isinstance(cell, Element)]
            assert first.tag == "th" and first["scope"] in ("row", "rowgroup") and first.text
            assert all(cell.tag == "td" for cell in others)
            assert int(first.get("colspan", 1)) + len(others) == len(columns)


def test_figures_are_named_and_described(page):
    for image in page.named("img"):
        assert (
            image["alt"] and image.parent["aria-label"] == f"Figure: {image['alt']}" and image.parent["tabindex"] == "0"
        )
        figure = next(element for element in image.around() if element.tag == "figure")
        assert len(figure.named("figcaption")[0].text) > 20


def test_a_page_needs_nothing_but_itself(page):
    assert not page.named("script", "link", "iframe", "object")
    assert all(element.get(name, "data:").startswith(("data:", "#")) for element in page for name in ("src", "href"))


def test_what_is_compared_is_explained_before_its_table(page):
    if "one thing changed" in page.named("h1")[0].text:
        return  # rows of an ablation are settings
    order = list(page)
    for table in page.named("table"):
        named = {term.text for term in order[: order.index(table)] if term.tag == "dt"}
        shown = {cell.text.split(", ")[0] for cell in table.named("th") if cell.get("scope") == "row"}
        assert shown & set(SELECTIONS) <= named


def test_every_selection_of_a_recipe_has_a_sentence():
    names = {"dense", *Quality(length=4096, windows=1, budgets=(512,)).selections, *FITTED}
    assert names <= set(SELECTIONS)
    assert all(sentence.endswith(".") for sentence in SELECTIONS.values())
    assert explained(["oracle", "mine", "oracle"]) == [("oracle", SELECTIONS["oracle"])]


def test_a_figure_is_the_same_bytes_every_time():
    log = [{"batch": i, "kl_coarse": 1 / i, "kl_fine": 0.1 / i, "recovered_share": 1 - 0.1 / i} for i in range(1, 4)]
    assert figures.training_plot(log) == figures.training_plot(log)


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ([{"layer": 7, "head": 2, "planted": 0.035, "lost": 0.017}], "KV head 2 in layer 7 (stage 1 lost 1.7 %"),
        ([], "None was found."),
        (None, None),  # they were not sought
    ],
)
def test_what_distillation_found_of_retrieval_heads_is_said(heads, said):
    template = files(rendering.__package__).joinpath("templates", "distillation.html")
    values = {"plots": {"training": ""}, "r": {"distill": {"retrieval_heads": heads}}}
    page = " ".join(rendering.render(template, **values).split())
    assert said in page if said else "Retrieval heads" not in page
    # results of older versions do not have the key
    assert "Retrieval heads" not in rendering.render(template, **{**values, "r": {"distill": {}}})
