"""Models with a text part beside others, and which configs and attention implementations are of the text part."""

from __future__ import annotations

from typing import Any

from ..config import ATTN_IMPLEMENTATION, KEY, SparseAttentionConfig, StoredSettings


def is_composite(config_class: type) -> bool:
    """Whether a model has a text part beside others: only that becomes sparse."""
    return "text_config" in getattr(config_class, "sub_configs", {})


def implementation(config_class: type) -> str | dict[str, str]:
    """What to set as attention implementation of a sparse model with such a config."""
    return {"text_config": ATTN_IMPLEMENTATION} if is_composite(config_class) else ATTN_IMPLEMENTATION


def asked_implementation(config: Any, asked: Any) -> Any:
    """The attention implementation that is ``asked`` of a model with ``config``, or dict of those of its parts.

    Of a composite model only the text part is sparse; None is the default: sparse.
    """
    if asked is None and config.sparse_attention is not None:
        return implementation(type(config))
    if not is_composite(type(config)):
        return asked
    if asked == ATTN_IMPLEMENTATION:
        return {"text_config": ATTN_IMPLEMENTATION}
    if isinstance(asked, dict) and asked.get("") == ATTN_IMPLEMENTATION:
        return {"text_config": ATTN_IMPLEMENTATION, **{part: value for part, value in asked.items() if part}}
    return asked


def parts(config: Any) -> tuple[Any, ...]:
    """The configs that hold the settings: that of the model, and that of its text part if it has others."""
    return (config, config.text_config) if is_composite(type(config)) else (config,)


def store_settings(config: Any, settings: SparseAttentionConfig) -> None:
    """Note in the config of a model what its routers run with."""
    for part in parts(config):
        setattr(part, KEY, StoredSettings(settings, in_use=True))
