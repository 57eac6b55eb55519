"""The verb doctor with --needles: a verdict in one line, a table, JSON, a card; and what is refused in one sentence."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.cli_messages import message_of
from helpers.finding_model import byte_tokenizer, finding_model, word_tokenizer_of
from huggingface_hub import ModelCard
from transformers import T5Config
from typer.testing import CliRunner

from hf_sparse_attn import sparsify
from hf_sparse_attn.cli.commands import app
from hf_sparse_attn.data.planted_facts import haystacks

TEXT = "It was said by them who went on that nothing came back. " * 400
CHECK = ["--needles", "--lengths", "700,900", "--facts", "3", "--dtype", "float32"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "mine.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def folder(real_budget, tmp_path_factory):
    """A saved sparse model that finds facts under dense attention, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "finding"
    read = byte_tokenizer()
    told = [read.decode(made.ids.tolist()) for made in haystacks(TEXT, read, [700, 900], 3, 0)]
    tokenizer = word_tokenizer_of("".join(told))
    model = sparsify(finding_model(len(tokenizer)), {**real_budget, "index_dim": None, "candidate_factor": 1.0})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def invoke(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "60"})
    assert done.exit_code == 0
    return done


def test_the_verdict_is_one_line_and_the_json_holds_every_figure(folder, text, tmp_path):
    done = invoke("doctor", folder, *CHECK, "--text", text, "--json", tmp_path / "n.json")
    written = json.loads((tmp_path / "n.json").read_text())
    report = written["needles"]
    assert done.stdout == "" and report["verdict"] in done.stderr.splitlines()
    assert report["verdict"].startswith("Dense attention finds 6 of 6 facts")
    assert [row["length"] for row in report["by_length"]] == [700, 900] and report["facts"] == 6
    assert written["text"] == "mine.txt" and written["model"] == "finding" and written["dtype"] == "float32"
    assert written["sparse_attention"]["min_keys"] == 80 and written["seconds"] > 0 and written["environment"]["cpu"]
    for reading in report["readings"]:
        assert f"{reading['dense']:.3f}" in done.stderr and reading["outcome"] in done.stderr


def test_settings_can_be_tried(folder, text):
    done = invoke("doctor", folder, *CHECK, "--text", text, "--sparse", "density: 1.0", "--json", "-")
    assert json.loads(done.stdout)["needles"]["verdict"].startswith(
        "Dense attention finds 6 of 6 facts, and sparse attention all of these, with all keys of 700"
    )


def test_a_card_is_made_of_it(folder, text, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    invoke("doctor", model, *CHECK, "--text", text, "--json", tmp_path / "n.json")
    done = invoke("card", model, "--results", tmp_path / "n.json", "--base", "some/model", "--json", "-")
    card, report = ModelCard.load(model / "README.md"), json.loads((tmp_path / "n.json").read_text())["needles"]
    assert json.loads(done.stdout) == card.data.to_dict() and card.data.base_model == "some/model"
    assert "## Facts that stand far back" in card.text and report["verdict"] in card.text
    assert "## Quality on unseen documents" not in card.text
    for row in report["by_length"]:
        kept = "all" if row["kept"] is None else f"{row['kept']:.0f}"
        counts = f"| {row['length']} | {kept} | {row['n']} | {row['found_dense']} | {row['lost']} |"
        assert f"{counts} {row['dense']:.3f} | {row['sparse']:.3f} |" in card.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctor", "--needles"], "--needles asks a model, and none is given: hf-sparse-attn doctor MODEL --needles"),
        (["doctor", "some/model"], "only with --needles: hf-sparse-attn doctor some/model --needles"),
        (
            ["doctor", "no/such/folder", "--needles"],
            "MODEL is no/such/folder: there is no such folder, and it is no Hub",
        ),
        (["doctor", "m", "--needles", "--lengths", "long"], "--lengths is 'long': must be integers"),
        (["doctor", "m", "--needles", "--text", "no.txt"], "--text is no.txt: there is no such file"),
    ],
)
def test_mistakes_are_one_paragraph(arguments, message, capsys):
    assert message in message_of(capsys, *arguments)


def test_what_is_no_model_is_named(folder, text, tmp_path, capsys):
    assert f"MODEL is {text}, a file: give the folder" in message_of(capsys, "doctor", text, "--needles")
    assert f"MODEL is {tmp_path}, a folder without config.json" in message_of(capsys, "doctor", tmp_path, "--needles")
    T5Config(num_layers=1, d_model=16).save_pretrained(tmp_path / "t5")
    assert "no causal language model" in message_of(capsys, "doctor", tmp_path / "t5", "--needles")


def test_lengths_and_texts_that_do_not_fit_are_named(folder, text, tmp_path, capsys):
    check = ["doctor", folder, "--needles", "--dtype", "float32", "--facts", 3]
    wrong = message_of(capsys, *check, "--text", text, "--lengths", 9000)
    assert "a length of 9000 tokens is beyond the 4096 positions of this model" in wrong
    (tmp_path / "short.txt").write_text(TEXT[:300])
    assert "the text has " in message_of(capsys, *check, "--text", tmp_path / "short.txt", "--lengths", 700)
    dense = message_of(capsys, *check, "--text", text, "--lengths", 700, "--sparse", "dense_below: 800")
    assert "dense_below=800 tokens dense, so that nothing would be sparse" in dense


def test_a_hub_id_that_cannot_be_fetched_is_named(capsys):
    assert "nobody/nothing" in message_of(capsys, "doctor", "nobody/nothing", "--needles")


def test_a_stock_model_is_asked_with_fresh_routers(text, tmp_path):
    torch.manual_seed(0)
    read = byte_tokenizer()
    told = [read.decode(made.ids.tolist()) for made in haystacks(TEXT, read, [700, 900], 3, 0)]
    tokenizer = word_tokenizer_of("".join(told))
    finding_model(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    done = invoke("doctor", tmp_path, *CHECK, "--text", text, "--sparse", "dense_below: 0", "--json", "-")
    assert json.loads(done.stdout)["sparse_attention"]["min_keys"] == 512
