"""Why a model type is refused: the first of these rules that its config and the source of its models meet."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from transformers import __version__

from .inspection import ModelSource, model_source

_VISION = """IMAGE IMAGE_CLASSIFICATION BACKBONE OBJECT_DETECTION ZERO_SHOT_IMAGE_CLASSIFICATION
    ZERO_SHOT_OBJECT_DETECTION MASK_GENERATION SEMANTIC_SEGMENTATION INSTANCE_SEGMENTATION
    UNIVERSAL_SEGMENTATION IMAGE_SEGMENTATION DEPTH_ESTIMATION VIDEO_CLASSIFICATION KEYPOINT_MATCHING
    KEYPOINT_DETECTION POSE_ESTIMATION IMAGE_MATTING IMAGE_TO_IMAGE TABLE_RECOGNITION TEXT_RECOGNITION
    POINTMAP_ESTIMATION NORMAL_ESTIMATION MASKED_IMAGE_MODELING CAUSAL_IMAGE_MODELING"""
_AUDIO = """CTC RNNT TDT AUDIO_CLASSIFICATION AUDIO_FRAME_CLASSIFICATION AUDIO_XVECTOR TEXT_TO_WAVEFORM
    TEXT_TO_SPECTROGRAM SPEECH_SEQ_2_SEQ"""
VISION_HEADS, AUDIO_HEADS = frozenset(_VISION.split()), frozenset(_AUDIO.split())
LANGUAGE_HEADS = frozenset(("CAUSAL_LM", "MASKED_LM"))
# the main input of a model, or the field that holds it in a composite, tells what it works on
IMAGE_INPUTS = re.compile(r'main_input_name = "(?:pixel_\w+|flattened_patches|patch_embeds)"')
SOUND_INPUTS = re.compile(r'main_input_name = "(?:input_features|input_values|audio_\w+|spectrogram|latents)"')
IMAGE_FIELDS = re.compile(r"vision|image|video|vq_|mask_decoder|detr|geometry|sam_")
SOUND_FIELDS = re.compile(r"audio|acoustic|speech|_asr|code_predictor|dit_")
# names that modeling code uses for states of recurrent layers, and for attention that selects by itself
RECURRENT = re.compile(
    r"conv_states?\b|recurrent_states?\b|ssm_states?\b|\bA_log\b|LightningAttention|[xsm]LSTM|RwkvLinearAttention"
)
OWN_SPARSE = re.compile(r"update_indexer|block_indices|Indexer\(|BlockSparseAttention")

# found by trying: what the rules below cannot see
TRIED = {
    "doge": "learns an attention mask for each head, and sparse attention supports one mask for all of them",
    "esm": "has a rotary embedding that names no rope_type",
    "layoutlm": "builds a mask of its own, [batch, 1, 1, keys], which sparse attention does not read",
    "moshi": "has projections (MoshiLinear) that do not tell their size",
}


@cache
def refusal(model_type: str) -> str:
    """Why a model type is not supported, to follow its name."""
    source = model_source(model_type)
    if source is None:
        return f"is not a model type of Transformers {__version__}"
    if model_type in TRIED:
        return TRIED[model_type]
    return next(reason for rule in RULES if (reason := rule(source)))


def _another_name(source: ModelSource) -> str:
    model_type = source.config.model_type
    return "" if model_type == source.model_type else f"is another name of {model_type!r}: load it as that"


def _no_models(source: ModelSource) -> str:
    if source.models:
        return ""
    if source.borrowed:
        return (
            f"has no model classes of its own, it runs {source.borrowed[0]} on another config: a sparse class "
            "needs both to agree"
        )
    return f"has a config but no model class{_inside(source)}"


def _encoder_decoder(source: ModelSource) -> str:
    # a decoder is what a composite holds in a field whose name ends so
    decodes = getattr(source.config, "is_encoder_decoder", False) or re.search(
        r"decoder$", " ".join(source.wholes().values())
    )
    return (
        "is an encoder-decoder or its decoder: sparse attention serves self-attention over one sequence"
        if decodes
        else ""
    )


def _composite_with_text(source: ModelSource) -> str:
    inner = [field for field in source.parts if re.search(r"text|vlm|thinker|talker", field)]
    if not inner:
        return ""
    return f"is a composite ({_parts(source)}): sparse attention inside one is tested for gemma3 only"


def _without_attention(source: ModelSource) -> str:
    if source.routed:
        return ""
    if RECURRENT.search(source.text):
        return "has recurrent layers (a state space or the like) instead of attention"
    if source.attention:
        return "does not route its attention through Transformers' attention interface"
    # what only wraps other models is left to the rules for composites
    wraps = source.parts or "AutoModel.from_config" in source.text
    return "" if wraps else "has no attention modules of its own"


def _vision(source: ModelSource) -> str:
    # by tables of Auto classes, by the main input, by fields of the config, by what it is a part of
    seen = (
        bool(source.heads & VISION_HEADS)
        or any(IMAGE_INPUTS.search(text) for text in source.models.values())
        or (
            not source.heads & LANGUAGE_HEADS
            and _has(source, "image_size", "num_channels", "in_channels", "patch_size")
        )
        or any(IMAGE_FIELDS.search(field) for field in source.wholes().values())
    )
    return (
        f"works on images or video{_inside(source)}: patches lie in two dimensions, blocks of keys in one"
        if seen
        else ""
    )


def _audio(source: ModelSource) -> str:
    # the same signs as for images
    heard = (
        bool(source.heads & AUDIO_HEADS)
        or any(SOUND_INPUTS.search(text) for text in source.models.values())
        or (
            not source.heads & LANGUAGE_HEADS
            and _has(source, "num_mel_bins", "sampling_rate", "sample_rate", "audio_channels")
        )
        or any(SOUND_FIELDS.search(field) for field in (source.model_type, *source.wholes().values()))
    )
    return f"works on audio{_inside(source)}: no test covers sparse attention over sound" if heard else ""


def _composite(source: ModelSource) -> str:
    return (
        f"is a composite ({_parts(source)}): sparse attention inside one is tested for gemma3 only"
        if source.parts
        else ""
    )


def _own_attention(source: ModelSource) -> str:
    if OWN_SPARSE.search(source.text):
        return "has a sparse attention of its own"
    # multi-head latent attention: DeepSeek-V2, arXiv:2405.04434
    if "kv_lora_rank" in source.text:
        return "caches latent keys (MLA), whose query and value dims differ"
    if RECURRENT.search(source.text):
        return "mixes attention with recurrent or convolution layers, whose cache layers are not supported"
    if "kv_shared" in source.text:
        return "shares keys between layers, and routers summarise the keys of their own layer"
    if "v_head_dim" in source.text:
        return "has values of another dim than its keys"
    return ""


def _scores(source: ModelSource) -> str:
    attention = "\n".join(source.routed.values())
    # a bias as in T5 (Raffel et al. 2019, arXiv:1910.10683), or embeddings of distances
    if re.search(r"position_bias|relative_position|rel_pos", attention):
        return "adds a bias by relative position to its scores, which the kernels do not"
    if "create_chunked_causal_mask" in source.text:
        return "attends within chunks, whose cache layers are not supported"
    return ""


def _rotation(source: ModelSource) -> str:
    if any(_normed_after_rotation(source, text) for text in source.routed.values()):
        return "norms its keys after rotating them, so un-rotating a key does not give back what was rotated"
    # Llama's rotate_half is (−x2, x1)
    if "torch.cat((x2, -x1)" in source.reached.get("rotate_half", ""):
        return "rotates the other way round than the rotary embeddings that routers read"
    # one position each for time, height and width: Qwen2-VL, arXiv:2409.12191
    if "mrope" in source.text:
        return f"rotates by several positions a token (M-RoPE or the like){_inside(source)}; routers un-rotate by one"
    return ""


def _untold(source: ModelSource) -> str:
    # the arguments of calls of an attention module, with parentheses one level deep
    calls = [
        call
        for text in source.reached.values()
        for call in re.findall(r"self\.(?:self_)?att\w*\(((?:[^()]|\([^()]*\))*)\)", text)
    ]
    # what stands before and after the attention function is fetched
    texts = [text.partition("get_interface") for text in source.routed.values() if "apply_rotary" in text]
    if any(re.search(r"\n +position_ids\b", before) and "position_ids=" not in after for before, _, after in texts):
        return "does not tell its attention function the positions, by which keys are un-rotated"
    if any("hidden_states" in call and "**" not in call for call in calls):
        return "does not pass keyword arguments on to its attention, so a call cannot reach the routers"
    return ""


# Every rule above it found nothing: it always has a reason.
def _untested(source: ModelSource) -> str:
    if source.heads & LANGUAGE_HEADS:
        return "routes its attention through the interface, but no test covers it yet"
    if _has(source, "prediction_length"):
        return "works on time series, and no test covers it yet"
    return f"has no class with a language-model head{_inside(source)}, and no test covers it"


# From what a model is to how its attention works; the last rule always has a reason.
RULES: tuple[Callable[[ModelSource], str], ...] = (
    *(
        _another_name,
        _encoder_decoder,
        _composite_with_text,
        _no_models,
        _without_attention,
        _audio,
        _vision,
        _composite,
    ),
    *(_own_attention, _scores, _rotation, _untold, _untested),
)


def _parts(source: ModelSource) -> str:
    return ", ".join(f"{field}: {part}" if part else field for field, part in source.parts.items())


def _inside(source: ModelSource) -> str:
    return "".join(f" (it is the {field} of {whole})" for whole, field in [*source.wholes().items()][:1] if whole)


def _has(source: ModelSource, *fields: str) -> bool:
    return any(hasattr(source.config, field) for field in fields)


def _normed_after_rotation(source: ModelSource, attention: str) -> bool:
    """Whether a norm with weights, which do not turn along, is applied to the keys after their rotation."""
    # the code between the last rotation and the call of the interface
    after = re.split(r"apply_\w*rot\w*\(", attention.split("get_interface")[0])[-1]
    norms = dict(re.findall(r"self\.(k\w*norm|qk_norm) = (\w+)\(", attention)) if "apply_" in attention else {}
    return any(
        f"self.{name}(" in after and "weight" in source.reached.get(kind, "weight") for name, kind in norms.items()
    )
