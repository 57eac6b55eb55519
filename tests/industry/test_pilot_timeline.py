"""Timelines: a regular grid is built from a prepared folder and from a CSV file, what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from helpers.pilot_plants import plant

from hf_sparse_attn.industry.dataset import EVENTS, READINGS, STATES, Channel, Manifest, PlantDataset, Source, Split
from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.findings import Quality
from hf_sparse_attn.industry.pilot.csv_timeline import timeline_from_csv
from hf_sparse_attn.industry.pilot.dataset_timeline import timeline_from_dataset
from hf_sparse_attn.industry.pilot.time_texts import nanoseconds
from hf_sparse_attn.industry.pilot.timeline import merged_intervals

START = datetime(2024, 3, 1, tzinfo=UTC)


def minute(n, seconds=0):
    return START + timedelta(minutes=n, seconds=seconds)


def write_plant(folder, split=None):
    sources = [Source("a.csv", "csv-wide", "00", 10, 3)]
    channels = [Channel("pump", "rpm", 0), Channel("press", "oil", 0), Channel("press", "air", 0)]
    Manifest(assets=["pump", "press"], sources=sources, channels=channels, split=split).write(folder)
    (folder / "assets/press").mkdir(parents=True)
    readings = [
        (minute(0), 1, 1.0, 0, 0, 2),
        (minute(0, 30), 1, 3.0, 0, 0, 3),
        (minute(0, 30), 1, 3.0, Quality.DUPLICATE.value, 0, 4),
        (minute(4), 2, 7.0, 0, 0, 5),
        (minute(3), 1, None, Quality.NO_NUMBER.value, 0, 6),
    ]
    events = [
        (minute(1), "plc", "INFO", "valve 17 opens", None, None, 0, 0, 7),
        (minute(1), "plc", "INFO", "valve 18 opens", None, "-", 0, 0, 8),
        (minute(2), "plc", None, "0x1f is hot", "<*> is hot", "ALERT", 0, 0, 9),
    ]
    states = [(minute(2), minute(4), "load")]
    for name, rows, schema in (
        ("readings", readings, READINGS),
        ("events", events, EVENTS),
        ("states", states, STATES),
    ):
        pl.DataFrame(rows, schema=schema, orient="row").write_parquet(folder / f"assets/press/{name}.parquet")
    return PlantDataset(folder)


def test_a_prepared_folder_becomes_a_grid_of_means_counts_states_and_faults(tmp_path):
    line = timeline_from_dataset(write_plant(tmp_path), "press")
    assert line.channels == ("oil", "air") and len(line) == 5
    np.testing.assert_array_equal(line.values[:, 0], [2.0, np.nan, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(line.values[:, 1], [np.nan] * 4 + [7.0])
    assert dict(zip(line.templates, line.counts.T.tolist(), strict=True)) == {
        "INFO valve <*> opens": [0, 2, 0, 0, 0],
        "<*> is hot": [0, 0, 1, 0, 0],
    }
    assert [line.state_names[s] for s in line.states] == ["(none)", "(none)", "load", "load", "(none)"]
    assert line.labels.tolist() == [False, False, True, False, False]
    assert line.times[0] == START.timestamp() * 1e9


def test_faults_that_are_given_replace_labels_and_the_split_of_the_folder_holds(tmp_path):
    data = write_plant(tmp_path, Split("2024-03-01T00:02:00Z", "2024-03-01T00:03:00Z", 60.0))
    line = timeline_from_dataset(data, "press", faults=[("2024-03-01T00:03:00", "2024-03-01T00:04:30")])
    assert line.labels.tolist() == [False, False, False, True, True]
    assert (line.train_steps, line.test_from) == (2, 3)
    assert len(line.train()) == 2 and not line.train().faults.size


def test_an_asset_without_rows_and_a_split_without_evaluation_are_refused(tmp_path):
    data = write_plant(tmp_path, Split("2025-03-01T00:02:00Z", "2025-03-01T00:03:00Z", 60.0))
    with pytest.raises(PlantDataError, match="neither readings nor events"):
        timeline_from_dataset(data, "pump")
    with pytest.raises(PlantDataError, match=r"its split .* leaves steps"):
        timeline_from_dataset(data, "press")


def write_csv(path, rows, header="timestamp,value"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_a_csv_file_becomes_a_grid_with_gaps_and_the_mean_of_rows_that_share_a_step(tmp_path):
    rows = ["2024-03-01 00:00:00,1", "2024-03-01 00:05:00,2", "2024-03-01 00:05:00,4", "2024-03-01 00:10:00,"]
    rows += ["2024-03-01 00:20:00,5"]
    line = timeline_from_csv(write_csv(tmp_path / "a.csv", rows), [("2024-03-01 00:05:00", "2024-03-01 00:10:00")])
    np.testing.assert_array_equal(line.values[:, 0], [1, 3, np.nan, np.nan, 5])
    assert line.labels.tolist() == [False, True, True, False, False]
    assert line.notes == ("1 rows share a step with another; their mean stands",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("2024-03-01 00:05:00,12 °C", r"a\.csv, line 3, column 'value': '12 °C' is no number"),
        ("2024-03-01 00:05:00,inf", r"line 3, column 'value': 'inf'"),
        ("2024-13-01 00:05:00,1", r"line 3, column 'timestamp': '2024-13-01 00:05:00' is no time"),
        (",1", r"line 3, column 'timestamp'"),
    ],
)
def test_a_bad_field_is_refused_with_its_line_and_column(tmp_path, row, message):
    path = write_csv(tmp_path / "a.csv", ["2024-03-01 00:00:00,1", row, "2024-03-01 00:10:00,1"])
    with pytest.raises(PlantDataError, match=message):
        timeline_from_csv(path, [])


def test_missing_columns_files_and_windows_are_refused(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["2024-03-01,1", "2024-03-02,1"])
    with pytest.raises(PlantDataError, match="has the columns timestamp, value"):
        timeline_from_csv(path, [], time_column="time")
    with pytest.raises(PlantDataError, match="is no CSV file"):
        timeline_from_csv(tmp_path / "b.csv", [])
    (tmp_path / "w.json").write_text('{"c.csv": []}')
    with pytest.raises(PlantDataError, match=r"w\.json: has no windows of a\.csv.*name one of c\.csv"):
        timeline_from_csv(path, tmp_path / "w.json")
    with pytest.raises(PlantDataError, match="ends before it starts"):
        timeline_from_csv(path, [("2024-03-02", "2024-03-01")])
    with pytest.raises(PlantDataError, match="fewer than two different times"):
        timeline_from_csv(write_csv(tmp_path / "d.csv", ["2024-03-01,1"]), [])


@pytest.mark.parametrize(
    "text",
    [
        "2024-03-01T09:00:00+09:00",
        "2024-03-01 00:00:00Z",
        "2024-02-29T19:00:00.000-0500",
        "2024-03-01",
        " 2024-03-01T00:00 ",
    ],
)
def test_times_with_and_without_a_zone_are_utc_nanoseconds(text):
    assert nanoseconds(text) == START.timestamp() * 1e9


def test_parts_that_do_not_fit_together_are_refused():
    line = plant(0, days=10, pairs=2, lag=50)
    times = line.times.copy()
    times[5] += 1
    infinite = line.values.copy()
    infinite[7, 1] = np.inf
    for change, message in (
        ({"times": times}, "no regular grid"),
        ({"counts": line.counts[1:]}, "counts have shape"),
        ({"faults": line.faults[:, ::-1]}, "overlap, are empty"),
        ({"states": line.states + 5}, "2 are named"),
        ({"train_steps": 0}, "training ends at step 0"),
        ({"values": infinite}, "'sensor 1' is infinite in step 7"),
    ):
        with pytest.raises(PlantDataError, match=message):
            replace(line, **change)


def test_intervals_that_overlap_or_touch_are_merged():
    assert merged_intervals(np.array([[5, 9], [1, 3], [3, 4], [6, 7]])).tolist() == [[1, 4], [5, 9]]
    assert merged_intervals(np.zeros((0, 2))).shape == (0, 2)
