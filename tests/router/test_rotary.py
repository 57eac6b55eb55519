"""Rotating and un-rotating by a model's own rotary embedding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GlmConfig
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_apply
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_apply

from hf_sparse_attn import routers
from hf_sparse_attn.router.rotary import Rotary, find_rotary

ROPES = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def partial_glm(factor):
    """Rotates a share of the dimensions, interleaved."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}
    config = GlmConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, rope_parameters=rope)
    return GlmRotaryEmbedding(config)


@pytest.fixture(params=[*ROPES, "interleaved", "partial and interleaved"])
def case(request, llama_rotary):
    """(rotary view, the model's own way to rotate)."""
    if request.param in ROPES:
        return llama_rotary(**ROPES[request.param]), llama_apply
    module = partial_glm(1.0 if request.param == "interleaved" else 0.5)
    return Rotary(module, interleaved=True), glm_apply


@pytest.fixture
def keys():
    return torch.randn(2, 3, 50, 16, generator=torch.Generator().manual_seed(0))


def test_rotate_is_that_of_transformers(case, keys):
    rotary, apply = case
    positions = torch.arange(50) * 7
    cos, sin = rotary.module(keys, positions[None])
    want = apply(keys, keys, cos, sin)[1]
    torch.testing.assert_close(rotary.rotate(keys, positions), want, rtol=1e-5, atol=1e-5)


def test_unrotate_is_the_inverse_of_rotate(case, keys):
    rotary, _ = case
    for positions in (torch.arange(50), torch.arange(50) * 37 + 5, torch.arange(100).view(2, 1, 50) / 3):
        torch.testing.assert_close(
            rotary.unrotate(rotary.rotate(keys, positions), positions), keys, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            rotary.rotate(rotary.unrotate(keys, positions), positions), keys, rtol=1e-4, atol=1e-5
        )
    assert (rotary.rotate(keys, torch.arange(50)) - keys).abs().max() > 0.5


def test_yarn_scales_and_unrotate_takes_the_scale_back(llama_rotary, keys):
    rotary = llama_rotary(**ROPES["yarn"])
    assert rotary.module.attention_scaling > 1.1
    norms = rotary.rotate(keys, torch.arange(50)).norm(dim=-1) / keys.norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, rotary.module.attention_scaling))


def test_only_the_rotary_dimensions_of_a_partial_rope_move(keys):
    rotary = Rotary(partial_glm(0.5), interleaved=True)
    assert rotary.dim == 8
    for turned in (rotary.rotate(keys, torch.arange(50) + 3), rotary.unrotate(keys, torch.arange(50) + 3)):
        assert torch.equal(turned[..., 8:], keys[..., 8:])
        assert bool((turned[..., :8] != keys[..., :8]).any(-1).all())


def test_dimensions_beyond_the_rotary_ones_are_left_alone(llama_rotary):
    """Router features are longer than the head."""
    features = torch.randn(5, 32)
    turned = llama_rotary(16).rotate(features, torch.arange(5) + 1)
    assert torch.equal(turned[:, 16:], features[:, 16:]) and not torch.equal(turned[:, :16], features[:, :16])


def test_fractional_positions_lie_between_their_neighbours(case):
    """Half a step further in every pair: twice the turn by ½ is the turn by 1, and the angle to both neighbours is
    equal.
    """
    rotary, _ = case
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    low, mid, high = (rotary.rotate(x, torch.full((4,), p)) for p in (6.0, 6.5, 7.0))
    turned = slice(0, rotary.dim)

    def pairs(y):
        y = y[..., turned]
        y = y.unflatten(-1, (-1, 2)) if rotary.interleaved else torch.stack(y.chunk(2, -1), -1)
        return torch.view_as_complex(y.contiguous())

    before, after, whole = (pairs(b) / pairs(a) for a, b in ((low, mid), (mid, high), (low, high)))
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(before * after, whole, rtol=1e-3, atol=1e-4)
    angle = before.angle()
    assert bool((angle > 0).all()) and bool((angle < 0.51).all())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_ropes_that_change_with_the_length_are_refused_by_name(llama_rotary, kind):
    rope = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 128}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    with pytest.raises(ValueError, match=rf"rope_type='{kind}'.*default, linear, yarn, llama3"):
        llama_rotary(**rope)


def test_dtype_of_the_input_does_not_matter(llama_rotary, keys):
    turned = llama_rotary().rotate(keys.bfloat16(), torch.arange(50))
    assert turned.dtype == torch.float32
    torch.testing.assert_close(turned, llama_rotary().rotate(keys.bfloat16().float(), torch.arange(50)))


def test_find_rotary_takes_the_nearest_and_refuses_several(stock_llama, llama_rotary):
    model = stock_llama()
    name, site = "model.layers.1.self_attn", model.model.layers[1].self_attn
    assert find_rotary(model, site, name, False).module is model.model.rotary_emb
    site.rotary_emb = llama_rotary().module
    assert find_rotary(model, site, name, False).module is site.rotary_emb
    site.another = llama_rotary().module
    with pytest.raises(ValueError, match="LlamaAttention has 2 rotary embeddings at hand"):
        find_rotary(model, site, name, False)
    bare = nn.Sequential(nn.Linear(2, 2))
    assert find_rotary(bare, bare[0], "0", False) is None


def test_layers_share_the_view_of_a_shared_embedding(sparse_llama, every_block):
    """What all layers of a decode step rotate by is computed once."""
    model = sparse_llama(every_block)
    first, second = routers(model)
    assert first.rotary is second.rotary
