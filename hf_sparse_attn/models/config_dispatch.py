"""The configs of sparse models: what stands in Transformers' CONFIG_MAPPING and chooses them, what they hold, and where
it is written.

Of a composite model, which has a text part beside others, only the text part is sparse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name

from ..architectures import supported_types
from ..architectures.class_factory import MadeMixin
from ..config import ATTN_IMPLEMENTATION, KEY, SparseAttentionConfig, StoredSettings
from ..router.module import SparseRouter

PREFIX = "Sparse"  # of the names of sparse classes


def _asked(
    value: SparseAttentionConfig | Mapping[str, Any], saved: SparseAttentionConfig | Mapping[str, Any]
) -> SparseAttentionConfig:
    """The settings ``value`` in place of those of a checkpoint. Retrieval heads that it was ``saved`` with were found
    with its routers: they stay unless ``value`` names others, or ``"retrieval_heads": []``.
    """
    settings, found = SparseAttentionConfig.coerce(value), SparseAttentionConfig.coerce(saved).retrieval_heads
    named = settings.retrieval_heads or (isinstance(value, Mapping) and "retrieval_heads" in value)
    return settings if named else settings.changed(retrieval_heads=found)


class Dispatcher(type):
    """The class of dispatchers; a dispatcher is in all else the stock class, which is imported when it is
    needed first.
    """

    make_sparse: Callable[[type], type]
    module: str  # of the stock class, below transformers.models

    @property
    def __doc__(cls) -> Any:  # type: ignore[override]
        return cls.stock.__doc__  # Transformers reads a checkpoint's name in it, for the documentation of stock models

    @property
    def stock(cls) -> Any:
        # not every config class is in the module that its model type is named after
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
            kwargs[KEY] = _asked(kwargs[KEY], config_dict.get(KEY) or {}).to_dict()
            config_dict = {**config_dict, KEY: kwargs[KEY]}
        return chosen.from_dict(config_dict, **kwargs)

    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_pretrained`."""
        # the stock method, run on the dispatcher: it ends in `from_dict` above, which chooses the class
        return PreTrainedConfig.from_pretrained.__func__(cls, *args, **kwargs)  # type: ignore[attr-defined]

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.stock, name)

    # so that code with the dispatcher in hand treats stock configs, and sparse ones over them, as its instances
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.stock)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.stock)


def dispatcher(name: str, model_type: str, make_sparse: Callable[[Any], type]) -> type:
    """The dispatcher for ``model_type``, whose stock config class is ``name``;
    ``make_sparse`` gives its sparse counterpart.
    """
    # Transformers finds a class by its __name__, and would prefer a class from outside `transformers` to remote code
    namespace = {
        "__module__": f"transformers.{__name__}",
        "module": model_type_to_module_name(model_type),
        "make_sparse": staticmethod(make_sparse),
    }
    return Dispatcher(name, (), namespace)


_IMPLEMENTATION: Any = PreTrainedConfig._attn_implementation  # a property


class SparseConfigMixin(MadeMixin):
    """In front of a stock config class: carries ``sparse_attention`` and asks for the sparse implementation."""

    def __post_init__(self, **kwargs: Any) -> None:
        # Transformers never saves the attention implementation, so it is the default of this class
        kwargs["attn_implementation"] = kwargs.get("attn_implementation") or implementation(type(self))
        self.sparse_attention: dict[str, Any] | None
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if self.sparse_attention is None:
            return
        name_sparse_classes(self)
        if is_composite(type(self)):
            # an inner model is made from the text config: it stays stock, and the mask function finds the settings
            # there
            setattr(self.text_config, KEY, self.sparse_attention)  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == KEY and not isinstance(value, StoredSettings):
            before = self.__dict__.get(KEY) or StoredSettings(SparseAttentionConfig())
            value = before.replaced(value)  # None: a stock checkpoint read through this class, as PEFT does
        super().__setattr__(name, value)

    def _set_implementation(self, requested: Any) -> None:
        _IMPLEMENTATION.fset(self, asked_implementation(self, requested))

    # the stock getter
    _attn_implementation = _IMPLEMENTATION.setter(_set_implementation)

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        for part in (out, out.get("text_config") or {}):
            if isinstance(part.get(KEY), StoredSettings):
                part[KEY] = part[KEY].settings.to_dict()
        if out.get("architectures"):  # stock names, so that engines without this plugin load the dense model
            out["architectures"] = [name.removeprefix(PREFIX) for name in out["architectures"]]
        return out


def write_settings(model: Any, settings: SparseAttentionConfig) -> None:
    """Make ``settings`` those of a sparse ``model``. Nothing else does.

    Its routers share one holder, from which they read them; its config says them to the mask function and is saved.
    """
    routers = [module for module in model.modules() if isinstance(module, SparseRouter)]
    # copied layers bring a holder of their own along: all go back to one
    holder = routers[0].holder
    holder.settings = settings
    for router in routers:
        router.holder = holder
    config = getattr(model, "config", None)
    if isinstance(config, SparseConfigMixin) or getattr(config, KEY, None) is not None:
        for part in parts(config):
            setattr(part, KEY, StoredSettings(settings, in_use=True))


def parts(config: Any) -> tuple[Any, ...]:
    """The configs that hold the settings: that of the model, and that of its text part if it has others."""
    return (config, config.text_config) if is_composite(type(config)) else (config,)


def is_composite(config_class: type) -> bool:
    """Whether a model has a text part beside others: only that becomes sparse."""
    return "text_config" in getattr(config_class, "sub_configs", {})


def implementation(config_class: type) -> str | dict[str, str]:
    """What to set as attention implementation of a sparse model with such a config."""
    return {"text_config": ATTN_IMPLEMENTATION} if is_composite(config_class) else ATTN_IMPLEMENTATION


def asked_implementation(config: Any, requested: Any) -> Any:
    """The attention implementation that is ``requested`` of a model with ``config``, or dict of those of its parts.

    Of a composite model only the text part is sparse; None is the default: sparse.
    """
    if requested is None and config.sparse_attention is not None:
        return implementation(type(config))
    if not is_composite(type(config)):
        return requested
    if requested == ATTN_IMPLEMENTATION:
        return {"text_config": ATTN_IMPLEMENTATION}
    # "" is Transformers' key for the model itself, beside those of its parts
    if isinstance(requested, dict) and requested.get("") == ATTN_IMPLEMENTATION:
        return {"text_config": ATTN_IMPLEMENTATION, **{part: value for part, value in requested.items() if part}}
    return requested


def name_sparse_classes(config: Any) -> None:
    """Make the ``architectures`` of a sparse ``config`` name sparse classes:
    many libraries take the class of that name.
    """
    config.architectures = config.architectures and [_sparse_name(name) for name in config.architectures]


def name_stock_classes(config: Any) -> None:
    """Undo `name_sparse_classes`."""
    config.architectures = config.architectures and [name.removeprefix(PREFIX) for name in config.architectures]


def _sparse_name(architecture: str) -> str:
    """The name of the sparse counterpart of a stock class; any other name, of a class of remote code, say, as it is."""
    stock = getattr(transformers, architecture, None)
    # a made class has no sparse counterpart: it is one
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)) or issubclass(stock, MadeMixin):
        return architecture
    supported = getattr(stock.config_class, "model_type", None) in supported_types()
    return f"{PREFIX}{architecture}" if supported else architecture
