"""The verb pilot: a verdict, a page and JSON of a prepared folder or a CSV file, and errors in words."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from helpers.plant_files import write
from typer.testing import CliRunner

from hf_sparse_attn.cli.commands import app
from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.pilot import pilot_table
from hf_sparse_attn.industry.pilot.baseline_detectors.detector_registry import all_detectors
from hf_sparse_attn.industry.pilot.fault_files import of_kind, read_faults
from hf_sparse_attn.industry.pilot.time_texts import span_seconds
from hf_sparse_attn.industry.preparation.ingest import ingest
from hf_sparse_attn.industry.preparation.ingest_settings import IngestSettings

START, HOUR = np.datetime64("2024-03-01T00:00:00"), np.timedelta64(1, "h")
HOURS, FAULTS = 24 * 40, range(30, 24 * 40 - 30, 60)


def iso(hours):
    return f"{START + hours * HOUR}Z"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two machines; oil of the press rises in every fault."""
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("out")
    rng = np.random.default_rng(0)
    for name in ("press", "mill"):
        oil = rng.standard_normal(HOURS) + 6 * np.isin(np.arange(HOURS), [h + k for h in FAULTS for k in range(4)])
        write(raw / f"{name}.csv", ["time,oil", *(f"{iso(h)},{value:.4f}" for h, value in enumerate(oil))])
    # the folder as prep writes it, without its report
    manifest, _ = ingest([str(raw / "*.csv")], out, IngestSettings())
    manifest.write(out)
    return out


@pytest.fixture
def faults(tmp_path):
    rows = [f"{name},{iso(h)},{iso(h + 4)},seal" for name in ("press", "mill") for h in FAULTS]
    return write(tmp_path / "faults.csv", ["asset,start,end,kind", *rows])


@pytest.fixture(autouse=True)
def few_detectors(monkeypatch):
    # the others are tested elsewhere
    cheap = [d for d in all_detectors() if d.name in ("random", "max |z|", "new template")]
    monkeypatch.setattr(pilot_table, "all_detectors", lambda **_: cheap)


def pilot(*arguments):
    return CliRunner().invoke(app, ["pilot", *map(str, arguments)])


def test_a_prepared_folder_gets_a_verdict_a_page_and_json(folder, faults, tmp_path):
    page, result = tmp_path / "pilot.html", tmp_path / "pilot.json"
    done = pilot(folder, "--faults", faults, "--step", "1h", "--near", "6h", "--out", page, "--json", result)
    assert done.exit_code == 0, done.output
    read = json.loads(result.read_text())
    assert read["verdict"]["sentence"]["en"] in done.output and read["verdict"]["sentence"]["en"] in page.read_text()
    assert sorted(read["assets"]) == ["mill", "press"] and read["far"]["effects"] == 2 * len(FAULTS)
    best = {row["name"]: row["measures"] for row in read["rows"]}["max |z|"]
    assert best["average_precision"]["low"] > 3 * read["base_rate"]
    assert "new template: not available" in done.output and f"{read['base_rate']:.4f}" in done.output


def test_the_verdict_is_in_japanese_where_that_is_asked_for(folder, faults, tmp_path):
    page = tmp_path / "pilot.html"
    options = ("--asset", "press", "--step", "1h", "--language", "ja", "--out", page)
    done = pilot(folder, "--faults", faults, *options)
    assert done.exit_code == 0, done.output
    assert '<html lang="ja">' in page.read_text() and "基準率" in done.output


def test_a_csv_file_with_windows_is_judged(tmp_path):
    values = np.random.default_rng(0).standard_normal(HOURS)
    rows = [f"{iso(h)},{value:.4f}" for h, value in enumerate(values)]
    source = write(tmp_path / "oil.csv", ["timestamp,value", *rows])
    windows = tmp_path / "windows.json"
    windows.write_text(json.dumps({"oil.csv": [[iso(h), iso(h + 4)] for h in FAULTS]}))
    done = pilot("--csv", source, "--windows", windows)
    assert done.exit_code == 0, done.output


def test_times_of_faults_are_read_from_csv_json_and_the_truth_of_a_plant_alike(faults, tmp_path):
    with open(faults) as file:
        rows = list(csv.DictReader(file))
    as_list, as_truth = tmp_path / "list.json", tmp_path / "truth.json"
    as_list.write_text(json.dumps(rows))
    as_truth.write_text(json.dumps({"format": 1, "failures": [{**row, "id": "x"} for row in rows]}))
    read = [read_faults(path, ["mill", "press"]) for path in (faults, as_list, as_truth)]
    assert read[0] == read[1] == read[2] and len(read[0]) == 2 * len(FAULTS)


