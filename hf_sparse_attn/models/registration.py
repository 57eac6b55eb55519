"""Sparse model classes made once per stock class, the config dispatcher, and the registration with Transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import RLock
from typing import Any, cast

import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import (  # type: ignore[attr-defined]
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
)
from transformers.utils.import_utils import _LazyModule
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from ..architectures import SUPPORTED, refuse_unsupported
from ..architectures.class_factory import MadeMixin, make_class
from ..architectures.versions import is_tested
from ..attention.cache_adoption import adopt_layers
from ..attention.call_context import taking_call
from ..attention.interface import sparse_attention_forward
from ..attention.mask_interface import mask_if_it_hides, of_the_caches_length, sparse_attention_mask
from ..config import ATTN_IMPLEMENTATION, KEY, SparseAttentionConfig, StoredSettings
from .adapter_marks import raise_for_marked_adapters
from .adapters import SparseAdapterMixin
from .attach import attach_routers, detach_routers, routers
from .checkpoint import SparseSavingMixin
from .composite import asked_implementation, implementation, is_composite, store_settings
from .config_dispatch import dispatcher
from .generate_hooks import in_whole_tiles
from .gradient_checkpointing import without_reentrance
from .layer_numbers import NumberedLayersMixin, sparse_sites

PREFIX = "Sparse"  # of the names of sparse classes
_CONFIGS: dict[type, type] = {}
_REGISTERING = RLock()  # a thread must not see a config class whose models are not registered yet


class SparseConfigMixin(MadeMixin):
    """In front of a stock config class: carries ``sparse_attention`` and asks for the sparse implementation."""

    @classmethod
    def over(cls, stock: type) -> type:
        return sparse_config_class(stock)

    def __post_init__(self, **kwargs: Any) -> None:
        # Transformers never saves the attention implementation, so it is the default of this class
        kwargs["attn_implementation"] = kwargs.get("attn_implementation") or implementation(type(self))
        self.sparse_attention: dict[str, Any] | None
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if self.sparse_attention is None:
            return
        name_sparse_classes(self)
        if is_composite(type(self)):
            # an inner model is made from the text config: it stays stock, and the mask function finds the settings there
            setattr(self.text_config, KEY, self.sparse_attention)  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == KEY and not isinstance(value, StoredSettings):
            before = self.__dict__.get(KEY) or StoredSettings(SparseAttentionConfig())
            value = before.replaced(value)  # None: a stock checkpoint read through this class, as PEFT does
        super().__setattr__(name, value)

    def _set_implementation(self, asked: Any) -> None:
        PreTrainedConfig._attn_implementation.fset(self, asked_implementation(self, asked))  # type: ignore[attr-defined]

    _attn_implementation = PreTrainedConfig._attn_implementation.setter(_set_implementation)  # type: ignore[attr-defined]  # the stock getter

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        for part in (out, out.get("text_config") or {}):
            if isinstance(part.get(KEY), StoredSettings):
                part[KEY] = part[KEY].settings.to_dict()
        if out.get("architectures"):  # stock names, so that engines without this plugin load the dense model
            out["architectures"] = [name.removeprefix(PREFIX) for name in out["architectures"]]
        return out


def name_sparse_classes(config: Any) -> None:
    """Make the ``architectures`` of a sparse ``config`` name sparse classes: many libraries take the class of that name."""
    config.architectures = config.architectures and [_sparse_name(name) for name in config.architectures]


def name_stock_classes(config: Any) -> None:
    """Undo `name_sparse_classes`."""
    config.architectures = config.architectures and [name.removeprefix(PREFIX) for name in config.architectures]


def _sparse_name(architecture: str) -> str:
    stock = getattr(transformers, architecture, None)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):  # a class of remote code, say
        return architecture
    try:
        return sparse_class(stock).__name__
    except ValueError:  # of another architecture than the config, one that is not supported
        return architecture


class SparseModelMixin(SparseAdapterMixin, SparseSavingMixin, NumberedLayersMixin, MadeMixin):
    """In front of a stock model class: routers in every eligible attention layer."""

    _supports_flash_attn = False  # continuous batching would silently switch to dense flash attention
    _supports_context_parallel = False  # it drops masks, and each rank would route by its own part of the keys
    _keep_in_fp32_modules_strict = ("router",)

    @classmethod
    def over(cls, stock: type) -> type:
        return sparse_class(stock)

    @classmethod
    def is_custom_code(cls) -> bool:
        """What holds for the stock class: Transformers converts the weights of its own models only, found by their model type."""
        return stock_class(cls).is_custom_code()

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for inner in [part for part in self.modules() if part is not self and isinstance(part, SparseModelMixin)]:  # type: ignore[attr-defined]
            make_stock(inner)  # heads for classification build their body with AutoModel from the sparse config
        settings = SparseAttentionConfig.coerce(config.sparse_attention)
        attach_routers(self, settings)
        store_settings(config, settings)
        self.add_model_tags(["hf-sparse-attn"])  # type: ignore[attr-defined]
        self.post_init()  # type: ignore[attr-defined]

    def initialize_weights(self) -> None:
        # an inner stock model would dispatch to its own _init_weights, which does not know routers
        super().initialize_weights()  # type: ignore[misc]
        for router in routers(cast(nn.Module, self)):
            router.init_weights()

    def _get_name(self) -> str:
        # Trainer looks a model up by this name to know whether label smoothing must shift the labels
        return type(self).__name__.removeprefix(PREFIX)

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As the stock method; of a composite model ``"hf_sparse"`` is for the text part."""
        asked = asked_implementation(self.config, attn_implementation)  # type: ignore[attr-defined]
        super().set_attn_implementation(asked, *args, **kwargs)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any) -> None:
        function = without_reentrance(gradient_checkpointing_func) if enable else gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable, function, **kwargs)  # type: ignore[misc]


