"""Which architectures are supported, what each needs to be told, and why another is refused."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TWO_SIDED = "bidirectional: no cache, nothing to generate"
SLIDING = "its sliding-window layers keep their own attention"


@dataclass(frozen=True)
class Architecture:
    """What the factory cannot read from the modules of a model type.

    Attributes:
        interleaved: rotary pairs are dimensions (2i, 2i + 1) instead of (i, i + half).
        rotates: whether an attention module applies the model's rotary embedding.
        limits: what does not hold for this model type, for the table of architectures; "" for nothing.
    """

    interleaved: bool = False
    rotates: Callable[[Any], bool] = lambda site: bool(getattr(site, "use_rope", True))
    limits: str = ""


_PLAIN = Architecture()
_SLIDING = Architecture(limits=SLIDING)
_INTERLEAVED = Architecture(interleaved=True)

SUPPORTED: dict[str, Architecture] = {
    **dict.fromkeys(("llama", "mixtral", "ministral3", "qwen2_moe", "olmo", "olmo2", "granite", "granitemoe", "gpt_neox", "gemma"), _PLAIN),
    **dict.fromkeys(("phi", "phi3", "starcoder2", "olmoe", "seed_oss", "arcee"), _PLAIN),
    **dict.fromkeys(("mistral", "ministral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "gpt_oss", "olmo3"), _SLIDING),
    **dict.fromkeys(("cohere", "glm", "glm4", "helium", "ernie4_5"), _INTERLEAVED),
    "smollm3": _PLAIN,
    "cohere2": Architecture(interleaved=True, rotates=lambda site: site.sliding_window is not None, limits=SLIDING),
    "exaone4": Architecture(rotates=lambda site: site.sliding_window is None or site.is_sliding, limits=SLIDING),
    "gemma3": Architecture(limits=f"the text part; {SLIDING}; images' tokens are causal or refused"),
    "modernbert": Architecture(limits=f"{TWO_SIDED}; {SLIDING}"),
    "bert": Architecture(limits=f"{TWO_SIDED}; as an encoder"),
    "patchtst": Architecture(limits=f"{TWO_SIDED}; time series, sparse over patches"),
    "timesfm": Architecture(limits="time series, sparse over patches, no cache"),
}


def refuse_unsupported(model_type: str) -> None:
    """Raise ValueError naming ``model_type`` and the reason, unless sparse attention supports it."""
    if model_type not in SUPPORTED:
        raise ValueError(f"model type {model_type!r} {refusal(model_type)}; sparse attention supports: {', '.join(sorted(SUPPORTED))}")


@cache
def refusal(model_type: str) -> str:
    """Why a model type is not supported, to follow its name."""
    folder = _folder(model_type)
    sources = [] if folder is None else [file.read_text() for file in folder.glob("modeling_*.py")]
    if not any(re.search(r"class \w*Attention\w*\(", source) for source in sources):
        return "has no attention modules of its own"
    if not any("ALL_ATTENTION_FUNCTIONS" in source for source in sources):
        return "does not route its attention through Transformers' attention interface"
    if any("update_indexer" in source or "block_indices" in source for source in sources):
        return "has a sparse attention of its own"
    if any("kv_lora_rank" in source for source in sources):
        return "caches latent keys (MLA), whose query and value dims differ"
    return "is not supported yet: no test covers it"


def _folder(model_type: str) -> Path | None:
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    spec = importlib.util.find_spec(f"transformers.models.{model_type_to_module_name(model_type)}")
    return Path(spec.origin).parent if spec and spec.origin else None
