"""Lists and dicts of settings that refuse to be edited in place: a model that runs with them would not notice."""

from __future__ import annotations

from typing import Any, NoReturn


def refuse_edit(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "config.sparse_attention cannot be edited in place: a model would not notice. Of a model change it with "
        "hf_sparse_attn.set_sparse_attention(model, density=0.25); in a config without a model replace it whole: "
        'config.sparse_attention = {**config.sparse_attention, "density": 0.25}'
    )


class FrozenList(list[Any]):
    """A list that refuses to be edited."""

    __setitem__ = __delitem__ = __iadd__ = __imul__ = append = extend = insert = remove = pop = clear = sort = (
        reverse
    ) = refuse_edit

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self),)

    def __deepcopy__(self, memo: Any) -> FrozenList:
        return self


class FrozenDict(dict[str, Any]):
    """A dict that refuses to be edited."""

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = refuse_edit

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)

    def __deepcopy__(self, memo: Any) -> FrozenDict:
        return self
