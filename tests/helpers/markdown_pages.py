"""README.md and docs/ as tests read them: blocks of code, headings, links, prose."""

from __future__ import annotations

import re
from dataclasses import dataclass

from helpers.paths import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
OTHERS = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "AGENTS.md",
    "recipes/README.md",
    "recipes/accelerate/README.md",
]
ALL = PAGES + [ROOT / name for name in (*OTHERS, "kernels/README.md", "model_cards/README.md")]
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[\w: -]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
GENERATED = re.compile(r"<!-- generated: (?P<name>[\w ]+) -->\n(?P<body>.*?)<!-- end of (?P=name) -->", re.DOTALL)
LINK = re.compile(r"!?\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A block of code: what a comment before it says, its language, its text, and the line where it starts."""

    mark: str | None
    language: str
    code: str
    line: int


def label(page):
    return str(page.relative_to(ROOT))


def blocks(text):
    """All fenced blocks of a page."""
    return [
        Block(m["mark"], m["language"], m["code"], text.count("\n", 0, m.start("code")) + 1)
        for m in FENCE.finditer(text)
    ]


def anchors(text):
    """What a link to a heading may name, as GitHub makes it."""
    titles = re.findall(r"^#{1,6} (.+)$", FENCE.sub("", text), re.MULTILINE)
    result = []
    for title in titles:
        name = re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-")
        result.append(name if name not in result else f"{name}-{result.count(name)}")
    return result


def links(text):
    """Targets of all links outside of code."""
    return [match["target"] for match in LINK.finditer(re.sub(r"`[^`\n]*`", "", FENCE.sub("", text)))]


def written(text):
    """What somebody wrote: without code, comments, and blocks that a program wrote."""
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", GENERATED.sub("", text)), flags=re.DOTALL)


def prose(text):
    """Sentences as read: without tables, pictures, headings, the targets of links and code."""
    lines = [line for line in written(text).splitlines() if not line.startswith(("|", "#", "    "))]
    shown = LINK.sub(lambda match: "" if match[0].startswith("!") else match["text"], "\n".join(lines))
    return re.sub(r"`[^`\n]*`", "CODE", shown)


def sentences(text):
    """The sentences of a page's prose; an item of a list ends one."""
    parts = re.split(r"\n\s*\n|\n(?=\* )|\n(?=\d\. )", prose(text))
    return [" ".join(one.split()) for part in parts for one in re.split(r"(?<=[.!?:])\s+", part) if one.strip()]
