"""What a sparse model class has in front of its stock class: routers, and what Transformers is told about them."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from ..architectures.class_factory import MadeMixin
from ..config import SparseAttentionConfig
from ..router.module import SparseRouter
from .adapters import SparseAdapterMixin
from .attach import attach_routers, detach_routers
from .checkpoint import SparseSavingMixin
from .config_dispatch import PREFIX, asked_implementation, write_settings
from .gradient_checkpointing import without_reentrance
from .layer_numbers import NumberedLayersMixin

_BUILDING: ContextVar[bool] = ContextVar("building", default=False)  # the stock part of a sparse model is being made


class SparseModelMixin(SparseAdapterMixin, SparseSavingMixin, NumberedLayersMixin, MadeMixin):
    """In front of a stock model class: routers in every eligible attention layer."""

    _supports_flash_attn = False  # continuous batching would silently switch to dense flash attention
    _supports_context_parallel = False  # it drops masks, and each rank would route by its own part of the keys
    # selection compares scores, so routers stay in float32; Transformers heeds this list for bfloat16, too
    _keep_in_fp32_modules_strict = ("router",)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # heads for classification make their body with AutoModel from the sparse config: the whole model gives it
        # routers
        return stock_class(cls)(*args, **kwargs) if _BUILDING.get() else super().__new__(cls)

    @classmethod
    def is_custom_code(cls) -> bool:
        """What holds for the stock class: Transformers converts the weights of its own models only, found by their
        model type.
        """
        return stock_class(cls).is_custom_code()

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        # a context variable: another thread may make a sparse model at the same time
        building = _BUILDING.set(True)
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            _BUILDING.reset(building)
        settings = SparseAttentionConfig.coerce(config.sparse_attention)
        attach_routers(self, settings)
        write_settings(self, settings)
        self.add_model_tags(["hf-sparse-attn"])  # type: ignore[attr-defined]
        # as stock classes end their __init__: weights are made there, those of routers, too
        self.post_init()  # type: ignore[attr-defined]

    def initialize_weights(self) -> None:
        # an inner stock model would dispatch to its own _init_weights, which does not know routers
        super().initialize_weights()  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, SparseRouter):
                module.init_weights()

    def _get_name(self) -> str:
        # Trainer looks a model up by this name to know whether label smoothing must shift the labels
        return type(self).__name__.removeprefix(PREFIX)

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As the stock method; of a composite model ``"hf_sparse"`` is for the text part."""
        requested = asked_implementation(self.config, attn_implementation)  # type: ignore[attr-defined]
        super().set_attn_implementation(requested, *args, **kwargs)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        function = without_reentrance(gradient_checkpointing_func) if enable else gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable, function, **kwargs)  # type: ignore[misc]


def stock_class(cls: type) -> type[PreTrainedModel]:
    """The stock model class that a sparse one, or a user's own class over it, stands on."""
    return next(
        base for base in cls.__mro__ if issubclass(base, PreTrainedModel) and not issubclass(base, SparseModelMixin)
    )


def make_stock(model: Any) -> None:
    """Take the routers of a sparse ``model`` out and give it its stock class."""
    detach_routers(model)
    become(model, stock_class(type(model)))


def become(model: Any, cls: type) -> None:
    """Change the class of a model, by which Transformers finds what to record (hidden states) since its
    ``__init__``.
    """
    model.__class__ = cls
    # a plain dict before Transformers 5.18
    registry: Any = _CAN_RECORD_REGISTRY
    registry[str(cls) if type(registry) is dict else model] = model._can_record_outputs
