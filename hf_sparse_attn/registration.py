"""Sparse model classes made once per stock class, the config dispatcher, and the registration with Transformers."""

from __future__ import annotations

import sys
from typing import Any, cast

import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .attention import ATTN_IMPLEMENTATION, SparseAttentionMixin, sparse_attention_forward, sparse_attention_mask
from .config import SparseAttentionConfig
from .rotary import find_rotary
from .router import SparseRouter
from .saving import SparseSavingMixin

KEY = "sparse_attention"
SUPPORTED_MODEL_TYPES = ("llama",)
# well-known decoders that are refused by name in from_pretrained; for the rest Transformers' own TypeError names the argument
REFUSED_MODEL_TYPES = ("bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt", "mistral", "qwen2", "qwen3", "gemma2")
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)

_CONFIGS: dict[type, type] = {}
_MODELS: dict[type, type] = {}
_ATTENTIONS: dict[type, type] = {}


class SparseConfigMixin:
    """In front of a stock config class: carries ``sparse_attention`` and asks for the sparse implementation."""

    def __post_init__(self, **kwargs: Any) -> None:
        # Transformers never saves the attention implementation, so it is the default of this class
        kwargs["attn_implementation"] = kwargs.get("attn_implementation") or ATTN_IMPLEMENTATION
        self.sparse_attention: dict[str, Any] | None
        if self.sparse_attention is not None:  # None: a stock checkpoint read through this class, as PEFT does
            self.sparse_attention = SparseAttentionConfig.coerce(self.sparse_attention).to_dict()
        super().__post_init__(**kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        if out.get("architectures"):  # stock names, so that engines without this plugin load the dense model
            out["architectures"] = [name.removeprefix("Sparse") for name in out["architectures"]]
        return out


class SparseModelMixin(SparseSavingMixin):
    """In front of a stock model class: routers in every eligible attention layer."""

    _supports_flash_attn = False  # continuous batching would silently switch to dense flash attention
    _keep_in_fp32_modules_strict = ("router",)

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        attach_routers(self, SparseAttentionConfig.coerce(config.sparse_attention))
        self.add_model_tags(["hf-sparse-attn"])  # type: ignore[attr-defined]
        self.post_init()  # type: ignore[attr-defined]

    def initialize_weights(self) -> None:
        # an inner stock model would dispatch to its own _init_weights, which does not know routers
        super().initialize_weights()  # type: ignore[misc]
        for router in routers(cast(nn.Module, self)):
            router.init_weights()


def routers(model: nn.Module) -> list[SparseRouter]:
    """The routers of a sparse model, by layer."""
    return [m for m in model.modules() if isinstance(m, SparseRouter)]


def attention_sites(model: nn.Module) -> list[Any]:
    """Attention modules that call the attention interface with a causal self-attention of their own cache layer."""
    return [m for m in model.modules() if "Attention" in type(m).__name__ and hasattr(m, "layer_idx") and hasattr(m, "q_proj")]


def attach_routers(model: Any, config: SparseAttentionConfig) -> None:
    """Give every attention layer of a stock ``model`` a router (weights uninitialised) and the thin subclass."""
    sites = [m for m in attention_sites(model) if not isinstance(m, SparseAttentionMixin)]
    if not sites:
        raise ValueError(f"{type(model).__name__} has no attention layer that sparse attention can serve")
    beyond = [layer for layer in config.dense_layers if layer >= len(sites)]
    if beyond:
        raise ValueError(f"sparse_attention.dense_layers is {config.dense_layers!r}: this model has layers 0 to {len(sites) - 1}")
    rotary = find_rotary(model)
    for site in sites:
        cfg = site.config
        heads = int(cfg.num_attention_heads)
        groups = int(getattr(cfg, "num_key_value_heads", None) or heads)
        site.router = SparseRouter(config, heads, groups, int(site.head_dim), rotary, int(site.layer_idx))
        site.__class__ = sparse_attention_class(type(site))


def detach_routers(model: Any) -> None:
    """Remove what `attach_routers` added."""
    for module in model.modules():
        if isinstance(module, SparseAttentionMixin):
            del module.router  # type: ignore[attr-defined]
            module.__class__ = type(module).__bases__[1]


def _make(cache: dict[type, type], mixin: type, stock: type, **namespace: Any) -> type:
    if stock not in cache:
        name = f"Sparse{stock.__name__}"
        cache[stock] = type(name, (mixin, stock), {"__module__": __name__, "__qualname__": name, **namespace})
        setattr(sys.modules[__name__], name, cache[stock])  # picklable
    return cache[stock]


def sparse_attention_class(stock: type) -> type:
    """The thin subclass of a stock attention class."""
    return _make(_ATTENTIONS, SparseAttentionMixin, stock)


def sparse_config_class(stock: type[PreTrainedConfig]) -> type:
    """The sparse counterpart of a stock config class, e.g. SparseLlamaConfig. Raises ValueError if unsupported."""
    if issubclass(stock, SparseConfigMixin):
        return stock
    refuse_unsupported(stock.model_type)
    if stock not in _CONFIGS:
        register_models(stock, _make(_CONFIGS, SparseConfigMixin, stock, __annotations__={KEY: dict | None}, **{KEY: None}))
    return _CONFIGS[stock]


def sparse_class(stock: type[PreTrainedModel]) -> type:
    """The sparse counterpart of a stock model class, e.g. SparseLlamaForCausalLM. Raises ValueError if unsupported.

    Its ``from_pretrained`` takes ``config=sparse_config(...)`` or a checkpoint whose config holds ``sparse_attention``.
    """
    if issubclass(stock, SparseModelMixin):
        return stock
    made = _make(_MODELS, SparseModelMixin, stock, config_class=sparse_config_class(stock.config_class))  # type: ignore[arg-type]
    conversion = get_checkpoint_conversion_mapping(stock.__name__) or get_checkpoint_conversion_mapping(stock.config_class.model_type)  # type: ignore[union-attr]
    if conversion is not None:  # looked up by class name: without this, converted weights would load as random
        register_checkpoint_conversion_mapping(made.__name__, conversion, overwrite=True)
    return made


def sparse_config(config: PreTrainedConfig, sparse_attention: SparseAttentionConfig | dict[str, Any]) -> PreTrainedConfig:
    """A sparse copy of a stock ``config``."""
    values = config.to_dict()
    values[KEY] = SparseAttentionConfig.coerce(sparse_attention).to_dict()
    cls = sparse_config_class(type(config))
    return cls.from_dict(values)  # type: ignore[attr-defined, no-any-return]


def refuse_unsupported(model_type: str) -> None:
    """Raise ValueError naming ``model_type`` unless sparse attention supports it."""
    if model_type in SUPPORTED_MODEL_TYPES:
        return
    routed = _routes_through_interface(model_type)
    reason = "is not supported yet" if routed else "does not route its attention through Transformers' attention interface"
    raise ValueError(f"model type {model_type!r} {reason}; sparse attention supports: {', '.join(SUPPORTED_MODEL_TYPES)}")


def _routes_through_interface(model_type: str) -> bool:
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec(f"transformers.models.{model_type.replace('-', '_')}")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    return folder is not None and any("ALL_ATTENTION_FUNCTIONS" in file.read_text() for file in folder.glob("modeling_*.py"))


def _dispatcher(stock: type[PreTrainedConfig]) -> type:
    """Stands in CONFIG_MAPPING for ``stock``: gives a sparse config where ``sparse_attention`` is asked for, else ``stock``."""

    def choose(*values: dict[str, Any]) -> type:
        return sparse_config_class(stock) if any(v.get(KEY) is not None for v in values) else stock

    def new(_cls: type, *args: Any, **kwargs: Any) -> Any:
        return choose(kwargs)(*args, **kwargs)

    def from_dict(_cls: Any, /, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        cls: Any = choose(config_dict, kwargs)
        if kwargs.get(KEY) is not None:  # a nested config object is not JSON; the stock code expects plain values
            kwargs[KEY] = SparseAttentionConfig.coerce(kwargs[KEY]).to_dict()
            config_dict = {**config_dict, KEY: kwargs[KEY]}
        return cls.from_dict(config_dict, **kwargs)

    # Transformers finds a class by its __name__, and would prefer a class from outside `transformers` to remote code
    namespace: dict[str, Any] = {
        "__module__": f"transformers.{__name__}",
        "__doc__": stock.__doc__,
        "__new__": new,
        "from_dict": classmethod(cast(Any, from_dict)),
    }
    return type(stock.__name__, (stock,), namespace)


def register() -> None:
    """Register with Transformers: additive and idempotent. Stock checkpoints still give stock classes."""
    AttentionInterface.register(ATTN_IMPLEMENTATION, sparse_attention_forward)
    AttentionMaskInterface.register(ATTN_IMPLEMENTATION, sparse_attention_mask)
    for model_type in (*SUPPORTED_MODEL_TYPES, *REFUSED_MODEL_TYPES):
        stock = CONFIG_MAPPING[model_type]
        if not stock.__module__.startswith(f"transformers.{__name__}"):
            AutoConfig.register(model_type, _dispatcher(stock), exist_ok=True)


def register_models(stock_config: type[PreTrainedConfig], sparse: type) -> None:
    """Register the sparse classes of one architecture with the Auto classes (on first use of its sparse config)."""
    for name in AUTO_CLASSES:
        auto = getattr(transformers, name)
        if stock_config in auto._model_mapping:
            auto.register(sparse, sparse_class(auto._model_mapping[stock_config]), exist_ok=True)
