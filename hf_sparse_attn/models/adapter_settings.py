"""What the config of a PEFT adapter says of routers: that it saves them, and the mark of the sparse model that it was made for."""

from __future__ import annotations

import ast
import re
import warnings
from typing import TYPE_CHECKING, Any

from ..config import SparseAttentionConfig
from .attach import ROUTER

if TYPE_CHECKING:
    from peft import PeftConfig

ROUTERS = rf"(.*\.)?{ROUTER}(\..*)?"  # a regular expression, to which the mark is a comment
MARK = "adapter of a sparse model: load its base with sparse_attention={settings}, or from a saved sparse model"


def raise_for_marked_adapters() -> None:
    """Make an error of PEFT's warning about the mark of an adapter that is loaded on a dense model."""
    warnings.filterwarnings("error", message=f"You have passed exclude_modules=.*{re.escape(MARK.partition('{')[0])}")


def matches(target: Any, key: str) -> bool:
    """Whether PEFT takes ``key`` for one of the modules or parameters that ``target`` names."""
    if target is None or target == "all-linear":  # routers have no linear layers
        return False
    if isinstance(target, str):
        return re.fullmatch(target, key) is not None
    return any(key == name or key.endswith(f".{name}") for name in target)


def holds_routers(config: PeftConfig) -> bool:
    return any(name.rpartition(".")[2] == ROUTER for name in getattr(config, "modules_to_save", None) or ())


def settings_of(config: PeftConfig) -> dict[str, Any] | None:
    """The settings of the sparse model that ``config`` was made for, as its mark names them; None without a mark."""
    excluded = getattr(config, "exclude_modules", None)
    found = re.search(re.escape(MARK).replace(r"\{settings\}", r"(\{.*?\})"), excluded) if isinstance(excluded, str) else None
    return None if found is None else ast.literal_eval(found[1])


def complete(config: Any, settings: SparseAttentionConfig) -> None:
    """Add routers of these ``settings`` to what ``config`` saves, and the mark."""
    if not holds_routers(config):
        config.modules_to_save = [*(config.modules_to_save or ()), ROUTER]
    if hasattr(config, "exclude_modules") and settings_of(config) is None:
        default = SparseAttentionConfig().to_dict()
        changed = {k: v for k, v in settings.to_dict().items() if k != "bookkeeping" and v != default[k]}
        own = config.exclude_modules
        if own and not isinstance(own, str):
            own = rf"(.*\.)?({'|'.join(map(re.escape, sorted(own)))})"
        config.exclude_modules = f"{own}|" * bool(own) + f"{ROUTERS}(?#{MARK.format(settings=changed)})"
