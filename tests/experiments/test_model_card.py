"""Model cards are made of results alone: metadata, figures, and what is said where something is not known."""

from __future__ import annotations

import copy
import json

import gguf
import pytest
from helpers.paths import RESULTS
from huggingface_hub import ModelCard

from hf_sparse_attn.data.package_cache import _seal
from hf_sparse_attn.data.sources import model_licence
from hf_sparse_attn.experiments.reports.model_card import (
    PIPELINES,
    as_text,
    model_card,
    one_line,
    without_folders,
    write_card,
)


@pytest.fixture(params=sorted(p.name for p in RESULTS.glob("*.json") if "quality" in json.loads(p.read_text())))
def results(request):
    return json.loads((RESULTS / request.param).read_text())


@pytest.fixture
def demo():
    return json.loads((RESULTS / "demo.json").read_text())


def evaluation(results):
    """What the verb eval would have written: no recipe, no training, no speed."""
    return {
        "environment": results["environment"],
        "sparse_attention": results["answer"]["sparse_attention"],
        "table": results["quality"]["table"],
        "windows": results["quality"]["windows"],
    }


def own_figures(table):
    """(length, keys, what, value) of this model's rows, as the metadata should have them."""
    for row in table:
        if row["selection"] in ("dense", "two stages"):
            yield from (
                (row["length"], row["keys"], "log-loss", row[path]) for path in ("prefill", "decode") if path in row
            )
            shares = ("prefill_share", "decode_share")
            yield from ((row["length"], row["keys"], "share-of-oracle", row[s]["share"]) for s in shares if s in row)
            if "recovered_share" in row:
                yield row["length"], row["keys"], "recovered-share", row["recovered_share"]["share"]


def test_the_metadata_holds_every_figure_of_this_model_and_no_other(results):
    card = model_card(results, "unused")
    got = {
        (int(e.dataset_config.split()[0]), e.metric_args.get("keys"), e.metric_type, e.metric_value)
        for e in card.data.eval_results
    }
    want = {
        (length, keys, kind, round(value, 4)) for length, keys, kind, value in own_figures(results["quality"]["table"])
    }
    assert got == want and len(card.data.eval_results) == len(want)
    for entry in card.data.eval_results:
        windows = {
            w["document"].split("[")[0]
            for w in results["quality"]["windows"]
            if entry.dataset_config == f"{w['length']} tokens"
        }
        assert set(entry.dataset_name.split(", ")) == windows and entry.metric_args["windows"] >= 1
    assert card.data.model_name == results["recipe"]["name"] and card.data.library_name == "transformers"
    assert card.data.tags == ["hf-sparse-attn", "sparse-attention"] and card.data.pipeline_tag == "text-generation"


def test_a_written_card_reads_back_the_same(results, tmp_path):
    card = write_card(tmp_path / "README.md", results)
    again = ModelCard.load(tmp_path / "README.md")
    assert again.data.to_dict() == card.data.to_dict() and again.text == card.text


def test_the_text_holds_the_figures_the_budget_the_limits_and_where_it_was_made(results):
    text, environment = model_card(results, "unused").text, results["environment"]
    for row in results["quality"]["table"]:
        share = row.get("prefill_share")
        shown = (
            ""
            if share is None
            else f"{share['share']:.2f}" + (f" [{share['low']:.2f}, {share['high']:.2f}]" if row["n"] > 1 else "")
        )
        start = (
            f"| {row['length']} | {row['keys'] or 'all'} | {row['selection']} | {row['n']} | "
            f"{row['prefill']:.4f} | {shown} |"
        )
        assert start in text
    sparse = results["answer"]["sparse_attention"]
    assert (
        f"keeps {sparse['density']} of the keys that it sees, at least {sparse['min_keys']}, in blocks of "
        f"{sparse['block_size']}" in text
    )
    assert (
        f"measured up to {max(r['length'] for r in results['quality']['table'])} tokens" in text and "## Limits" in text
    )
    assert (
        environment["commit"] in text
        and environment["time"] in text
        and f"torch {environment['packages']['torch']}" in text
    )
    assert "None" not in text and "{{" not in text and ("## Speed" in text) == bool(results["speed"].get("model"))


def test_other_results_give_another_card(demo):
    changed = copy.deepcopy(demo)
    row = next(r for r in changed["quality"]["table"] if r["selection"] == "two stages")
    row["prefill"] += 1
    texts = [str(model_card(r, "unused")) for r in (demo, changed)]
    assert texts[0].count(f"{row['prefill'] - 1:.4f}") == texts[1].count(f"{row['prefill']:.4f}") == 2
    assert f"{row['prefill']:.4f}" not in texts[0]


