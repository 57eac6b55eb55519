"""Series of sensors: reading, normalising, splitting by time, what is refused; forecasting as a task of a recipe."""

from __future__ import annotations

import io
import json
import shutil
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers.paths import RECIPES
from transformers import PatchTSTForPrediction

import hf_sparse_attn
from hf_sparse_attn.data.sources import SourceError
from hf_sparse_attn.experiments.recipe import RecipeError, load_recipe
from hf_sparse_attn.experiments.rows.time_series import SeriesRows, evaluation_rows, read_series
from hf_sparse_attn.experiments.run import run_recipe
from hf_sparse_attn.experiments.scores.task_scores import forecast_table
from hf_sparse_attn.system.terminal import Terminal

# peft asks transformers for a property that the newest versions call by another name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def table(steps=1600, machines=("a", "b"), seed=0):
    generator = np.random.default_rng(seed)
    frames = []
    for name in machines:
        time = pd.date_range("2024-01-01", periods=steps, freq="10min", tz="UTC").astype(str)
        wave = np.sin(np.arange(steps) / 20)
        frames.append(
            pd.DataFrame({"t": time, "m": name, "x": 5 + 2 * wave + generator.normal(size=steps), "y": wave * 100})
        )
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
    result = read_series([write(frame, name)], 0.75, "t", "m", [])
    assert result.channels == ["x", "y"] and [s.machine for s in result.series] == ["a", "b"]
    raw = np.stack([frame[frame.m == m][["x", "y"]].to_numpy() for m in "ab"])
    trained = raw[:, :1200].reshape(-1, 2)
    assert result.mean == pytest.approx(trained.mean(0).tolist()) and result.deviation == pytest.approx(
        trained.std(0).tolist()
    )
    assert [s.trained for s in result.series] == [1200, 1200]
    np.testing.assert_allclose(result.series[1].values.numpy(), (raw[1] - trained.mean(0)) / trained.std(0), atol=1e-5)


def test_rows_are_sorted_by_time_repeated_stamps_dropped_and_gaps_filled(write):
    frame = table(machines=("a",))
    want = read_series([write(frame, "sorted.csv")], 0.5, "t", "m", ["x"]).series[0].values
    frame.loc[700:703, "x"] = np.nan
    filled = frame["x"].ffill()
    mixed = pd.concat([frame.sample(frac=1, random_state=1), frame.iloc[5:8]])
    result = read_series([write(mixed, "mixed.csv")], 0.5, "t", "m", ["x"])
    assert len(result.series[0].values) == 1600 and result.filled == [pytest.approx(4 / 1600)]
    again = result.series[0].values[:, 0] * result.deviation[0] + result.mean[0]
    np.testing.assert_allclose(again, filled, rtol=1e-5)
    assert not torch.equal(result.series[0].values[700:704], want[700:704])


def test_a_member_of_a_zip_is_read(write, tmp_path):
    buffer = io.StringIO()
    table().to_csv(buffer, index=False)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("inner/one.csv", buffer.getvalue())
        archive.writestr("readme.txt", "no series")
    result = read_series([f"{tmp_path}/all.zip::inner/one.csv"], 0.5, "t", "m", ["y"])
    assert [s.machine for s in result.series] == ["a", "b"]


def test_the_files_of_one_machine_are_one_series(write):
    frame = table()
    want = read_series([write(frame, "whole.csv")], 0.75, "t", "m", [])
    halves = [write(frame[frame.index % 2 == part], f"{part}.csv") for part in (1, 0)]
    result = read_series(halves, 0.75, "t", "m", [])
    assert sorted(s.machine for s in result.series) == ["a", "b"] and [s.trained for s in result.series] == [1200, 1200]
    for mine in want.series:
        other = next(s for s in result.series if s.machine == mine.machine)
        torch.testing.assert_close(other.values, mine.values, atol=1e-5, rtol=1e-5)


