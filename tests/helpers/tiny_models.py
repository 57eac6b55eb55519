"""Tiny random models of every supported architecture, in the dimensions that make mistakes show:
grouped heads, odd sizes, mixed layers.
"""

from __future__ import annotations

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from hf_sparse_attn import routers, sparsify

BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LAYERS = ["sliding_attention", "full_attention", "full_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
SLIDING = {"layer_types": LAYERS, "sliding_window": 40}
VISION = {
    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}

CHANGES = {
    "llama": {"rope_parameters": LLAMA3},
    "mistral": {"sliding_window": None},
    "ministral": {"layer_types": LAYERS, "sliding_window": 40},
    "ministral3": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
    "mixtral": EXPERTS,
    "qwen2": {"layer_types": LAYERS, "sliding_window": 40, "use_sliding_window": True},
    "qwen3": {"layer_types": LAYERS, "sliding_window": 40, "use_sliding_window": True, "rope_parameters": YARN},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": EXPERTS,
    "granitemoe": EXPERTS,
    "olmoe": EXPERTS,
    "gemma2": {"layer_types": LAYERS, "sliding_window": 40, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 3.0},
    "gemma3_text": {"layer_types": LAYERS, "sliding_window": 40, "query_pre_attn_scalar": 16},
    "gpt_oss": {**EXPERTS, "layer_types": LAYERS, "sliding_window": 40},
    "olmo3": {"layer_types": LAYERS, "sliding_window": 40},
    "cohere2": {"layer_types": LAYERS, "sliding_window": 40},
    "exaone4": {"layer_types": LAYERS, "sliding_window": 40},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "modernbert": {"layer_types": LAYERS, "local_attention": 40, "cls_token_id": 1, "sep_token_id": 2},
    "starcoder2": {"sliding_window": None},
    **dict.fromkeys(("cwm", "granite_swa", "vaultgemma", "ultrabert", "flint"), SLIDING),
    **dict.fromkeys(("granitemoe_swa", "afmoe", "exaone_moe", "kolibri1"), EXPERTS | SLIDING),
    "modernbert-decoder": {"layer_types": LAYERS, "local_attention": 40},
    "cohere2_moe": {**EXPERTS, **SLIDING, "mlp_layer_types": ["sparse", "dense", "sparse"]},  # a dense layer rotates
    "dots1": {
        **EXPERTS,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "dbrx": {
        **{"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 2048},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
    "beam": {
        **{**EXPERTS, **SLIDING, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse", "sparse"]},
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": None,
        },
    },
    "hrm_text": {"H_cycles": 1, "L_cycles": 1, "L_bp_cycles": [1], "num_hidden_layers": 2},
    "albert": {"num_hidden_groups": 3, "embedding_size": 32},
    "mobilebert": {
        **{"embedding_size": 32, "true_hidden_size": 64, "intra_bottleneck_size": 64, "use_bottleneck": False},
        "initializer_range": 0.05,
    },
    "esmc": {"num_key_value_heads": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "gpt_neox": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    },
}


def tiny_config(model_type):
    """A small config of ``model_type``."""
    if model_type == "patchtst":
        return CONFIG_MAPPING["patchtst"](
            **{
                "num_input_channels": 2,
                "context_length": 820,
                "patch_length": 4,
                "patch_stride": 4,
                "d_model": 64,
                "ffn_dim": 96,
            },
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "prediction_length": 8, "init_std": 0.2},
        )
    if model_type == "timesfm":
        return CONFIG_MAPPING["timesfm"](
            **{
                "patch_length": 4,
                "context_length": 820,
                "horizon_length": 8,
                "num_hidden_layers": 2,
                "hidden_size": 64,
            },
            **{"intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4, "initializer_range": 0.2},
        )
    if model_type == "gemma3":
        text = tiny_config("gemma3_text").to_dict()
        return CONFIG_MAPPING["gemma3"](
            text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=96
        )
    if model_type in ("bert", "electra", "distilbert"):
        values = {name: value for name, value in BASE.items() if name not in ("head_dim", "num_key_value_heads")}
        return CONFIG_MAPPING[model_type](**values)
    return AutoConfig.for_model(model_type, **{**BASE, **CHANGES.get(model_type, {})})


def model_class(config):
    """The class that the compatibility tests use: with a language model head where there is one."""
    named = {"patchtst": transformers.PatchTSTForPrediction, "timesfm": transformers.TimesFmModelForPrediction}
    if config.model_type in named:
        return named[config.model_type]
    mappings = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )
    order = (2,) if config.model_type == "gemma3" else (1, 0)
    return next(mappings[i][type(config)] for i in order if type(config) in mappings[i])


def tiny_model(model_type, seed=0):
    """A stock model with random weights, in evaluation mode;
    zero-initialised weights (sinks, scales, norms) are moved.
    """
    torch.manual_seed(seed)
    config = tiny_config(model_type)
    model = model_class(config)(config).eval()
    # before Transformers 5.23 stock SDPA leaves the cap out in silence
    if getattr(config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2 or "sinks" in name:
                weight += 0.1 * torch.randn_like(weight)
    return model


def sparse_tiny_model(model_type, sparse_attention, noise=0.1):
    """`tiny_model` made sparse, its routers moved away from their untrained start."""
    model = sparsify(tiny_model(model_type), sparse_attention)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for router in routers(model):
            for weight in router.parameters():
                weight += noise * torch.randn(weight.shape, generator=generator)
    return model
