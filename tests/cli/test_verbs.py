"""The command line: JSON results, and mistakes as one paragraph."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers.cli_messages import message_of
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_sparse_attn.cli.commands import app
from hf_sparse_attn.evaluation.baselines import selector_names, unregister_selector

SMALL = (
    "block_size: 16, query_tile: 16, sink: 16, local: 16, dense_below: 0, min_keys: 80, density: 0.05, query_samples: 8"
)


@pytest.fixture
def invoke():
    """Run the command line in this process; exceptions pass through, as `guarded` expects them."""

    def run(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)

    return run


@pytest.fixture(scope="module")
def text(random_words, tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(random_words(1600))
    return file


@pytest.fixture(scope="module")
def distilled(llama_folder, text, tmp_path_factory):
    """(folder of the model, report) of the verb distill."""
    out = tmp_path_factory.mktemp("cli")
    arguments = [
        "distill",
        llama_folder,
        out / "sparse",
        "--text",
        text,
        "--sparse",
        SMALL,
        "--context",
        200,
        "--batches",
        2,
    ]
    arguments += ["--dtype", "float32", "--json", out / "report.json"]
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return out / "sparse", json.loads((out / "report.json").read_text())


def test_doctor_prints_json_on_standard_output(invoke):
    done = invoke("doctor", "--json", "-")
    result = json.loads(done.stdout)
    assert done.exit_code == 0 and result["implementation"] in result["implementations"]
    assert {
        "packages",
        "cpu",
        "commit",
        "device",
        "cache",
        "why",
        "model_types",
        "extras",
    } <= result.keys() and "llama" in result["model_types"]
    assert "implementation" in done.stderr and invoke("doctor").stdout == ""


LAYER = [
    "--length",
    "300,512",
    "--keys",
    "256",
    "--dtype",
    "float32",
    "--heads",
    "4/2",
    "--head-dim",
    "16",
    "--repeats",
    "1",
]


@pytest.mark.parametrize("verb", ["attention", "backward", "decode", "router"])
def test_bench_writes_json(verb, invoke, tmp_path):
    done = invoke("bench", verb, *LAYER, "--json", tmp_path / "b.json")
    assert done.exit_code == 0 and done.stdout == "" and "tokens  dtype" in done.stderr
    written = json.loads((tmp_path / "b.json").read_text())
    assert [(row["benchmark"], row["length"], row["keys"], row["dtype"]) for row in written["rows"]] == [
        (verb, n, 256, "float32") for n in (300, 512)
    ]
    assert written["environment"]["threads"] >= 1 and (tmp_path / "b.svg").exists() == (verb != "router")


def test_bench_router_takes_every_combination(invoke):
    done = invoke(
        "bench",
        "router",
        *LAYER,
        "--index-dim",
        "8,16",
        "--query-samples",
        "8,16",
        "--candidate-factor",
        "1.5,2",
        "--json",
        "-",
    )
    rows = json.loads(done.stdout)["rows"]
    assert (
        len({(r["length"], r["index_dim"], r["query_samples"], r["candidate_factor"]) for r in rows}) == len(rows) == 16
    )


def test_distill_saves_a_trained_model(distilled):
    folder, report = distilled
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (
        type(model).__name__ == "SparseLlamaForCausalLM"
        and model.config.sparse_attention["bookkeeping"]["trained"] is True
    )
    assert model.config.sparse_attention["min_keys"] == 80 and (folder / "tokenizer.json").exists()
    assert report["batches"] == 2 == len(report["log"]) and not (folder / "distill.pt").exists()


def test_eval_writes_the_table(distilled, text, invoke, tmp_path):
    arguments = [
        "--text",
        text,
        "--length",
        200,
        "--windows",
        2,
        "--budgets",
        "80,112",
        "--decode-tokens",
        8,
        "--json",
        tmp_path / "e.json",
    ]
    done = invoke("eval", distilled[0], *arguments)
    written = json.loads((tmp_path / "e.json").read_text())
    assert done.exit_code == 0 and done.stdout == ""
    names = ["dense", *selector_names()]
    assert [(r["keys"], r["selection"]) for r in written["table"]] == [
        (None if n == "dense" else k, n) for k in (80, 112) for n in names
    ]
    assert len(written["windows"]) == 2 * (1 + 2 * len(selector_names())) and all(
        "decode" in row for row in written["table"]
    )
    changed = invoke("eval", distilled[0], *arguments, "--sparse", "query_samples: 1, candidate_factor: 1.0")
    rows = json.loads((tmp_path / "e.json").read_text())
    assert changed.exit_code == 0 and rows["sparse_attention"]["query_samples"] == 1
    losses = [{(r["keys"], r["selection"]): r["prefill"] for r in result["table"]} for result in (written, rows)]
    assert (
        losses[0][80, "two stages"] != losses[1][80, "two stages"]
        and losses[0][80, "oracle"] == losses[1][80, "oracle"]
    )


def test_the_report_of_eval_is_one_page_with_every_figure_and_the_command(
    distilled, text, invoke, tmp_path, monkeypatch
):
    arguments = [
        "eval",
        str(distilled[0]),
        "--text",
        str(text),
        "--length",
        "192",
        "--windows",
        "1",
        "--budgets",
        "80",
        "--report",
    ]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/hf-sparse-attn", *arguments, "a b.html"])
    done = invoke(*arguments, tmp_path / "r.html", "--json", "-")
    html, rows = (tmp_path / "r.html").read_text(), json.loads(done.stdout)["table"]
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", html) and "built-in method" not in html
    assert html.count('src="data:image/svg+xml;base64,') == 4 and html.count("<head>") == html.count("</head>") == 1
    for row in rows:
        for figure in (
            f"{row['prefill']:.4f}",
            f"{row['kl']:.4f}",
            f"{row['output_error']:.3f}",
            f"{np.exp(row['prefill']):.3f}",
        ):
            assert f"<td>{figure}</td>" in html
    assert "hf-sparse-attn eval" in html and "--report &#39;a b.html&#39;" in html and "/usr/bin" not in html


def test_eval_shows_a_models_own_threshold(distilled, text, invoke, tmp_path, capsys):
    names = "oracle,two stages,two stages by threshold,window + sink"
    arguments = [
        "eval",
        distilled[0],
        "--text",
        text,
        "--length",
        192,  # whole blocks
        "--windows",
        1,
        "--selections",
        names,
        "--json",
        tmp_path / "e.json",
    ]
    threshold = "min_keys: 112, max_keys: 112, mass_threshold: 0.05"
    assert invoke(*arguments, "--budgets", 112, "--sparse", threshold).exit_code == 0
    kept = {row["selection"]: row.get("kept") for row in json.loads((tmp_path / "e.json").read_text())["table"]}
    assert kept["two stages"] == 112 != kept["two stages by threshold"]
    assert "own mass_threshold at the fixed budget" in message_of(
        capsys, *arguments, "--budgets", "80,112", "--sparse", threshold
    )


def test_card_makes_the_readme_from_the_results_of_eval(distilled, llama_folder, text, invoke, tmp_path):
    folder = shutil.copytree(distilled[0], tmp_path / "model")
    base = shutil.copytree(llama_folder, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    results = tmp_path / "e.json"
    invoke("eval", folder, "--text", text, "--length", 200, "--windows", 1, "--budgets", 80, "--json", results)
    done = invoke("card", folder, "--results", results, "--base", base, "--json", "-")
    card, table = ModelCard.load(folder / "README.md"), json.loads(results.read_text())["table"]
    assert done.exit_code == 0 and json.loads(done.stdout) == card.data.to_dict() and card.data.license == "mit"
    assert card.text.startswith("\n# model: base with") and all(f"{row['prefill']:.4f}" in card.text for row in table)


def test_a_card_of_a_dense_model_or_of_other_results_is_refused(distilled, llama_folder, tmp_path, capsys):
    (tmp_path / "r.json").write_text("{}")
    assert "holds no sparse model" in message_of(capsys, "card", llama_folder, "--results", tmp_path / "r.json")
    assert "these results hold no table" in message_of(capsys, "card", distilled[0], "--results", tmp_path / "r.json")
    (tmp_path / "r.json").write_text('{"table": [')
    assert "r.json is not a whole JSON file" in message_of(
        capsys, "card", distilled[0], "--results", tmp_path / "r.json"
    )
    assert not (distilled[0] / "README.md").exists()


def test_bench_measures_a_model(distilled, text, invoke):
    done = invoke("bench", "model", distilled[0], "--text", text, "--length", 400, "--keys", 256, "--json", "-")
    assert [row["length"] for row in json.loads(done.stdout)["rows"]] == [400]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["bench", "attention", "--length", "300,many"],
            "--length is '300,many': must be integers separated by commas",
        ),
        (["bench", "decode", "--length", ","], "--length is empty: give at least one integer"),
        (["bench", "router", "--length", "[bold]"], "--length is '[bold]': must be integers"),
        (["bench", "backward", "--length", "[/b]"], "--length is '[/b]': must be integers"),
        (
            ["bench", "attention", "--length", "300", "--dtype", "int8", "--keys", "256"],
            "dtype 'int8' is not supported; supported: auto, bfloat16",
        ),
        (["bench", "attention", "--length", "300", "--keys", "10"], "min_keys is 10: must be >= 144"),
        (["bench", "attention", "--heads", "9"], "--heads is '9': must be query heads / KV heads"),
        (["bench", "router", "--candidate-factor", "two"], "--candidate-factor is 'two'"),
        (["eval", "m", "--text", "t", "--budgets", "a"], "--budgets is 'a'"),
        (["eval", "m", "--text", "t", "--selections", "magic"], "names 'magic'; known: oracle"),
        (["run", "nothing/mine.yaml"], "nothing/mine.yaml: no such file, and no recipe of this package"),
    ],
)
def test_mistakes_are_one_paragraph(arguments, message, capsys):
    assert message in message_of(capsys, *arguments)


def test_a_glob_in_a_message_is_shown_as_it_is(llama_folder, tmp_path, capsys):
    glob = f"{tmp_path}/[a-l]*_gut.txt"
    assert glob in message_of(capsys, "distill", llama_folder, tmp_path / "out", "--text", glob, "--sparse", SMALL)


def test_fields_of_sparse_attention_that_are_no_yaml_are_refused(llama_folder, tmp_path, capsys):
    err = message_of(capsys, "distill", llama_folder, tmp_path / "out", "--text", "t", "--sparse", "min_keys: [1")
    assert "--sparse is 'min_keys: [1'" in err


def test_a_bad_recipe_ends_the_program_with_code_1_and_no_traceback(tmp_path):
    (tmp_path / "mine.yaml").write_text("nam: x\n")
    command = [sys.executable, "-m", "hf_sparse_attn.cli", "run", str(tmp_path / "mine.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(
        f"error: {tmp_path / 'mine.yaml'}: the recipe has no key 'nam'; keys: ablate, compare,"
    )
    assert done.stderr.count("\n") == 1


def test_eval_takes_selectors_of_ones_own_from_a_file(distilled, text, invoke, tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from hf_sparse_attn.evaluation.baselines import MinMax, register_selector\n"
        "class Furthest(MinMax):\n"
        "    name = 'furthest'\n"
        "    def scores(self, call, tiles):\n"
        "        return -call.plan.nearness(tiles).expand(*call.inputs.k.shape[:2], -1, -1)\n"
        "register_selector(Furthest)\n"
    )
    arguments = ["eval", distilled[0], "--text", text, "--length", 200, "--windows", 1, "--budgets", 80]
    arguments += ["--selections", "oracle, furthest, window + sink"]
    try:
        done = invoke(*arguments, "--import", mine, "--json", "-")
        rows = json.loads(done.stdout)["table"]
        assert [row["selection"] for row in rows] == ["dense", "oracle", "furthest", "window + sink"]
        assert rows[2]["kept"] == rows[1]["kept"] and rows[2]["prefill"] not in (rows[1]["prefill"], rows[3]["prefill"])
        assert f"--import {mine} fails with SelectorError: mine.Furthest: the name 'furthest'" in message_of(
            capsys, *arguments, "--import", mine
        )
    finally:
        unregister_selector("furthest")
    assert "names 'furthest'; known: oracle" in message_of(capsys, *arguments)
    assert "there is no such file" in message_of(capsys, *arguments, "--import", tmp_path / "no.py")