def test_a_budget_that_varies_is_said(demo):
    fixed = model_card(demo, "x").text
    demo["answer"]["sparse_attention"]["mass_threshold"] = 0.00234
    varying = model_card(demo, "x").text
    assert "at least 0.0023 of the softmax mass" in varying and "max_keys=1024, mass_threshold=None)" in varying
    assert "mass_threshold" not in fixed and "of the softmax mass" not in fixed


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ([[7, 2]], "Of KV head 2 of layer 7, which looks single"),
        ([[7, 2], [9, 0]], "layer 7, KV head 0 of layer 9, which look single"),
    ],
)
def test_retrieval_heads_are_said(demo, heads, said):
    assert "every block is a candidate" not in str(model_card(demo, "unused"))
    demo["answer"]["sparse_attention"]["retrieval_heads"] = heads
    assert said in str(model_card(demo, "unused"))


@pytest.mark.parametrize(
    ("model", "base_model"),
    [
        ({"source": "some/model", "hub_id": None}, "some/model"),
        ({"source": "pypi:some==1.0:**/*.gguf", "hub_id": "some/model"}, "some/model"),
        ({"source": "pypi:some==1.0:**/*.gguf"}, None),
        ({"source": "/some/model"}, None),
    ],
)
def test_the_base_model_is_linked_only_if_it_is_on_the_hub(demo, model, base_model):
    demo["recipe"]["model"] = {"name": "Some model", "license": "mit", **model}
    card = model_card(demo, "unused")
    assert card.data.base_model == base_model and "Base model: Some model." in card.text


def test_a_local_base_model_is_called_by_its_folder_only(demo, tmp_path, monkeypatch):
    (tmp_path / "some" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for source in ("some/model", str(tmp_path / "some" / "model")):
        demo["recipe"]["model"] = {"source": source, "name": None, "license": None}
        card = model_card(demo, "unused")
        assert card.data.base_model is None and "Base model: model." in card.text and str(tmp_path) not in card.text


@pytest.mark.parametrize(
    ("recipe", "found", "licence"),
    [("mit", "apache-2.0", "mit"), (None, "apache-2.0", "apache-2.0"), (None, None, None)],
)
def test_the_licence_is_that_of_the_recipe_or_of_the_base_model_or_unknown(demo, recipe, found, licence):
    demo["recipe"]["model"]["license"], demo["convert"]["license"] = recipe, found
    card = model_card(demo, "unused")
    assert card.data.license == licence and ("license" in card.data.to_dict()) == (licence is not None)
    assert (
        f"{licence}, that of the base model."
        if licence
        else "Unknown: neither the recipe nor the base model names one."
    ) in card.text


def test_results_of_the_verb_eval_make_a_card_too(demo):
    card = model_card(evaluation(demo), "my-model")
    assert card.data.model_name == "my-model" and card.data.license is None and card.data.base_model is None
    assert card.data.eval_results == model_card(demo, "unused").data.eval_results
    assert (
        "Base model: not recorded in the results." in card.text
        and "distillation" not in card.text
        and "seed" not in card.text
    )
    named = model_card({**evaluation(demo), "base": {"source": "some/model", "license": "mit"}}, "my-model")
    assert (
        named.data.base_model == "some/model"
        and named.data.license == "mit"
        and "# my-model: some/model with" in named.text
    )


def test_the_gaps_to_dense_attention_are_shown_where_they_were_measured(demo):
    gaps = json.loads((RESULTS / "gaps.json").read_text())
    text = str(model_card(gaps, "mine"))
    for row in gaps["table"]:
        keys = row["keys"] or "all"
        assert (
            f"| {row['length']} | {keys} | {row['selection']} | {row['kl']:.4f} | {row['output_error']:.3f} |" in text
        )
    mine = next(row for row in gaps["table"] if row["selection"] == "two stages")
    assert (
        f"{mine['recall']:.3f} | {mine['low_mass']:.3f} | {mine['worst_head']['share']:.2f} (layer "
        f"{mine['worst_head']['layer']}" in text
    )
    assert "from dense attention" not in str(model_card(demo, "mine"))


def test_facts_that_were_planted_are_shown_beside_what_else_a_run_measured(demo):
    row = {"length": 4096, "kept": None, "n": 5, "found_dense": 4, "lost": 1, "dense": 0.1234, "sparse": 1.5}
    needles = {
        "verdict": "Dense attention finds 4 of 5 facts.",
        "by_length": [row, {**row, "length": 8192, "kept": 510.3}],
    }
    text = model_card({**demo, "needles": needles}, "x").text
    assert "Dense attention finds 4 of 5 facts." in text and "## Quality on unseen documents" in text
    assert "| 4096 | all | 5 | 4 | 1 | 0.123 | 1.500 |\n| 8192 | 510 | 5 | 4 | 1 | 0.123 | 1.500 |\n" in text
    assert "Facts that stand far back" not in model_card(demo, "x").text


@pytest.mark.parametrize("missing", ["table", "windows", "environment"])
def test_results_without_what_a_card_must_say_are_refused(demo, missing, tmp_path):
    values = evaluation(demo)
    del values[missing]
    options = f"these results hold no {missing}: a card is made from what the verbs run, eval, lm-eval and doctor"
    with pytest.raises(ValueError, match=options):
        write_card(tmp_path / "README.md", values)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("card", "licence"), [("---\nlicense: mit\n---\nx", "mit"), ("---\ntags: [a]\n---\nx", None), ("no metadata", None)]
)
def test_the_licence_of_a_folder_is_that_of_its_card(card, licence, tmp_path):
    assert model_licence(str(tmp_path)) is None
    (tmp_path / "README.md").write_text(card)
    assert model_licence(str(tmp_path)) == licence


