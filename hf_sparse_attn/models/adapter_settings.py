"""What the config of a PEFT adapter says of routers: that it saves them, and the settings of the model that it was made
for.

The settings are a key of the config, ``sparse_attention``, in memory and in ``adapter_config.json``. Version 0.1.0
wrote them into a comment of the regular expression ``exclude_modules``, which is still read.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..config import KEY, SparseAttentionConfig
from .attach import ROUTER

if TYPE_CHECKING:
    from peft import PeftConfig

ADVICE = "adapter of a sparse model: load its base with sparse_attention={settings}, or from a saved sparse model"
_OLD_COMMENT = re.compile(re.escape(ADVICE).replace(r"\{settings\}", r"(\{.*?\})"))


def matches(target: Any, key: str) -> bool:
    """Whether PEFT takes ``key`` for one of the modules or parameters that ``target`` names."""
    if target is None or target == "all-linear":  # routers have no linear layers
        return False
    # PEFT's own rule: a text is a regular expression for the whole name, a list holds names or ends of them
    if isinstance(target, str):
        return re.fullmatch(target, key) is not None
    return any(key == name or key.endswith(f".{name}") for name in target)


def holds_routers(config: PeftConfig) -> bool:
    return any(name.rpartition(".")[2] == ROUTER for name in getattr(config, "modules_to_save", None) or ())


def settings_of(config: PeftConfig) -> dict[str, Any] | None:
    """The settings of the sparse model that ``config`` was made for, without those that have their default;
    None if it names none.
    """
    settings: dict[str, Any] | None = getattr(config, KEY, None)
    if settings is not None:
        return settings
    excluded = getattr(config, "exclude_modules", None)
    comment = _OLD_COMMENT.search(excluded) if isinstance(excluded, str) else None
    return None if comment is None else ast.literal_eval(comment[1])


def put_settings(config: PeftConfig, settings: Any) -> None:
    """Note in ``config`` the ``settings`` that a file holds. Raises ValueError if they are no mapping."""
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"{KEY} in adapter_config.json is {settings!r:.60}: must be a mapping of the settings of the adapter's "
            "base model. "
            "Write it as hf_sparse_attn.lora_config does, or take the key out"
        )
    setattr(config, KEY, dict(settings))


def complete(config: Any, settings: SparseAttentionConfig) -> None:
    """Add routers to what ``config`` saves, and the ``settings`` that they have."""
    if not holds_routers(config):
        config.modules_to_save = [*(config.modules_to_save or ()), ROUTER]
    if settings_of(config) is None:
        note_settings(config, settings)


def note_settings(config: Any, settings: SparseAttentionConfig) -> None:
    """Write the ``settings`` of the base model into ``config``."""
    # only what differs from the defaults; bookkeeping is of one model, not of the settings that an adapter needs
    default = SparseAttentionConfig().to_dict()
    put_settings(config, {k: v for k, v in settings.to_dict().items() if k != "bookkeeping" and v != default[k]})
