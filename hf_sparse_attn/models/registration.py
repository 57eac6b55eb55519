"""The sparse counterparts of stock classes: made when they are first needed, and found where Transformers looks for
classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import RLock
from typing import Any

import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import (  # type: ignore[attr-defined]
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
)
from transformers.utils.import_utils import _LazyModule

from ..architectures import SUPPORTED, refuse_unsupported
from ..architectures.class_factory import make_class, makes
from ..architectures.versions import TESTED
from ..attention.call_context import taking_call
from ..attention.interface import sparse_attention_forward
from ..attention.mask_interface import sparse_attention_mask
from ..config import ATTN_IMPLEMENTATION, KEY, SparseAttentionConfig
from .config_dispatch import PREFIX, SparseConfigMixin, dispatcher
from .generate_hooks import prefill_whole_tiles, prepare_with_adopted_cache, validate_beside_call
from .model_class import SparseModelMixin
from .peft_hooks import watch_peft

# of the classes made here: the name that pickles and PEFT adapters note, the package's own
MODULE = __name__.partition(".")[0]
_CONFIGS: dict[type, type] = {}
_REGISTERING = RLock()  # a thread must not see a config class whose models are not registered yet


@makes(SparseConfigMixin)
def sparse_config_class(stock: type[PreTrainedConfig]) -> type:
    """The sparse counterpart of a stock config class, e.g. SparseLlamaConfig. Raises ValueError if unsupported."""
    if issubclass(stock, SparseConfigMixin):
        return stock
    if stock not in _CONFIGS:
        refuse_unsupported(stock.model_type)
    if transformers.__version__ != TESTED:
        from .self_test import require_self_test  # which few need

        require_self_test()
    with _REGISTERING:
        if stock not in _CONFIGS:
            # configs are dataclasses: an annotation and a default make the settings a field
            _CONFIGS[stock] = make_class(
                SparseConfigMixin, stock, __module__=MODULE, __annotations__={KEY: dict | None}, **{KEY: None}
            )
            # stored before its models are registered, which need it
            register_models(stock, _CONFIGS[stock])
        return _CONFIGS[stock]


@makes(SparseModelMixin)
def sparse_class(stock: type[PreTrainedModel]) -> type:
    """The sparse counterpart of a stock model class, e.g. SparseLlamaForCausalLM. Raises ValueError if unsupported.

    Its ``from_pretrained`` takes ``config=sparse_config(...)`` or a checkpoint whose config holds ``sparse_attention``.
    """
    if issubclass(stock, SparseModelMixin):
        return stock
    config_class: Any = sparse_config_class(stock.config_class)
    # methods whose stock code is run with something done before; a class without generate has none of them
    methods: dict[str, Any] = {}
    if issubclass(stock, GenerationMixin):
        methods["prepare_inputs_for_generation"] = _in_front(
            prepare_with_adopted_cache, stock.prepare_inputs_for_generation
        )
        methods["_validate_model_kwargs"] = _in_front(validate_beside_call, stock._validate_model_kwargs)
        methods["_prefill"] = _in_front(prefill_whole_tiles, stock._prefill)
    if not SUPPORTED[config_class.model_type].hands_on:
        # takes the call out of the arguments: the stock forward would not hand it on to attention
        methods["forward"] = taking_call(stock.forward)
    cls = make_class(SparseModelMixin, stock, __module__=MODULE, config_class=config_class, **methods)
    conversion = get_checkpoint_conversion_mapping(stock.__name__)
    if conversion is not None:  # looked up by class name: without this, converted weights would load as random
        register_checkpoint_conversion_mapping(cls.__name__, conversion, overwrite=True)
    return cls


def _in_front(function: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """A method with the signature of the ``stock`` one that is ``function``, which gets the stock one first."""

    @wraps(stock)
    def method(model: Any, *args: Any, **kwargs: Any) -> Any:
        return function(stock, model, *args, **kwargs)

    return method


def sparse_config(
    config: PreTrainedConfig, sparse_attention: SparseAttentionConfig | dict[str, Any]
) -> PreTrainedConfig:
    """A sparse copy of a stock ``config``."""
    values = config.to_dict()
    values[KEY] = SparseAttentionConfig.coerce(sparse_attention).to_dict()
    cls = sparse_config_class(type(config))
    return cls.from_dict(values)  # type: ignore[attr-defined, no-any-return]


def register_models(stock_config: type[PreTrainedConfig], sparse: type) -> None:
    """Register the sparse classes of one architecture with the Auto classes (on first use of its sparse config).

    Tokenizers and processors are found by the config's class, too.
    """
    from transformers.models.auto import modeling_auto

    # not before a sparse config is made: it imports much
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    for mapping in (TOKENIZER_MAPPING, PROCESSOR_MAPPING):
        if stock_config in mapping:
            mapping.register(sparse, mapping[stock_config], exist_ok=True)
    autos = [
        auto
        for name, auto in vars(modeling_auto).items()
        if name.startswith("AutoModel") and auto._model_mapping is not None
    ]
    for auto in autos:
        # some Auto classes do not know this architecture
        model = auto._model_mapping.get(stock_config, None)
        # a decision head, say, has a config of its own over this one
        if getattr(model, "config_class", None) is stock_config:
            auto.register(sparse, sparse_class(model), exist_ok=True)


def register() -> None:
    """Register with Transformers: additive and idempotent. Stock checkpoints still give stock classes."""
    # both: with an attention function alone Transformers makes no mask, and padding would count
    AttentionInterface.register(ATTN_IMPLEMENTATION, sparse_attention_forward)
    AttentionMaskInterface.register(ATTN_IMPLEMENTATION, sparse_attention_mask)
    watch_peft()
    serve_sparse_classes()
    # all of them: those that are not supported are refused with the reason
    for model_type, name in CONFIG_MAPPING_NAMES.items():
        if model_type not in CONFIG_MAPPING._extra_content:  # what somebody else registered stays
            AutoConfig.register(model_type, dispatcher(name, model_type, sparse_config_class), exist_ok=True)


def serve_sparse_classes() -> None:
    """Make sparse classes attributes of the transformers module, where libraries look up what ``config.architectures``
    names.
    """
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
            return named_class(name)

    look_up.serves_sparse_classes = True  # type: ignore[attr-defined]
    # of the class: Transformers runs its __init__ twice, and so has two module objects, to either of which others may
    # hold on
    _LazyModule.__getattr__ = look_up  # type: ignore[method-assign]


def named_class(name: str) -> type:
    """``SparseLlamaForCausalLM`` and the like, made when asked for: a pickle may name a class that this process has not
    made.

    Raises:
        AttributeError: there is no stock class of that name.
    """
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
        return sparse_config_class(stock)
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        return sparse_class(stock)
    raise AttributeError(f"module {MODULE!r} has no attribute {name!r}")
