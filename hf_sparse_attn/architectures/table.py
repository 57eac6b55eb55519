"""The table of all model types of the installed Transformers: supported, supported with limits, or refused and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import transformers

from . import SUPPORTED, supported_types
from .inspection import installed_model_types
from .refusals import refusal

STATES = ("supported", "supported with limits", "refused")
COMMAND = "hf-sparse-attn architectures --markdown model_cards/architectures.md"


@dataclass(frozen=True)
class Row:
    """One model type of the table."""

    model_type: str
    state: str
    note: str  # the limits, or why it is refused


def compatibility(model_type: str) -> Row:
    """The row of one model type, installed or not."""
    if model_type not in supported_types():
        return Row(model_type, "refused", refusal(model_type))
    limits = SUPPORTED[model_type].limits
    return Row(model_type, "supported with limits" if limits else "supported", limits)


def compatibility_table() -> list[Row]:
    """A row for every model type of the installed Transformers, by name."""
    return [compatibility(model_type) for model_type in installed_model_types()]


def count_states(rows: list[Row]) -> dict[str, int]:
    """How many rows are in each state."""
    counts = Counter(row.state for row in rows)
    return {state: counts[state] for state in STATES}


def as_json(rows: list[Row]) -> dict[str, Any]:
    """The table as plain values."""
    return {
        "transformers": transformers.__version__,
        "counts": count_states(rows),
        "model_types": [asdict(row) for row in rows],
    }


def as_markdown(rows: list[Row]) -> str:
    """The table as a page."""
    counts = ", ".join(f"{count} {state}" for state, count in count_states(rows).items())
    lines = [
        "# Architectures",
        "",
        f"All {len(rows)} model types of Transformers {transformers.__version__}: {counts}.",
        "",
        "Supported: a tiny random model of the type passes every test in `tests/architectures/test_supported_types.py`",
        "(`python -m pytest -m compat`).",
        "Refused: `sparsify`, `sparse_config` and `sparse_class` raise a `ValueError` with this reason before "
        "anything is changed.",
        f"The reasons are read from the config and the source of the models. Written by `{COMMAND}`; not edited by "
        "hand.",
        "",
        "| model type | state | limits, or why it is refused |",
        "|---|---|---|",
        *(f"| `{row.model_type}` | {row.state} | {_cell(row.note)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _cell(note: str) -> str:
    return note.replace("|", r"\|").replace("_", r"\_").replace("*", r"\*")