@pytest.mark.parametrize("licence", ["mit", None])
def test_the_licence_of_a_gguf_file_is_in_its_header(licence, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SPARSE_ATTN_CACHE", str(tmp_path))
    (tmp_path / "pypi" / "pack==1.0").mkdir(parents=True)
    writer = gguf.GGUFWriter(tmp_path / "pypi" / "pack==1.0" / "m.gguf", "llama")
    if licence:
        writer.add_license(licence)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _seal(tmp_path / "pypi" / "pack==1.0")
    assert model_licence("pypi:pack==1.0:*.gguf") == licence


def test_the_licence_of_a_hub_model_is_unknown_without_a_hub():
    assert model_licence("some/model") is None


def test_committed_cards_are_what_their_results_render():
    """A card that somebody typed in, or forgot to render again:
    hf-sparse-attn card is not needed, the text below is.
    """
    for path in sorted(RESULTS.glob("*.json")):
        recipe = json.loads(path.read_text()).get("recipe")
        if recipe is not None and recipe.get("task", "causal_lm") in PIPELINES:  # the oldest results name no task
            committed = RESULTS.parents[1] / "model_cards" / f"{path.stem}.md"
            card = str(model_card(json.loads(path.read_text()), path.stem))
            assert committed.read_text(encoding="utf-8") == card, f"render {committed} again from {path}"


@pytest.mark.parametrize("name", ["ablation", "robustness"])
def test_runs_that_leave_no_model_have_no_card(name, tmp_path):
    with pytest.raises(ValueError, match=f"a run of task {name} leaves no model behind"):
        write_card(tmp_path / "README.md", json.loads((RESULTS / f"{name}.json").read_text()))
    assert not list(tmp_path.iterdir())


def test_time_and_energy_are_those_of_the_steps(demo):
    card = str(model_card(demo, "unused"))
    assert "Energy was not measured." in card and f"distill {demo['distill']['seconds'] / 60:.1f} min" in card
    for step in ("convert", "distill", "lora", "quality", "speed", "answer"):
        demo[step]["cpu_energy_joules"] = 2500.0
    assert "The processors used 15 kJ in all." in str(model_card(demo, "unused"))
    demo["lora"]["cpu_energy_joules"] = None
    assert "Energy was not measured." in str(model_card(demo, "unused"))


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/me/secret/a.txt", "a.txt"),
        ("~/a.txt", "a.txt"),
        ("C:\\Users\\me\\a.txt", "a.txt"),
        ("kind=/data/rows.jsonl#text", "kind=rows.jsonl#text"),
        ("/data/t.zip::a/b.csv", "t.zip::a/b.csv"),
        ("pypi:a==1:b/*.txt", "pypi:a==1:b/*.txt"),
        ("c=deb:a:usr/*.txt", "c=deb:a:usr/*.txt"),
        ("hub:org/set:train:text", "hub:org/set:train:text"),
    ],
)
def test_a_card_names_files_without_their_folders(source, shown):
    assert without_folders(source) == shown


def test_texts_of_a_card_are_shown_as_they_are():
    dirty = {"a": ["x\n# y", "<b>|c", "[t](u) `v`"]}
    assert as_text(one_line(dirty)) == {"a": ["x # y", "&lt;b&gt;\\|c", "[t]\\(u) \\`v\\`"]}
