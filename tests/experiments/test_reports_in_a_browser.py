"""Every kind of report in a real browser, as wide as a desk's screen and as a phone's."""

from __future__ import annotations

import base64

import pytest
from helpers.browser import Browser, find_browser
from helpers.reports import REPORTS, written_report

EXECUTABLE = find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium: make test-browser fetches one"),
]
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844, "mobile": True}
LEAST_TEXT, LEAST_CONTRAST = 14, 4.5  # CSS pixels; WCAG 2.2, 1.4.3

# Lists what a reader would stumble over. Text of a figure is read from its SVG and scaled as the page scales the
# figure.
MEASURE = r"""
(() => {
  const root = document.documentElement, width = root.clientWidth;
  const name = e => e.tagName.toLowerCase() + (e.className ? "." + e.className : "") + ": " +
    (e.alt || e.textContent).trim().slice(0, 40);
  const all = [...document.body.querySelectorAll("*")].filter(e => e.getClientRects().length);
  const boxed = e => e.parentElement.closest(".scroll");
  const outside = all.filter(e => {
    const box = e.getBoundingClientRect();
    return !boxed(e) && (box.left < -1 || box.right > width + 1);
  }).map(name);
  const unboxed = all.filter(e => ["TABLE", "IMG"].includes(e.tagName))
    .filter(e => !boxed(e) || getComputedStyle(boxed(e)).overflowX !== "auto").map(name);

  const channels = colour => colour.match(/[\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const background = e => {
    for (; e; e = e.parentElement) {
      const colour = channels(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const contrast = e => {
    const light = [luminance(channels(getComputedStyle(e).color)), luminance(background(e))].sort((a, b) => b - a);
    return (light[0] + 0.05) / (light[1] + 0.05);
  };
  const texts = all.filter(e => [...e.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim()));
  const images = [...document.images];
  const unseen = images.filter(i => !i.complete || !i.naturalWidth || i.getBoundingClientRect().height < 50).map(name);
  const drawn = images.filter(i => i.naturalWidth && i.src.startsWith("data:image/svg+xml;base64,")).flatMap(i => {
    const bytes = Uint8Array.from(atob(i.src.split(",")[1]), c => c.charCodeAt(0));
    const svg = new DOMParser().parseFromString(new TextDecoder().decode(bytes), "image/svg+xml").documentElement;
    const scale = i.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    return [...svg.querySelectorAll("text, tspan")].filter(t => t.style.fontSize)
      .map(t => ({text: i.alt + ": " + t.textContent, size: scale * parseFloat(t.style.fontSize)}));
  });
  return {
    overflow: root.scrollWidth - width,
    outside, unboxed, unseen,
    texts: texts.map(e => ({text: name(e), size: parseFloat(getComputedStyle(e).fontSize), contrast: contrast(e)})),
    drawn,
    figures: images.length,
  };
})()
"""


@pytest.fixture(scope="module")
def browser():
    with Browser(EXECUTABLE) as started:
        yield started


@pytest.fixture(scope="module", params=REPORTS)
def page(request, tmp_path_factory):
    return written_report(request.param, tmp_path_factory.mktemp("reports"))


def too_small(measured):
    return [text for text in (*measured["texts"], *measured["drawn"]) if text["size"] < LEAST_TEXT - 0.01]


def too_faint(measured):
    return [text for text in measured["texts"] if text["contrast"] < LEAST_CONTRAST]


@pytest.mark.parametrize("screen", [DESK, PHONE], ids=["desk", "phone"])
def test_a_report_is_readable(browser, page, screen):
    visit = browser.visit(page, MEASURE, **screen)
    measured = visit.measured
    assert (visit.errors, visit.requests) == ([], [])
    assert measured["overflow"] == 0 and measured["outside"] == [] and measured["unboxed"] == []
    assert measured["unseen"] == []
    assert len(measured["texts"]) > 50 and too_small(measured) == [] and too_faint(measured) == []
    assert not measured["figures"] or len(measured["drawn"]) > 10 * measured["figures"]  # their texts are texts


FAULTY = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"></head>
<body><p style="width:700px">wide</p><p style="font-size:10px">small</p><p style="color:#aaa">faint</p>
<img alt="lost" src="data:image/png;base64,AAAA"><table><tr><td>loose</td></tr></table>
<div class="scroll" style="overflow-x:auto"><img alt="drawn" width="100" src="data:image/svg+xml;base64,SVG"></div>
<script>console.error("a fault"); fetch("http://127.0.0.1:9/asked").catch(() => 0)</script></body></html>"""
SIZE = 'width="200pt" height="200pt" viewBox="0 0 200 200"'
DRAWN = f'<svg xmlns="http://www.w3.org/2000/svg" {SIZE}><text style="font-size: 10.5px">a</text></svg>'


def test_each_fault_would_be_seen(browser, tmp_path):
    page = tmp_path / "faulty.html"
    page.write_text(FAULTY.replace("SVG", base64.b64encode(DRAWN.encode()).decode()))
    visit = browser.visit(page, MEASURE, **PHONE)
    measured = visit.measured
    assert measured["overflow"] > 0 and "p: wide" in measured["outside"]
    assert {"table: loose", "img: lost"} <= set(measured["unboxed"]) and "img: lost" in measured["unseen"]
    assert {text["text"] for text in too_small(measured)} == {"p: small", "drawn: a"}
    assert {text["text"] for text in too_faint(measured)} == {"p: faint"}
    assert any("a fault" in error for error in visit.errors) and visit.requests == ["http://127.0.0.1:9/asked"]
