"""What stands in Transformers' CONFIG_MAPPING for a stock config class: it gives a sparse config where one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import model_type_to_module_name

from ..config import KEY, SparseAttentionConfig


class Dispatcher(type):
    """The class of dispatchers; a dispatcher is in all else the stock class, which is imported when it is needed first."""

    make_sparse: Callable[[type], type]
    module: str  # of the stock class, below transformers.models

    @property
    def __doc__(cls) -> Any:  # type: ignore[override]
        return cls.stock.__doc__  # Transformers reads a checkpoint's name in it, for the documentation of stock models

    @property
    def stock(cls) -> Any:
        module = import_module(f"transformers.models.{cls.module}")
        return getattr(module, cls.__name__, None) or getattr(transformers, cls.__name__)

    def choose(cls, *values: dict[str, Any]) -> Any:
        """The stock class, or its sparse counterpart where one of the ``values`` holds settings."""
        return cls.make_sparse(cls.stock) if any(v.get(KEY) is not None for v in values) else cls.stock

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.choose(kwargs)(*args, **kwargs)

    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`."""
        chosen = cls.choose(config_dict, kwargs)
        if kwargs.get(KEY) is not None:  # a nested config object is not JSON; the stock code expects plain values
            kwargs[KEY] = SparseAttentionConfig.coerce(kwargs[KEY]).to_dict()
            config_dict = {**config_dict, KEY: kwargs[KEY]}
        return chosen.from_dict(config_dict, **kwargs)

    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_pretrained`."""
        return PreTrainedConfig.from_pretrained.__func__(cls, *args, **kwargs)  # type: ignore[attr-defined]

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.stock, name)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.stock)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.stock)


def dispatcher(name: str, model_type: str, make_sparse: Callable[[Any], type]) -> type:
    """The dispatcher for ``model_type``, whose stock config class is ``name``; ``make_sparse`` gives its sparse counterpart."""
    # Transformers finds a class by its __name__, and would prefer a class from outside `transformers` to remote code
    namespace = {
        "__module__": f"transformers.{__name__}",
        "module": model_type_to_module_name(model_type),
        "make_sparse": staticmethod(make_sparse),
    }
    return Dispatcher(name, (), namespace)
