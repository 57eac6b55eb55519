"""A prepared folder is analysed as a whole: flags, states, scales and split are written, rows stay as they stood."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from helpers.tidy_folders import DAY, START, clean_plant, shifted, stuck, without

from hf_sparse_attn.industry.dataset import READINGS, STATES, PlantDataset
from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.findings import Quality
from hf_sparse_attn.industry.preparation import asset_readings
from hf_sparse_attn.industry.preparation.analysis import AnalysisSettings, analyse
from hf_sparse_attn.industry.preparation.chronological_split import chronological_split
from hf_sparse_attn.industry.preparation.robust_scaling import robust_scale

PLACE = "assets/press/readings.parquet"


def faulty_plant():
    plant = clean_plant(2, days=10)
    plant.sensors[3] = without(stuck(plant.sensors[3], 5.5 * DAY, DAY / 4), 2 * DAY, 3 * 3600)
    return plant


def test_flags_are_written_to_the_rows_they_concern_and_nothing_else_changes(tmp_path):
    manifest = faulty_plant().write(tmp_path)
    before = pl.read_parquet(tmp_path / PLACE)
    result, findings = analyse(tmp_path, manifest, AnalysisSettings())
    after = pl.read_parquet(tmp_path / PLACE)
    assert after.schema == READINGS and after.drop("quality").equals(before.drop("quality"))
    assert {finding.kind for finding in findings} == {"gap", "stuck_sensor"}
    finding = next(finding for finding in findings if finding.kind == "stuck_sensor")
    flagged = after.filter((pl.col("quality") & int(Quality.STUCK)) > 0)
    assert set(flagged["channel"]) == {3} and len(flagged) == finding.count
    assert finding.lines == (flagged["line"].min(), flagged["line"].max()) and finding.source == "vibration.csv"
    gap = after.filter((pl.col("quality") & int(Quality.AFTER_GAP)) > 0)
    assert gap["time"].to_physical().to_list() == [START + (2 * DAY + 3 * 3600) * 10**9]
    states = pl.read_parquet(tmp_path / "assets/press/states.parquet")
    assert states.schema == STATES and set(states["state"]) == {"idle", "load"}
    assert result.split is not None and all(channel.scale > 0 for channel in result.channels)


def test_a_second_analysis_finds_the_same_and_keeps_no_old_flags(tmp_path):
    manifest = faulty_plant().write(tmp_path)
    first = analyse(tmp_path, manifest, AnalysisSettings())
    flags = pl.read_parquet(tmp_path / PLACE)
    assert analyse(tmp_path, first[0], AnalysisSettings()) == first
    assert pl.read_parquet(tmp_path / PLACE).equals(flags)


def test_channels_read_in_groups_give_the_same(tmp_path, monkeypatch):
    manifest = faulty_plant().write(tmp_path)
    whole = analyse(tmp_path, manifest, AnalysisSettings())
    monkeypatch.setattr(asset_readings, "GROUP_ROWS", 20_000)
    monkeypatch.setattr(asset_readings, "BATCH_ROWS", 7_001)
    assert analyse(tmp_path, manifest, AnalysisSettings()) == whole


def test_rows_that_are_not_in_order_of_time_stay_where_they_stand(tmp_path):
    manifest = faulty_plant().write(tmp_path)
    straight = analyse(tmp_path, manifest, AnalysisSettings())[1]
    mixed = pl.read_parquet(tmp_path / PLACE).sample(fraction=1.0, shuffle=True, seed=1)
    mixed.write_parquet(tmp_path / PLACE)
    findings = analyse(tmp_path, manifest, AnalysisSettings())[1]
    assert pl.read_parquet(tmp_path / PLACE)["line"].equals(mixed["line"])
    assert [(f.kind, f.start, f.end) for f in findings] == [(f.kind, f.start, f.end) for f in straight]


def test_times_are_corrected_only_if_asked_and_only_once(tmp_path):
    plant = clean_plant(3, days=5, interval=10)
    plant.sensors = [shifted(s, 37) if s.source == "vibration.csv" else s for s in plant.sensors]
    manifest = plant.write(tmp_path)
    before = pl.read_parquet(tmp_path / PLACE)
    result, findings = analyse(tmp_path, manifest, AnalysisSettings())
    offset = next(finding for finding in findings if finding.kind == "clock_offset")
    assert offset.values["offset_s"] == pytest.approx(37, abs=2) and result.sources[1].clock_offset == 0
    assert pl.read_parquet(tmp_path / PLACE)["time"].equals(before["time"])
    result, _ = analyse(tmp_path, manifest, AnalysisSettings(correct_clocks=True))
    after = pl.read_parquet(tmp_path / PLACE)
    moved = (before["time"] - after["time"]).dt.total_milliseconds() / 1000
    theirs = before["source"] == 1
    assert moved.filter(theirs).mean() == pytest.approx(result.sources[1].clock_offset, abs=0.001)
    assert moved.filter(~theirs).sum() == 0 and result.sources[0].clock_offset == 0
    assert (((after["quality"] & int(Quality.SHIFTED_CLOCK)) > 0) == theirs).all()
    again, findings = analyse(tmp_path, result, AnalysisSettings(correct_clocks=True))
    assert again.sources == result.sources and "clock_offset" not in {finding.kind for finding in findings}
    with pytest.raises(PlantDataError, match=r"were corrected.*(1).*(2).*(3)"):
        analyse(tmp_path, manifest, AnalysisSettings(correct_clocks=True))


def test_states_bear_the_names_of_the_user(tmp_path):
    manifest = clean_plant(1, days=5).write(tmp_path)
    analyse(tmp_path, manifest, AnalysisSettings(state_names={"idle": "停止"}))
    data = PlantDataset(tmp_path)
    assert set(data.states("press").collect()["state"]) == {"停止", "load"}


def test_a_channel_without_numbers_and_a_record_that_is_too_short_are_said(tmp_path):
    plant = clean_plant(1, days=1)
    plant.sensors[1].values[:] = np.nan
    result, findings = analyse(tmp_path, plant.write(tmp_path), AnalysisSettings(context=DAY))
    kinds = {finding.kind: finding for finding in findings}
    assert kinds["empty_channel"].channel == "oil temperature" and kinds["short_record"].severity == "unusable"
    assert result.split is None and result.channels[1].scale is None


def test_the_split_leaves_a_gap_as_long_as_the_context():
    split = chronological_split(START, START + 100 * DAY * 10**9, 10 * DAY, 0.7)
    assert (split.train_end, split.test_start) == ("2024-05-03T00:00:00Z", "2024-05-13T00:00:00Z")
    with pytest.raises(PlantDataError, match=r"1\.0 days.*(1).*further back.*(2).*shorter context.*(3)"):
        chronological_split(START, START + DAY * 10**9, DAY / 2 * 1.9, 0.7)


@pytest.mark.parametrize(
    ("values", "center", "scale", "method"),
    [
        ([1.0, 2, 3, 4, 100], 3.0, 1.4826, "mad"),
        ([0.0] * 6 + [1.0] * 4, 0.0, 1 / 1.349, "iqr"),
        ([0.0] * 99 + [10.0], 0.0, np.sqrt(np.pi / 2) * 0.1, "mean deviation"),
        ([7.0] * 9, 7.0, 1.0, "constant"),
        ([], 0.0, 1.0, "no training data"),
    ],
)
def test_a_scale_falls_back_in_the_stated_order(values, center, scale, method):
    found = robust_scale(np.array(values))
    assert (found.center, found.method) == (center, method) and found.scale == pytest.approx(scale)


@pytest.mark.parametrize(
    "values", [{"context": -1.0}, {"train_share": 1.0}, {"max_states": 0}, {"state_names": {"idle": "a", "load": "a"}}]
)
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        AnalysisSettings(**values)
