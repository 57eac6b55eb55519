"""The folder of prepared data: what is written is read again, what is none is refused with a way on."""

from __future__ import annotations

import json

import polars as pl
import pytest

from hf_sparse_attn.industry.dataset import EVENTS, READINGS, Channel, Manifest, PlantDataset, Source, Split
from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.findings import Finding, Quality


def write(folder, readings=()):
    manifest = Manifest(
        assets=["press"],
        sources=[Source("a.csv", "csv-wide", "00", 10, 3)],
        channels=[Channel("press", "oil", 0, column=1, unit="°C", center=1.5, scale=0.5)],
        settings={"zone": "Asia/Tokyo"},
        split=Split("2024-03-01T00:00:00Z", "2024-03-02T00:00:00Z", 86400.0),
    )
    (folder / "assets/press").mkdir(parents=True)
    manifest.write(folder)
    if readings:
        pl.DataFrame(readings, schema=READINGS, orient="row").write_parquet(folder / "assets/press/readings.parquet")
    return manifest


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    written = write(tmp_path)
    assert Manifest.read(tmp_path) == written


def test_rows_are_kept_as_they_stood_and_sorted_by_time_on_request(tmp_path):
    rows = [(30, 0, 1.0, 0, 0, 2), (10, 0, 2.0, Quality.BACKWARD.value, 0, 3), (30, 0, 3.0, 0, 0, 4)]
    write(tmp_path, rows)
    data = PlantDataset(tmp_path)
    assert data.readings("press", in_order=False).collect()["line"].to_list() == [2, 3, 4]
    assert data.readings("press").collect()["line"].to_list() == [3, 2, 4]


def test_an_asset_without_logs_has_an_empty_frame_of_their_schema(tmp_path):
    write(tmp_path)
    assert PlantDataset(tmp_path).events("press").collect_schema() == EVENTS


def test_what_is_no_prepared_folder_is_refused_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(PlantDataError, match=r"no dataset\.json.*hf-sparse-attn prep"):
        PlantDataset(tmp_path)
    write(tmp_path / "one")
    with pytest.raises(PlantDataError, match=r"no asset 'pump'.*press"):
        PlantDataset(tmp_path / "one").readings("pump")
    path = tmp_path / "one/dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 9}))
    with pytest.raises(PlantDataError, match="format 9"):
        PlantDataset(tmp_path / "one")


def test_a_finding_survives_json_and_its_kind_is_checked():
    finding = Finding("gap", "warning", asset="press", lines=(3, 9), values={"seconds": 10800.0})
    assert Finding.from_dict(json.loads(json.dumps(finding.to_dict()))) == finding
    with pytest.raises(ValueError, match="kind 'gaps'"):
        Finding("gaps", "warning")


def test_an_error_names_the_place_what_was_found_and_ways_on():
    error = PlantDataError(
        "'13/25/2024' is no date", ["set --time-format", "drop the line"], file="a.csv", line=7, column="t"
    )
    assert str(error) == (
        "a.csv, line 7, column 't': '13/25/2024' is no date. What you can do: (1) set --time-format; (2) drop the line"
    )
