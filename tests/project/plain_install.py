"""What a plain installation can do; run by test_wheel.py as ``python -I -S plain_install.py SITE ABSENT...``.

``SITE`` holds the wheel and its hard dependencies, ``ABSENT`` are modules that must not be there.
"""

from __future__ import annotations

import contextlib
import io
import json
import pkgutil
import sys
from importlib import import_module
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

SITE, ABSENT = sys.argv[1], sys.argv[2:]
sys.path.insert(0, SITE)
SPARSE = {"dense_below": 0, "block_size": 16, "query_tile": 16, "sink": 16, "local": 16, "min_keys": 80, "max_keys": 80}


def check_what_is_there():
    import hf_sparse_attn_kernels

    import hf_sparse_attn

    assert not [name for name in ABSENT if find_spec(name) is not None], [name for name in ABSENT if find_spec(name)]
    for module in (hf_sparse_attn, hf_sparse_attn_kernels):
        assert module.__file__.startswith(SITE), module.__file__
    assert distribution("hf_sparse_attn").version == hf_sparse_attn.__version__
    assert [point.value for point in distribution("hf_sparse_attn").entry_points] == ["hf_sparse_attn.cli:main"]
    for result in pkgutil.walk_packages(hf_sparse_attn.__path__, "hf_sparse_attn."):
        if not result.name.startswith(("hf_sparse_attn.cli.", "hf_sparse_attn.recipes.")) and not result.name.endswith(
            "__main__"
        ):
            import_or_name_the_extra(result.name)


def import_or_name_the_extra(name):
    """The plain install has all modules but those of plants, which say what brings their packages."""
    from hf_sparse_attn.system.extras import MissingExtraError

    try:
        import_module(name)
    except MissingExtraError as error:
        assert name.startswith("hf_sparse_attn.industry."), error
        assert "pip install 'hf_sparse_attn[industry]'" in str(error), error


def check_the_files_of_the_package():
    from importlib.resources import files

    from hf_sparse_attn.experiments.recipe import load_recipe
    from hf_sparse_attn.experiments.recipe_values import recipe_names, shipped_recipes
    from hf_sparse_attn.experiments.reports.model_card import model_card

    assert "<html" in files("hf_sparse_attn.experiments.reports").joinpath("templates", "base.html").read_text()
    assert "## Limits" in str(model_card(json.loads(Path("results.json").read_text()), "demo"))
    assert str(shipped_recipes()).startswith(SITE) and len(recipe_names()) > 10
    assert load_recipe("demo").name == "demo"
    Path("own.yaml").write_text("name: own\nmodel: {source: x}\ndata: {train: [a.txt], split: 0.5}\n")
    assert load_recipe("own.yaml", smoke=True).name == "own"


def check_a_model():
    """A stock checkpoint is loaded sparse, learns one step, generates, is saved, and comes back as it was."""
    import torch
    from hf_sparse_attn_kernels import default_choice
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

    import hf_sparse_attn

    assert default_choice("cpu")[0] == "cpp", default_choice("cpu")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained("stock")
    model = AutoModelForCausalLM.from_pretrained("stock", sparse_attention=SPARSE)
    rows = [{"input_ids": torch.randint(64, (200,), dtype=torch.int64, device="cpu")} for _ in range(2)]
    hf_sparse_attn.distill(model, [{"input_ids": row["input_ids"][None]} for row in rows], progress=False)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    arguments = TrainingArguments(
        "out", max_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    hf_sparse_attn.SparseTrainer(
        model, arguments, train_dataset=[{**row, "labels": row["input_ids"]} for row in rows]
    ).train()
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert any(".router." in name for name in changed) and any(".router." not in name for name in changed)
    model.eval().save_pretrained("sparse")
    again = AutoModelForCausalLM.from_pretrained("sparse")
    prompt = rows[0]["input_ids"][None]
    tokens = [
        one.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
        for one in (model, again)
    ]
    assert type(again).__name__ == "SparseLlamaForCausalLM" and torch.equal(*tokens) and tokens[0].shape == (1, 204)


def check_the_console_script():
    from hf_sparse_attn.cli import main

    said, code = io.StringIO(), None
    try:
        with contextlib.redirect_stderr(said):
            main()
    except SystemExit as end:
        code = end.code
    assert code == 2 and "pip install 'hf_sparse_attn[cli]'" in said.getvalue(), said.getvalue()


if __name__ == "__main__":
    check_what_is_there()
    check_the_files_of_the_package()
    check_a_model()
    check_the_console_script()
    print("works")
