"""Series of sensors: reading, normalising, splitting by time, what is refused; forecasting as a task of a recipe."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from rich.console import Console
from transformers import PatchTSTForPrediction

import hf_sparse_attn
from hf_sparse_attn.data.series import SeriesRows, evaluation_rows, read_series
from hf_sparse_attn.data.sources import SourceError
from hf_sparse_attn.evaluation.tasks import forecast_table
from hf_sparse_attn.pipeline.recipe import RecipeError, load_recipe
from hf_sparse_attn.pipeline.run import run_recipe

# peft asks transformers for a property that the newest versions call by another name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
RECIPES = Path(__file__).parents[1] / "recipes"


def table(steps=1600, machines=("a", "b"), seed=0):
    generator = np.random.default_rng(seed)
    frames = []
    for name in machines:
        time = pd.date_range("2024-01-01", periods=steps, freq="10min", tz="UTC").astype(str)
        wave = np.sin(np.arange(steps) / 20)
        frames.append(pd.DataFrame({"t": time, "m": name, "x": 5 + 2 * wave + generator.normal(size=steps), "y": wave * 100}))
    return pd.concat(frames, ignore_index=True)


@pytest.fixture
def write(tmp_path):
    def make(frame, name="s.csv"):
        frame.to_parquet(tmp_path / name) if name.endswith("parquet") else frame.to_csv(tmp_path / name, index=False)
        return str(tmp_path / name)

    return make


# -- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["s.csv", "s.csv.gz", "s.parquet"])
def test_channels_are_normalised_by_what_trains(write, name):
    frame = table()
    found = read_series([write(frame, name)], 0.75, "t", "m", [])
    assert found.channels == ["x", "y"] and [s.machine for s in found.series] == ["a", "b"]
    raw = np.stack([frame[frame.m == m][["x", "y"]].to_numpy() for m in "ab"])
    trained = raw[:, :1200].reshape(-1, 2)
    assert found.mean == pytest.approx(trained.mean(0).tolist()) and found.deviation == pytest.approx(trained.std(0).tolist())
    assert [s.trained for s in found.series] == [1200, 1200]
    np.testing.assert_allclose(found.series[1].values.numpy(), (raw[1] - trained.mean(0)) / trained.std(0), atol=1e-5)


def test_rows_are_sorted_by_time_repeated_stamps_dropped_and_gaps_filled(write):
    frame = table(machines=("a",))
    want = read_series([write(frame, "sorted.csv")], 0.5, "t", "m", ["x"]).series[0].values
    frame.loc[700:703, "x"] = np.nan
    filled = frame["x"].ffill()
    mixed = pd.concat([frame.sample(frac=1, random_state=1), frame.iloc[5:8]])
    found = read_series([write(mixed, "mixed.csv")], 0.5, "t", "m", ["x"])
    assert len(found.series[0].values) == 1600 and found.filled == [pytest.approx(4 / 1600)]
    again = found.series[0].values[:, 0] * found.deviation[0] + found.mean[0]
    np.testing.assert_allclose(again, filled, rtol=1e-5)
    assert not torch.equal(found.series[0].values[700:704], want[700:704])


def test_a_member_of_a_zip_is_read(write, tmp_path):
    buffer = io.StringIO()
    table().to_csv(buffer, index=False)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("inner/one.csv", buffer.getvalue())
        archive.writestr("readme.txt", "no series")
    found = read_series([f"{tmp_path}/all.zip::inner/one.csv"], 0.5, "t", "m", ["y"])
    assert [s.machine for s in found.series] == ["a", "b"]


def test_the_files_of_one_machine_are_one_series(write):
    frame = table()
    want = read_series([write(frame, "whole.csv")], 0.75, "t", "m", [])
    halves = [write(frame[frame.index % 2 == part], f"{part}.csv") for part in (1, 0)]
    found = read_series(halves, 0.75, "t", "m", [])
    assert sorted(s.machine for s in found.series) == ["a", "b"] and [s.trained for s in found.series] == [1200, 1200]
    for own in want.series:
        other = next(s for s in found.series if s.machine == own.machine)
        torch.testing.assert_close(other.values, own.values, atol=1e-5, rtol=1e-5)


def test_files_without_a_column_of_machines_are_machines(write, tmp_path):
    (tmp_path / "x").mkdir()
    one = table(machines=("a",)).drop(columns="m")
    paths = [write(one, "s.csv"), write(one, "x/s.csv")]
    found = read_series(paths, 0.5, "t", None, [])
    assert [(s.machine, len(s.values)) for s in found.series] == [("s", 1600), ("s", 1600)]


def test_a_row_without_its_machine_is_refused(write):
    frame = table()
    frame.loc[5:6, "m"] = None
    with pytest.raises(SourceError, match="2 rows name no machine in column 'm'"):
        read_series([write(frame)], 0.5, "t", "m", [])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda f: f, ("when", "m", []), r"no column 'when'; columns: t, m, x, y"),
        (lambda f: f, ("t", "m", ["z"]), r"a has no channel 'z'"),
        (lambda f: f.assign(x="on"), ("t", "m", []), r"channel 'x' holds 'on', not numbers"),
        (lambda f: f.assign(t="noon"), ("t", "m", []), r"column 't' holds 'noon', which is no time stamp"),
        (lambda f: f.assign(y=3.0), ("t", "m", []), r"'y' holds the same number throughout"),
        (lambda f: f.assign(x=f.x.where(f.index % 2 == 0)), ("t", "m", []), r"channel 'x' lacks 50% of its 3200 numbers"),
        (lambda f: f.assign(x=f.x.where((f.m == "a") | (f.index % 8 > 8))), ("t", "m", []), r"'x' lacks 50%"),
    ],
)
def test_bad_tables_are_refused_by_name(write, change, options, message):
    with pytest.raises(SourceError, match=message):
        read_series([write(change(table()))], 0.5, *options)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "s.xlsx").write_text("no")
    with pytest.raises(SourceError, match=r"series are read from .csv"):
        read_series([str(tmp_path / "s.xlsx")], 0.5, None, None, [])
    with pytest.raises(SourceError, match=r"no such file"):
        read_series([str(tmp_path / "absent.csv")], 0.5, None, None, [])


def test_training_rows_end_before_what_is_evaluated(write):
    found = read_series([write(table())], 0.75, "t", "m", [])
    rows = SeriesRows(found, 500, 40, 200, seed=3)
    assert len(rows) == 200 and rows.places == SeriesRows(found, 500, 40, 200, seed=3).places
    assert {which for which, _ in rows.places} == {0, 1} and max(start for _, start in rows.places) + 540 <= 1200
    which, start = rows.places[7]
    assert torch.equal(torch.cat([rows[7]["past_values"], rows[7]["future_values"]]), rows.series[which].values[start : start + 540])
    evaluated = evaluation_rows(found, 300, 40, 5)
    assert [name for name, _ in evaluated] == ["a[1200]", "b[1200]", "a[1230]", "b[1230]", "a[1260]"]
    with pytest.raises(SourceError, match=r"a row needs 1300 steps \(1260 \+ 40\), the longest training part has 1200"):
        SeriesRows(found, 1260, 40, 1, seed=0)
    with pytest.raises(SourceError, match=r"a window needs 440 steps .*evaluation part has 400: lower data.split"):
        evaluation_rows(found, 400, 40, 1)


# -- the task -------------------------------------------------------------------------------------------------------


def recipe_values(path):
    return {
        "name": "tiny",
        "task": "forecasting",
        "model": {"source": "new:patchtst", "license": "mit", "dtype": "float32"},
        "sparse_attention": {"query_tile": 16, "min_keys": 96, "density": 0.01, "sink": 16, "local": 16, "dense_below": 0},
        "data": {"train": [path], "split": 0.6},
        "series": {
            **{"time": "t", "machine": "m", "patch": 4, "horizon": 8, "period": 126},
            "model": {"d_model": 32, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "init_std": 0.3},
            "pretrain": {"max_steps": 3, "per_device_train_batch_size": 2, "save_steps": 2, "disable_tqdm": True},
        },
        "distill": {"context": 140, "batches": 2},
        "lora": {"context": 140, "steps": 2, "settings": {"rank": 2, "target_modules": ["q_proj", "k_proj", "v_proj"]}},
        "compare": {"before": True, "dense_lora": True},
        "quality": [
            {"length": 140, "windows": 2, "budgets": [96], "decode_tokens": 0, "selections": ["oracle", "two stages", "window + sink"]}
        ],
        "speed": {"length": 0},
    }


@pytest.fixture
def recipe(write, tmp_path):
    path = write(table())
    shutil.copy(RECIPES / "defaults.yaml", tmp_path)

    def make(**changes):
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**recipe_values(path), **changes}))
        return load_recipe(tmp_path / "tiny.yaml")

    return make


def quiet():
    return Console(file=io.StringIO())


def test_a_forecasting_run_ends_with_a_sparse_model_its_card_and_a_table(recipe, tmp_path):
    results = run_recipe(recipe(), tmp_path / "run", quiet())
    scores = results["evaluation"]["scores"]
    assert {(s["keys"], s["selection"]) for s in scores} == {(None, "dense"), (96, "oracle"), (96, "two stages"), (96, "window + sink")}
    assert all(len([s for s in scores if s["selection"] == name]) == 2 for name in ("dense", "two stages"))
    assert all(np.isfinite(s["mse"]) for s in scores) and len({s["mse"] for s in scores if s["row"] == scores[0]["row"]}) > 2
    [shown] = results["tables"]
    assert [row[0] for row in shown["rows"]] == ["last value", "one period before", "dense", "oracle", "two stages", "window + sink"]
    assert results["distill"]["log"][-1]["kl_coarse"] > 0 and results["lora"]["log"][0]["kl"] > 0  # the routers do see the layers
    model = hf_sparse_attn.sparse_class(PatchTSTForPrediction).from_pretrained(tmp_path / "run" / "model")
    assert type(model).__name__ == "SparsePatchTSTForPrediction"
    card, html = (tmp_path / "run" / "model" / "README.md").read_text(), (tmp_path / "run" / "report.html").read_text()
    assert "pipeline_tag: time-series-forecasting" in card and "sparse_class(PatchTSTForPrediction)" in card
    assert f"| {shown['rows'][4][0]} | 96 | 2 |" in card and shown["rows"][4][4] in html
    assert json.loads((tmp_path / "run" / "results.json").read_text())["convert"]["data"]["channels"] == ["x", "y"]


def test_a_run_continues_with_the_same_curves(recipe, tmp_path, monkeypatch):
    whole = run_recipe(recipe(), tmp_path / "whole", quiet())
    from hf_sparse_attn.pipeline.forecasting import ForecastingRun

    evaluate = ForecastingRun._evaluate

    def stopped(self, model):
        raise KeyboardInterrupt

    monkeypatch.setattr(ForecastingRun, "_evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(), tmp_path / "killed", quiet())
    monkeypatch.setattr(ForecastingRun, "_evaluate", evaluate)
    resumed = run_recipe(recipe(), tmp_path / "killed", quiet())
    assert resumed["tables"] == whole["tables"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"context": 150}}, r"one length: distill.context, lora.context and quality\[0\].length, got \[140, 150\]"),
        ({"series": {"time": "t", "machine": "m", "patch": 4, "horizon": 8}}, r"series.pretrain.max_steps must say"),
        ({"data": {"train": ["x.csv"], "eval": ["y.csv"]}}, r"set data.split"),
    ],
)
def test_impossible_recipes_are_refused_before_anything_is_trained(recipe, tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        run_recipe(recipe(**changes), tmp_path / "run", quiet())


def test_errors_are_paired_with_the_same_rows_of_the_reference():
    scores = [{"row": r, "keys": 8, "selection": "x", "mse": m, "mae": 1.0} for r, m in (("a", 1.0), ("b", 3.0))]
    reference = [{"row": r, "keys": None, "selection": "dense", "mse": m, "mae": 1.0} for r, m in (("b", 2.0), ("a", 2.0))]
    [row] = forecast_table(scores, reference)
    assert (row["n"], row["mse"], row["over_reference"]["ratio"]) == (2, 2.0, 1.0)
    assert row["over_reference"]["low"] == 0.5 and row["over_reference"]["high"] == 1.5
