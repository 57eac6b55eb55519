"""What a forward pass asks of its sparse layers: of each one its arguments, and of all of them a `SparseCall`."""

# Shape legend: B batch, N keys, Q queries.

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from typing import Any, Protocol

from hf_sparse_attn_kernels import BlockSelection
from torch import Tensor, nn

from ..router.module import RoutingInputs, SparseRouter
from ..router.selection import select_blocks


@dataclass(frozen=True)
class Attention:
    """What a call asks of a layer, beside its queries, keys and values.

    Attributes:
        attention_mask: None, a padding mask [B, at least N] or 4D, see `Layout`.
        position_ids: rotary positions [1 or B, Q] of the queries, None for the last of consecutive ones.
        cu_seq_lens: first slots of packed documents and the end, int [documents + 1], or None.
        filled: how many of the keys' slots are filled, int64 [], None for all.
    """

    scale: float
    causal: bool
    softcap: float | None = None
    sinks: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    cu_seq_lens: Tensor | None = None
    filled: Tensor | None = None


def is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether an attention module asks for causal attention, by its call's ``kwargs`` or by itself."""
    requested = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if requested is None else requested)


class Selector(Protocol):
    """Makes a selection: a `SparseRouter` wrapped by `learned_selector`, or a baseline."""

    def __call__(self, router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection: ...


def learned_selector(router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection:
    """The layer's own two-stage router."""
    return select_blocks(router, inputs, query_tile)


# names by which a caller may try to pass a function, and the method to define instead
METHODS = {"observer": "on_document", "on_selection": "on_selection", "on_layer": "on_layer"}


class SparseCall:
    """What one forward pass does in its sparse layers: ``model(..., sparse_call=SparseCall(...))``.

    To observe a pass or to select in a way of one's own, make a subclass. Every sparse layer calls the methods in the
    order in which they stand here; their inputs are detached.

    Args:
        dense: attend densely in every layer (`on_layer` and `on_document` are still called).
        selector: makes the selections instead of the layer's router.
        decode_from: content position from which queries are routed singly (tiles of 1), as cached decoding does.

    Raises:
        TypeError: a function is given for what is a method, a class or a name for a selector, or a subclass is a
            dataclass.
    """

    def __init__(
        self,
        *,
        dense: bool = False,
        selector: Selector = learned_selector,
        decode_from: int | None = None,
        **functions: Any,
    ) -> None:
        for name in functions:
            method = METHODS.get(name)
            hint = (
                f"{name} is a method, {method}: define it in a subclass of SparseCall"
                if method
                else "supported: dense, selector, decode_from"
            )
            raise TypeError(f"SparseCall got an unexpected argument {name!r}; {hint}")
        if isinstance(selector, type) or not callable(selector):
            example = f"{selector.__name__}()" if isinstance(selector, type) else "make_selectors()['oracle']"
            raise TypeError(f"SparseCall.selector is {selector!r}: must be an instance, such as {example}")
        if is_dataclass(self):  # FSDP and the like make a new instance of every dataclass that a forward pass is given
            raise TypeError(
                f"{type(self).__name__} is a dataclass: sharded models copy dataclasses at every module, and what the "
                "copies note is lost. Make it a plain class with an __init__ of its own"
            )
        self.dense, self.selector, self.decode_from = dense, selector, decode_from

    def on_layer(self, router: SparseRouter) -> Tensor | None:
        """First thing in a layer, also where it attends densely.
        A tensor it returns is attached to the layer's output, see `attach`.
        """
        return None

    def on_document(self, router: SparseRouter, inputs: RoutingInputs) -> None:
        """Once for every document of the layer, before anything is selected."""

    def select(self, router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection:
        """The blocks that tiles of ``query_tile`` queries keep, for every run of queries that are routed alike."""
        return self.selector(router, inputs, query_tile)

    def on_selection(self, router: SparseRouter, inputs: RoutingInputs, selection: BlockSelection) -> None:
        """Once for every selection that is used."""
