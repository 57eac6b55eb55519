"""Pages of HTML that need no network: one look, a template of its own for each."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render_page(template: str, **values: Any) -> str:
    """The page of a template of ``industry/templates``; texts are escaped, and a value that is missing is an error."""
    environment = Environment(
        loader=PackageLoader("hf_sparse_attn", "industry/templates"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