def stock_class(cls: type) -> type[PreTrainedModel]:
    """The stock model class that a sparse one, or a user's own class over it, stands on."""
    return next(base for base in cls.__mro__ if issubclass(base, PreTrainedModel) and not issubclass(base, SparseModelMixin))


def make_stock(model: Any) -> None:
    """Take the routers of a sparse ``model`` out and give it its stock class."""
    detach_routers(model)
    become(model, stock_class(type(model)))


def become(model: Any, cls: type) -> None:
    """Change the class of a model, by which Transformers finds what to record (hidden states) since its ``__init__``."""
    model.__class__ = cls
    # a plain dict before Transformers 5.18
    registry: Any = _CAN_RECORD_REGISTRY
    registry[str(cls) if type(registry) is dict else model] = model._can_record_outputs


def sparse_config_class(stock: type[PreTrainedConfig]) -> type:
    """The sparse counterpart of a stock config class, e.g. SparseLlamaConfig. Raises ValueError if unsupported."""
    if issubclass(stock, SparseConfigMixin):
        return stock
    refuse_unsupported(stock.model_type)
    if not is_tested():
        from .self_test import require_self_test  # which few need

        require_self_test()
    with _REGISTERING:
        if stock not in _CONFIGS:
            _CONFIGS[stock] = make_class(SparseConfigMixin, stock, __annotations__={KEY: dict | None}, **{KEY: None})
            register_models(stock, _CONFIGS[stock])
        return _CONFIGS[stock]


def sparse_class(stock: type[PreTrainedModel]) -> type:
    """The sparse counterpart of a stock model class, e.g. SparseLlamaForCausalLM. Raises ValueError if unsupported.

    Its ``from_pretrained`` takes ``config=sparse_config(...)`` or a checkpoint whose config holds ``sparse_attention``.
    """
    if issubclass(stock, SparseModelMixin):
        return stock
    made = make_class(SparseModelMixin, stock, config_class=sparse_config_class(stock.config_class))  # type: ignore[arg-type]
    if issubclass(stock, GenerationMixin):
        made.prepare_inputs_for_generation = _adopting(stock.prepare_inputs_for_generation)  # type: ignore[attr-defined]
        made._prefill = in_whole_tiles(stock._prefill)  # type: ignore[attr-defined]
    if not SUPPORTED[made.config_class.model_type].hands_on:  # type: ignore[attr-defined]
        made.forward = taking_call(stock.forward)  # type: ignore[attr-defined]
    conversion = get_checkpoint_conversion_mapping(stock.__name__)
    if conversion is not None:  # looked up by class name: without this, converted weights would load as random
        register_checkpoint_conversion_mapping(made.__name__, conversion, overwrite=True)
    return made


