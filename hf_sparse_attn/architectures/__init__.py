"""Which architectures are supported, what each needs to be told, and why another is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TWO_SIDED = "bidirectional, as an encoder"
SLIDING = "its sliding-window layers keep their own attention"


@dataclass(frozen=True)
class Architecture:
    """What the factory cannot read from the modules of a model type.

    Attributes:
        interleaved: rotary pairs are dimensions (2i, 2i + 1) instead of (i, i + half).
        rotates: whether an attention module applies the model's rotary embedding.
        hands_on: whether arguments of the model's forward reach its attention modules; where not, a `SparseCall` takes
            another way.
        limits: what does not hold for this model type, for the table of architectures; "" for nothing.
    """

    interleaved: bool = False
    rotates: Callable[[Any], bool] = lambda site: bool(getattr(site, "use_rope", True))
    hands_on: bool = True
    limits: str = ""


# nothing to be told: all that the factory needs is in the modules
_PLAIN_TYPES = """
    llama mixtral ministral3 qwen2_moe olmo olmo2 granite granitemoe granitemoeshared gpt_neox gemma phi phi3
    phimoe starcoder2 olmoe flex_olmo seed_oss arcee smollm3 apertus bitnet jais2 glm4_moe minimax_m2 solar_open
    diffllama
    jetmoe mellum hy_v3 aria_text
    gpt2 gpt_bigcode opt biogpt ctrl hyperclovax dots1 dbrx
"""
# checkpoints of these may have layers with a sliding window
_SLIDING_TYPES = """mistral ministral qwen2 qwen3 qwen3_moe gemma2 gemma3_text gpt_oss olmo3 cwm granite_swa
    granitemoe_swa vaultgemma modernbert-decoder laguna"""
_UNROTATED_TYPES = "afmoe flint"  # only their sliding-window layers rotate
# their rotary pairs are neighbouring dimensions
_INTERLEAVED_TYPES = "cohere glm glm4 helium ernie4_5 ernie4_5_moe"
# encoders: every token sees all others
_TWO_SIDED_TYPES = """bert electra distilbert eurobert gte nomic_bert albert bert-generation ernie roc_bert
    jina_embeddings_v3 mobilebert roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl camembert
    data2vec-text xmod esmc"""

SUPPORTED: dict[str, Architecture] = {
    **dict.fromkeys(_PLAIN_TYPES.split(), Architecture()),
    **dict.fromkeys(_SLIDING_TYPES.split(), Architecture(limits=SLIDING)),
    **dict.fromkeys(_INTERLEAVED_TYPES.split(), Architecture(interleaved=True)),
    **dict.fromkeys(_TWO_SIDED_TYPES.split(), Architecture(limits=TWO_SIDED)),
    **dict.fromkeys(_UNROTATED_TYPES.split(), Architecture(rotates=lambda site: False, limits=SLIDING)),
    # checkpoints of these rotate in some kinds of layers only: which ones, the module or its config tells
    "beam": Architecture(
        rotates=lambda site: site.config.rope_parameters["full_attention"] is not None, limits=SLIDING
    ),
    "cohere2": Architecture(interleaved=True, rotates=lambda site: site.sliding_window is not None, limits=SLIDING),
    "cohere2_moe": Architecture(interleaved=True, rotates=lambda site: site.force_rope, limits=SLIDING),
    **dict.fromkeys(
        # with sliding windows only the layers that have one rotate; without any all do
        ("exaone4", "exaone_moe", "kolibri1"),
        Architecture(rotates=lambda site: site.sliding_window is None or site.is_sliding, limits=SLIDING),
    ),
    "gemma3": Architecture(
        limits=f"the text part; {SLIDING}; images whose tokens see each other both ways are refused"
    ),
    "hrm_text": Architecture(limits="without the two-way attention over instructions (prefix_lm), which is refused"),
    **dict.fromkeys(("modernbert", "ultrabert"), Architecture(limits=f"{TWO_SIDED}; {SLIDING}")),
    # the forward of these takes no arguments for attention
    "patchtst": Architecture(hands_on=False, limits=f"{TWO_SIDED}; time series, sparse over patches"),
    "timesfm": Architecture(hands_on=False, limits="time series, sparse over patches, no cache"),
}


def supported_types() -> list[str]:
    """The supported model types that the installed Transformers knows, by name: older ones lack some."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]

    return sorted(SUPPORTED.keys() & CONFIG_MAPPING_NAMES.keys())


def refuse_unsupported(model_type: str) -> None:
    """Raise ValueError naming ``model_type`` and the reason, unless sparse attention supports it."""
    supported = supported_types()
    if model_type not in supported:
        from .refusals import refusal  # imports all of Transformers' Auto classes

        raise ValueError(
            f"model type {model_type!r} {refusal(model_type)}; sparse attention supports: {', '.join(supported)}"
        )