def test_files_without_a_column_of_machines_are_machines(write, tmp_path):
    (tmp_path / "x").mkdir()
    one = table(machines=("a",)).drop(columns="m")
    paths = [write(one, "s.csv"), write(one, "x/s.csv")]
    result = read_series(paths, 0.5, "t", None, [])
    assert [(s.machine, len(s.values)) for s in result.series] == [("s", 1600), ("s", 1600)]


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
        (
            lambda f: f.assign(x=f.x.where(f.index % 2 == 0)),
            ("t", "m", []),
            r"channel 'x' lacks 50% of its 3200 numbers",
        ),
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


# -- time stamps ----------------------------------------------------------------------------------------------------

HOURS = pd.date_range("2024-01-01", periods=80, freq="27h", tz="UTC")  # days beyond 12 tell a date's order
TENTHS = pd.date_range("2024-01-01", periods=80, freq="100ms", tz="UTC")


@pytest.fixture
def values_of(tmp_path):
    """The channel of a file whose rows 0, 1, 2, … are in the order of their stamps, and what was read."""

    def make(stamps, time_format=None, separator=",", encoding="utf-8", end="\n"):
        lines = [separator.join(("t", "a")), *(separator.join((str(t), str(i))) for i, t in enumerate(stamps))]
        (tmp_path / "s.csv").write_bytes(end.join([*lines, ""]).encode(encoding))
        result = read_series([str(tmp_path / "s.csv")], 0.5, "t", None, [], time_format)
        values = result.series[0].values[:, 0].double() * result.deviation[0] + result.mean[0]
        return values.round().int().tolist(), result

    return make


def written(form, stamps=HOURS):
    return [stamp.strftime(form) for stamp in stamps]


