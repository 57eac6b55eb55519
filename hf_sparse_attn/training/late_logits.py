"""Logits that nobody may want: made from the hidden states when something reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class LateLogits(Tensor):
    """A tensor that knows its shape, dtype and device, and is ``head(hidden)`` once an operator needs its values.

    Trainer collects the outputs of an evaluation step before it knows whether predictions are wanted.
    """

    head: Callable[[Tensor], Tensor]
    hidden: Tensor
    made: Tensor | None

    @staticmethod
    def __new__(
        cls: type[LateLogits], head: Callable[[Tensor], Tensor], hidden: Tensor, dtype: torch.dtype | None = None
    ) -> LateLogits:
        one = head(hidden[:1, :1])  # how wide a row is, and its dtype
        shape = (*hidden.shape[:-1], one.shape[-1])
        logits: LateLogits = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype or one.dtype, device=one.device)
        logits.head, logits.hidden, logits.made = head, hidden, None
        return logits

    # operators come to `__torch_dispatch__` alone, which decides whether values are needed
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and {
            name for name, value in kwargs.items() if value is not None
        } == {"dtype"}:
            return cls(args[0].head, args[0].hidden, kwargs["dtype"])  # Accelerate makes float32 of every output
        args, kwargs = tree_map_only(cls, cls.whole, (args, kwargs))
        return func(*args, **kwargs)

    @torch.no_grad()
    def whole(self) -> Tensor:
        """The logits, made at the first call."""
        if self.made is None:
            self.made = self.head(self.hidden).to(self.dtype)
        return self.made

    # these read memory without an operator, which `__torch_dispatch__` would not see
    def numpy(self, **options: Any) -> Any:
        return self.whole().numpy(**options)

    def tolist(self) -> Any:
        return self.whole().tolist()

    def __array__(self, dtype: Any = None) -> Any:
        return self.whole().__array__(dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.whole())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.whole().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.whole().clone()
