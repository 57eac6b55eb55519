"""A model of two layers, made by hand, that goes on as its context did before: it finds facts. And tokenizers."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CODE, HIDDEN, HEAD = 40, 192, 128  # dims of a token's code, of the model, of a head
TOKEN, FIRST, SECOND, OUT = (slice(at, at + CODE) for at in range(0, 4 * CODE, CODE))
ONE = 4 * CODE  # a dim that is always 1
FAST, SLOW = slice(0, 16), 24  # pairs of a head's dims that turn fast, and the first one that hardly turns


def byte_tokenizer():
    """A token for each byte: it knows every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: at for at, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def word_tokenizer_of(text):
    """A tokenizer with a token for each word, number and sign of ``text``."""
    splitter = pre_tokenizers.Whitespace()
    words = dict.fromkeys(["<unk>", *(word for word, _ in splitter.pre_tokenize_str(text))])
    tokenizer = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@torch.no_grad()
def finding_model(vocabulary):
    """After two tokens that stood together before, the token that followed them has by far the highest logit.

    Heads of layer 0 copy the token before and the one before that; layer 1 looks for the place whose two match.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        head_dim=HEAD,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        rms_norm_eps=1e-9,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    codes = torch.randn(vocabulary, CODE, generator=torch.Generator().manual_seed(0)).sign()
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.zero_()
    model.model.embed_tokens.weight[:, TOKEN] = codes
    model.model.embed_tokens.weight[:, ONE] = 1.0
    copying, looking = (layer.self_attn for layer in model.model.layers)
    angles = 1e12 ** (-torch.arange(HEAD // 2) / (HEAD // 2))
    # what the norms divide by: the squares of the parts that are filled
    rms = [((parts * CODE + 1) / HIDDEN) ** 0.5 for parts in (1, 3)]
    eye = torch.eye(CODE)
    for head, part in enumerate((FIRST, SECOND)):
        at, back = head * HEAD, head + 1
        half = at + HEAD // 2
        strength = (20 * HEAD**0.5) ** 0.5 * rms[0]
        copying.q_proj.weight[at : at + 16, ONE] = strength
        # a key that is turned as if it stood `back` later
        copying.k_proj.weight[at : at + 16, ONE] = strength * torch.cos(back * angles[FAST])
        copying.k_proj.weight[half : half + 16, ONE] = strength * torch.sin(back * angles[FAST])
        copying.v_proj.weight[at : at + CODE, TOKEN] = rms[0] * eye
        copying.o_proj.weight[part, at : at + CODE] = eye
    strength = HEAD**0.25 * rms[1]
    for start, mine, theirs in ((SLOW, TOKEN, FIRST), (SLOW + HEAD // 2, FIRST, SECOND)):
        looking.q_proj.weight[start : start + CODE, mine] = strength * eye
        looking.k_proj.weight[start : start + CODE, theirs] = strength * eye
    looking.v_proj.weight[:CODE, TOKEN] = rms[1] * eye
    looking.o_proj.weight[OUT, :CODE] = eye
    model.lm_head.weight[:, OUT] = 2 * codes
    return model