def test_faults_of_one_kind_are_taken_and_all_together_are_named(folder, tmp_path):
    kinds = ["seal", "trip"]
    rows = [f"press,{iso(h)},{iso(h + 4)},{kinds[n % 2]}" for n, h in enumerate(FAULTS)]
    path = write(tmp_path / "faults.csv", ["asset,start,end,kind", *rows])
    result = tmp_path / "r.json"
    options = (folder, "--faults", path, "--asset", "press", "--step", "1h", "--json", result)
    done = pilot(*options, "--kind", "seal")
    assert done.exit_code == 0 and json.loads(result.read_text())["far"]["effects"] == -(-len(FAULTS) // 2)
    done = pilot(*options)
    assert done.exit_code == 0 and "judged together: seal, trip" in done.output
    with pytest.raises(PlantDataError, match=r"no fault is of kind 'leak'.*name one of seal, trip"):
        of_kind(read_faults(path, ["press"]), "leak")


def test_faults_without_length_and_those_outside_of_the_record_are_taken_or_counted(folder, tmp_path):
    rows = [f"press,{iso(h)},{iso(h)}" for h in FAULTS]
    path = write(tmp_path / "faults.csv", ["asset,start,end", *rows, "press,2019-01-01,2019-01-02"])
    result = tmp_path / "r.json"
    done = pilot(folder, "--faults", path, "--asset", "press", "--step", "1h", "--json", result)
    assert done.exit_code == 0, done.output
    assert json.loads(result.read_text())["far"]["effects"] == len(FAULTS)
    assert f"1 of {len(FAULTS) + 1} faults lie outside of the record" in done.output
    gone = write(tmp_path / "gone.csv", ["asset,start,end", "press,2019-01-01,2019-01-02"])
    done = pilot(folder, "--faults", gone, "--asset", "press", "--step", "1h")
    assert isinstance(done.exception, PlantDataError) and "outside of its record, 2024-03-01" in str(done.exception)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["asset,start,end", "press,2024-03-02,2024-03-01"], "line 2: a fault ends before it starts"),
        (["asset,start,end", "press,2024-03-01,2024-03-02", "oven,2024-03-01,2024-03-02"], "line 3.*asset 'oven'"),
        (["asset,start,end", "press,yesterday,2024-03-02"], "line 2, column 'start': 'yesterday' is no time"),
        (["asset,start,end", "press,2024-03-01,"], "line 2, column 'end': a time is missing"),
        (["asset,begin,end", "press,2024-03-01,2024-03-02"], "column 'start': has the columns asset, begin, end"),
        (["start,end", "2024-03-01,2024-03-02"], "column 'asset': asset None is not in the data"),
        (["asset,start,end"], "holds no fault"),
    ],
)
def test_what_cannot_be_read_as_a_fault_is_named_with_its_place(lines, message, tmp_path):
    path = write(tmp_path / "faults.csv", lines)
    with pytest.raises(PlantDataError, match=f"faults.csv.*{message}"):
        read_faults(path, ["press", "mill"])


@pytest.mark.parametrize("text", ['{"faults": []}', "[1]", "[", '"x"'])
def test_json_that_holds_no_faults_is_refused(text, tmp_path):
    (tmp_path / "faults.json").write_text(text)
    with pytest.raises(PlantDataError, match=r"faults\.json"):
        read_faults(tmp_path / "faults.json", ["press"])


def test_of_a_single_machine_the_column_asset_may_be_missing(tmp_path):
    path = write(tmp_path / "faults.csv", ["start,end", "2024-03-01,2024-03-02"])
    assert read_faults(path, ["press"])[0].asset == "press"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "pilot needs data and the times of faults"),
        (("--csv", "a.csv"), "--csv needs --windows"),
        (("folder", "--csv", "a.csv", "--windows", "w.json"), "FOLDER is about a prepared folder"),
        (("folder", "--faults", "f.csv", "--windows", "w.json"), "--windows is about --csv"),
        (("folder", "--faults", "f.csv", "--near", "6 hours"), "--near is '6 hours'"),
        (("folder", "--faults", "f.csv", "--multiples", "4;16"), "--multiples is '4;16'"),
        (("folder", "--faults", "f.csv", "--alarms-a-day", "0"), "alarms_a_day is 0"),
        (("folder", "--faults", "f.csv", "--alarms-a-day", "inf"), "alarms_a_day is inf"),
        (("folder", "--faults", "f.csv", "--language", "de"), "--language is 'de': give one of en, ja"),
        (("folder", "--faults", "f.csv"), "holds no prepared data"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_words(options, message):
    done = pilot(*options)
    assert isinstance(done.exception, ValueError) and message in str(done.exception)


def test_data_without_labels_is_not_judged_by_labels(folder):
    done = pilot(folder, "--faults", "labels", "--step", "1h")
    assert isinstance(done.exception, ValueError) and "no event of" in str(done.exception)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5min", 300), ("1.5 h", 5400), ("2d", 172800)])
def test_durations_are_numbers_with_a_unit(text, seconds):
    assert span_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "6", "h", "-1h", "0h", "1e3s", "5m", "1h30min"])
def test_other_texts_are_no_durations(text):
    with pytest.raises(PlantDataError, match="write a number above 0 and a unit"):
        span_seconds(text)