def _adopting(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """``prepare_inputs_for_generation`` that adopts the cache: `generate` calls it outside of what is compiled."""

    @wraps(prepare)
    def prepare_inputs(model: Any, *args: Any, **kwargs: Any) -> Any:
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        if caches and model.config.get_text_config()._attn_implementation == ATTN_IMPLEMENTATION:
            adopt_layers(caches[0], [site.layer_idx for site in sparse_sites(model)])
            inputs = prepare(model, *args, **kwargs)
            mask = mask_if_it_hides(inputs.get("attention_mask"), caches[0], kwargs.get("is_first_iteration"))
            inputs["attention_mask"] = of_the_caches_length(mask, caches[0])
            return inputs
        return prepare(model, *args, **kwargs)

    return prepare_inputs


def sparse_config(config: PreTrainedConfig, sparse_attention: SparseAttentionConfig | dict[str, Any]) -> PreTrainedConfig:
    """A sparse copy of a stock ``config``."""
    values = config.to_dict()
    values[KEY] = SparseAttentionConfig.coerce(sparse_attention).to_dict()
    cls = sparse_config_class(type(config))
    return cls.from_dict(values)  # type: ignore[attr-defined, no-any-return]


def register() -> None:
    """Register with Transformers: additive and idempotent. Stock checkpoints still give stock classes."""
    AttentionInterface.register(ATTN_IMPLEMENTATION, sparse_attention_forward)
    AttentionMaskInterface.register(ATTN_IMPLEMENTATION, sparse_attention_mask)
    raise_for_marked_adapters()
    serve_sparse_classes()
    for model_type, name in CONFIG_MAPPING_NAMES.items():  # all of them: those that are not supported are refused with the reason
        if model_type not in CONFIG_MAPPING._extra_content:  # what somebody else registered stays
            AutoConfig.register(model_type, dispatcher(name, model_type, sparse_config_class), exist_ok=True)


def serve_sparse_classes() -> None:
    """Make sparse classes attributes of the transformers module, where libraries look up what ``config.architectures`` names."""
    stock = _LazyModule.__getattr__
    if hasattr(stock, "serves_sparse_classes"):
        return

    @wraps(stock)
    def look_up(module: Any, name: str) -> Any:
        try:
            return stock(module, name)
        except AttributeError:
            if module.__name__ != transformers.__name__ or not name.startswith(PREFIX):
                raise
            return __getattr__(name)

    look_up.serves_sparse_classes = True  # type: ignore[attr-defined]
    # of the class: Transformers runs its __init__ twice, and so has two module objects, to either of which others may hold on
    _LazyModule.__getattr__ = look_up  # type: ignore[method-assign]


def register_models(stock_config: type[PreTrainedConfig], sparse: type) -> None:
    """Register the sparse classes of one architecture with the Auto classes (on first use of its sparse config).

    Tokenizers and processors are found by the config's class, too.
    """
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING  # not before a sparse config is made: it imports much
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    for mapping in (TOKENIZER_MAPPING, PROCESSOR_MAPPING):
        if stock_config in mapping:
            mapping.register(sparse, mapping[stock_config], exist_ok=True)
    autos = [auto for name, auto in vars(modeling_auto).items() if name.startswith("AutoModel") and auto._model_mapping is not None]
    for auto in autos:
        model = auto._model_mapping.get(stock_config, None)
        if getattr(model, "config_class", None) is stock_config:  # a decision head, say, has a config of its own over this one
            auto.register(sparse, sparse_class(model), exist_ok=True)


def __getattr__(name: str) -> type:
    """``SparseLlamaForCausalLM`` and the like, made when they are asked for: a pickle may name a class that this process has not made."""
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
        return sparse_config_class(stock)
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        return sparse_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