STAMPS = {
    "epoch s at 10 Hz": [1.7e9 + i / 10 for i in range(80)],
    **{
        f"epoch {unit}": [int(1.7e9 * factor) + i * factor // 10 for i in range(80)]
        for unit, factor in (("ms", 1000), ("ns", 10**9))
    },
    "Excel days": [45000 + i / 24 for i in range(80)],
    "a counter": range(80),
    "isoformat with and without fractions": [stamp.tz_localize(None).isoformat() for stamp in TENTHS],
    "isoformat with Z": [stamp.tz_localize(None).isoformat() + "Z" for stamp in TENTHS],
    "an autumn night with offsets": [
        stamp.isoformat()
        for stamp in pd.date_range("2024-10-26T22:00Z", periods=80, freq="10min").tz_convert("Europe/Berlin")
    ],
    "nanoseconds": [f"2024-01-01T00:00:00.{i:09}" for i in range(80)],
    "compact": written("%Y%m%dT%H%M%SZ"),
    "digits": written("%Y%m%d%H%M%S"),
    **{
        form: [f'"{t}"' for t in written(form)]
        for form in ("%G-W%V-%uT%H:%M", "%d.%m.%Y %H:%M", "%m/%d/%Y %I:%M:%S %p", "%d/%m/%Y %H:%M:%S.%f")
    },
    **{
        form: [f'"{t}"' for t in written(form)]
        for form in ("%d %b %Y %H:%M", "%b %d, %Y %H:%M", "%a %b %d %H:%M:%S %Y", "%d/%b/%Y:%H:%M:%S +0000")
    },
    "Python's logging": [f'"{t}"' for t in written("%Y-%m-%d %H:%M:%S,000")],
}


@pytest.mark.parametrize("kind", STAMPS)
def test_no_row_is_lost_or_moved_by_its_time_stamp(kind, values_of):
    values, result = values_of(STAMPS[kind])
    assert values == list(range(80)) and (result.reordered, result.repeated) == (0, 0)


AMBIGUOUS = [f"{day:02}.{month:02}.2024" for month in (1, 2) for day in range(1, 13)]


@pytest.mark.parametrize(
    ("stamps", "message"),
    [
        (
            AMBIGUOUS,
            r"s\.csv, row 1: column 't' holds '02\.01\.2024', which may have the day or the month first.*set "
            r"series\.time_format",
        ),
        (
            ["13.01.2024", "01.13.2024"],
            r"row 1: .*'01\.13\.2024', which has the month first, and '13\.01\.2024' the day",
        ),
        (["2024-01-02", "03.01.2024"], r"row 1: .* is written in another way than '2024-01-02'"),
        (["2024-01-02T00:00", "2024-01-03T00:00Z"], r"row 0: .* has no offset from UTC, while others have one"),
        (["01012024", "02012024"], r"row 0: .* may be a date or a time, or a number: set series\.time_format"),
        (["01.2024", "02.2024"], r"row 0: .* may be a date or a time, or a number"),
        (["10012024", "11012024"], r"row 0: .* may be a date with the year last"),
        (["01.02.24", "13.02.24"], r"row 0: .*'01\.02\.24', which is no time stamp"),
        (["23:59:00", "00:01:00"], r"row 0: .* is no time stamp"),
        (["30.02.2024", "01.03.2024"], r"row 0: .*'30\.02\.2024', which is no time stamp"),
        (["2024-01-01T10:00:00 CET", "2024-01-01T11:00:00 CET"], r"row 0: .* is no time stamp"),
        (["now", "today"], r"row 0: .*'now', which is no time stamp"),
        (["2024-01-01", ""], r"row 1: column 't' holds '', which is empty: fill it"),
        ([1.7e9, 1.7e9 + 1, "inf"], r"row 2: column 't' holds 'inf', which is no time stamp"),
        ([1.7e9, 1.7e9 + 1, "x"], r"row 2: column 't' holds 'x', which is no number, as most others are"),
        (
            [1700000000, 1700000001000],
            r"row 1: .*'1700000001000', which is in another unit than 1700000000: write all in one",
        ),
        (
            ["2024-01-01"] * 8 + ["2024-01-02"] * 8,
            r"s\.csv: 14 of 16 rows have the time stamp of another row in column 't', but other numbers",
        ),
    ],
)
def test_time_stamps_that_do_not_tell_their_order_are_refused(stamps, message, values_of):
    with pytest.raises(SourceError, match=message):
        values_of(stamps)


def test_a_format_tells_what_the_stamps_do_not(values_of):
    for stamps, form in (
        (AMBIGUOUS, "%d.%m.%Y"),
        (written("%d%m%Y %H"), "%d%m%Y %H"),
        (written("%d.%m.%y %H"), "%d.%m.%y %H"),
    ):
        assert values_of(stamps, form)[0] == list(range(len(stamps)))
    with pytest.raises(
        SourceError, match=r"row 0: .*'01\.01\.2024', which is not written as series\.time_format '%Y' says"
    ):
        values_of(AMBIGUOUS, "%Y")
    with pytest.raises(SourceError, match=r"series\.time_format '%Q' is no format of time stamps"):
        values_of(AMBIGUOUS, "%Q")


def test_the_order_of_a_date_is_told_from_all_files(write):
    """Days 1 to 12 alone do not tell it; another file of the run does."""
    days = pd.date_range("2024-01-01", periods=24)
    frame = pd.DataFrame({"t": days.strftime("%d.%m.%Y"), "m": "x", "a": range(24)})
    result = read_series([write(frame[12:], "late.csv"), write(frame[:12], "early.csv")], 0.5, "t", "m", [])
    assert (result.series[0].values[:, 0].diff() > 0).all() and (result.reordered, result.repeated) == (24, 0)


def test_an_hour_that_local_time_repeats_is_counted_and_told(values_of, caplog):
    stamps = (
        pd.date_range("2024-10-20", periods=2000, freq="10min", tz="UTC").tz_convert("Europe/Berlin").tz_localize(None)
    )
    values, result = values_of([stamp.isoformat() for stamp in stamps])
    assert len(values) == 1994 and result.report()["repeated"] == 6 and result.report()["reordered"] > 0
    assert "6 that had the time stamp of another row dropped" in caplog.text


def test_stamps_of_parquet_may_have_a_zone_be_texts_of_a_dictionary_or_the_index(write):
    frame = table(machines=("a",))
    want = read_series([write(frame, "s.csv")], 0.5, "t", "m", ["x"]).series[0].values
    times = pd.to_datetime(frame.t).dt.tz_convert("Asia/Kolkata")
    for kind in (
        frame.assign(t=times),
        frame.assign(t=frame.t.astype("category"), m=frame.m.astype("category")),
        frame.assign(t=times).set_index("t"),
    ):
        torch.testing.assert_close(read_series([write(kind, "s.parquet")], 0.5, "t", "m", ["x"]).series[0].values, want)


def test_names_of_machines_are_texts(write):
    frame = pd.concat([pd.DataFrame({"t": range(20), "m": name, "a": np.arange(20.0)}) for name in ("007", "7", "NA")])
    assert sorted(s.machine for s in read_series([write(frame)], 0.5, "t", "m", []).series) == ["007", "7", "NA"]


@pytest.mark.parametrize(
    "options", [{"encoding": "utf-8-sig", "end": "\r\n"}, {"separator": ";"}, {"separator": "\t"}, {"end": "\r"}]
)
def test_tables_of_other_programs_are_read(options, values_of):
    assert values_of(written("%Y-%m-%d %H:%M"), **options)[0] == list(range(80))


def test_a_comma_before_the_fraction_is_read_where_a_semicolon_separates(tmp_path):
    (tmp_path / "s.csv").write_text("t;a\n" + "".join(f"45000,{i};{i},5\n" for i in range(10, 50)))
    result = read_series([str(tmp_path / "s.csv")], 0.5, "t", None, [])
    assert result.mean == [pytest.approx(20.0)] and len(result.series[0].values) == 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("t,a\n1,2,3\n2,3,4\n", "more fields than the 2 of its header"),
        ("t,a,a\n1,2,3\n", "has 2 columns 'a': name them apart"),
        ("1,2\n2,3\n", "has no line of column names, it starts with 1, 2"),
        ("t,a\n", "holds no rows"),
        ("t,a\n1,2\n2,ERR\n3,4\n", "row 1: channel 'a' holds 'ERR', not numbers"),
        ("t,a\n1,\0\n", r"holds zero bytes \(NUL\), the first at byte 6, line 2"),
        ("t,a\n1,2\n".encode("utf-16"), "looks like UTF-16: convert it to UTF-8"),
    ],
)
def test_damaged_tables_are_refused_by_name(content, message, tmp_path):
    (tmp_path / "s.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SourceError, match=rf"s\.csv.* {message}"):
        read_series([str(tmp_path / "s.csv")], 0.5, None if content[:1] == "1" else "t", None, [])


def test_training_rows_end_before_what_is_evaluated(write):
    result = read_series([write(table())], 0.75, "t", "m", [])
    rows = SeriesRows(result, 500, 40, 200, seed=3)
    assert len(rows) == 200 and rows.places == SeriesRows(result, 500, 40, 200, seed=3).places
    assert {which for which, _ in rows.places} == {0, 1} and max(start for _, start in rows.places) + 540 <= 1200
    which, start = rows.places[7]
    assert torch.equal(
        torch.cat([rows[7]["past_values"], rows[7]["future_values"]]), rows.series[which].values[start : start + 540]
    )
    evaluated = evaluation_rows(result, 300, 40, 5)
    assert [name for name, _ in evaluated] == ["a[1200]", "b[1200]", "a[1230]", "b[1230]", "a[1260]"]
    with pytest.raises(SourceError, match=r"a row needs 1300 steps \(1260 \+ 40\), the longest training part has 1200"):
        SeriesRows(result, 1260, 40, 1, seed=0)
    with pytest.raises(SourceError, match=r"a window needs 440 steps .*evaluation part has 400: lower data.split"):
        evaluation_rows(result, 400, 40, 1)


# -- the task -------------------------------------------------------------------------------------------------------


def recipe_values(path):
    return {
        "name": "tiny",
        "task": "forecasting",
        "model": {"source": "new:patchtst", "license": "mit", "dtype": "float32"},
        "sparse_attention": {
            "query_tile": 16,
            "min_keys": 96,
            "density": 0.01,
            "sink": 16,
            "local": 16,
            "dense_below": 0,
        },
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
            {"length": 140, "windows": 2, "budgets": [96], "selections": ["oracle", "two stages", "window + sink"]}
        ],
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
    return Terminal(io.StringIO())


def test_a_forecasting_run_ends_with_a_sparse_model_its_card_and_a_table(recipe, tmp_path):
    results = run_recipe(recipe(), tmp_path / "run", quiet())
    scores = results["evaluation"]["scores"]
    assert {(s["keys"], s["selection"]) for s in scores} == {
        (None, "dense"),
        (96, "oracle"),
        (96, "two stages"),
        (96, "window + sink"),
    }
    assert all(len([s for s in scores if s["selection"] == name]) == 2 for name in ("dense", "two stages"))
    assert (
        all(np.isfinite(s["mse"]) for s in scores)
        and len({s["mse"] for s in scores if s["row"] == scores[0]["row"]}) > 2
    )
    [shown] = results["tables"]
    assert [row[0] for row in shown["rows"]] == [
        "last value",
        "one period before",
        "dense",
        "oracle",
        "two stages",
        "window + sink",
    ]
    # the routers do see the layers
    assert results["distill"]["log"][-1]["kl_coarse"] > 0 and results["lora"]["log"][0]["kl"] > 0
    model = hf_sparse_attn.sparse_class(PatchTSTForPrediction).from_pretrained(tmp_path / "run" / "model")
    assert type(model).__name__ == "SparsePatchTSTForPrediction"
    card, html = (tmp_path / "run" / "model" / "README.md").read_text(), (tmp_path / "run" / "report.html").read_text()
    assert "pipeline_tag: time-series-forecasting" in card and "sparse_class(PatchTSTForPrediction)" in card
    assert f"| {shown['rows'][4][0]} | 96 | 2 |" in card and shown["rows"][4][4] in html
    assert json.loads((tmp_path / "run" / "results.json").read_text())["convert"]["data"]["channels"] == ["x", "y"]


def test_a_run_continues_with_the_same_curves(recipe, tmp_path, monkeypatch):
    whole = run_recipe(recipe(), tmp_path / "whole", quiet())
    from hf_sparse_attn.experiments.tasks.forecasting import ForecastingRun

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
        (
            {"lora": {"context": 150}},
            r"one length: distill.context, lora.context and quality\[0\].length, got \[140, 150\]",
        ),
        ({"series": {"time": "t", "machine": "m", "patch": 4, "horizon": 8}}, r"series.pretrain.max_steps must say"),
        (
            {"data": {"train": ["x.csv"], "eval": ["y.csv"]}},
            r"data\.eval is stated, but task 'forecasting' does not read it",
        ),
    ],
)
def test_impossible_recipes_are_refused_before_anything_is_trained(recipe, tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        run_recipe(recipe(**changes), tmp_path / "run", quiet())


def test_errors_are_paired_with_the_same_rows_of_the_reference():
    scores = [{"row": r, "keys": 8, "selection": "x", "mse": m, "mae": 1.0} for r, m in (("a", 1.0), ("b", 3.0))]
    reference = [
        {"row": r, "keys": None, "selection": "dense", "mse": m, "mae": 1.0} for r, m in (("b", 2.0), ("a", 2.0))
    ]
    [row] = forecast_table(scores, reference)
    assert (row["n"], row["mse"], row["over_reference"]["ratio"]) == (2, 2.0, 1.0)
    assert row["over_reference"]["low"] == 0.5 and row["over_reference"]["high"] == 1.5
