"""Filling templates: a value that is missing is an error, never a blank."""

from __future__ import annotations

import math
from importlib.resources.abc import Traversable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: Traversable, **values: Any) -> str:
    """The template (HTML is escaped) with ``values``."""
    env = Environment(
        loader=PackageLoader("hf_sparse_attn", "experiments/reports/templates"),  # of what a template includes
        undefined=StrictUndefined,
        autoescape=template.name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # what the templates use: perplexity of a log-loss, bytes in MB
    env.filters["exp"] = math.exp
    env.filters["mb"] = lambda value: f"{value / 2**20:.0f} MB"
    return env.from_string(template.read_text(encoding="utf-8")).render(**values)
