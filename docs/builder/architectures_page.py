"""``docs/architectures.md``: the supported model types and what does not hold for each, from the table of the code."""

from __future__ import annotations

from .markdown import table

INTRODUCTION = """# Architectures

A model type is supported if it sends its attention through the attention interface of Transformers.
A tiny random model of each type below passes the tests of the type (`python -m pytest -m compat`).
This page is written by `python docs/generate.py` from the table of the code.

* `hf-sparse-attn architectures TYPE` says of one type whether it is supported, and why not.
* `model_cards/architectures.md` lists every model type of Transformers, with the reason where it is refused.
* A refused type raises a `ValueError` with that reason before anything is changed.
* Encoder-decoders are refused: their caches hold two kinds of keys.
* Composite models are served where the page names them: the text part is sparse.
"""


def page() -> str:
    """The page, of all supported types."""
    from hf_sparse_attn.architectures import SUPPORTED
    from hf_sparse_attn.architectures.table import compatibility

    rows = [compatibility(name) for name in sorted(SUPPORTED)]
    limited = sum(bool(row.note) for row in rows)
    lines = [*INTRODUCTION.splitlines(), "", f"{len(rows)} types are supported, {limited} of them with a limit.", ""]
    lines += table(["model type", "limit"], [[f"`{row.model_type}`", row.note.replace("_", r"\_")] for row in rows])
    return "\n".join(lines) + "\n"
