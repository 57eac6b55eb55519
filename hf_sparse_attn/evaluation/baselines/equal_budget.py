"""Forward calls that compare selections at one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...attention.call import Selector, SparseCall


def selection_calls(
    budgets: Sequence[int], selectors: Mapping[str, Selector]
) -> list[tuple[int | None, str, SparseCall]]:
    """Dense attention (keys None), then every selection at every budget: (keys, name, call)."""
    sparse = [(keys, name, SparseCall(selector=selector)) for keys in budgets for name, selector in selectors.items()]
    return [(None, "dense", SparseCall(dense=True)), *sparse]
