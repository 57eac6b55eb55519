"""Sensors on a grid: what was observed, scaled by the training period, with the readings behind each cell."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from helpers.event_folders import START, at, wide_readings, write_folder
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.findings import Quality
from hf_sparse_attn.industry.representation.forecast_rows import forecast_rows
from hf_sparse_attn.industry.representation.sensor_bins import LIMIT, MISSING, bin_centers, quantise
from hf_sparse_attn.industry.representation.sensor_patches import GridSettings, SensorGrid
from hf_sparse_attn.industry.representation.splitting import window_starts


def reading(seconds, value, line, channel=0, quality=0):
    return (at(seconds), channel, value, quality, 1, line)


def grid_of(folder, rows, split=None, scaled=False, channels=1, **settings):
    data = write_folder(folder, readings=rows, channels=channels, split=split, scaled=scaled)
    return SensorGrid(data, "press", GridSettings(**{"step": 60.0, **settings}))


def test_steps_without_a_reading_are_not_observed_and_never_filled(tmp_path):
    rows = [reading(0, 1.0, 2), reading(30, 3.0, 3), reading(200, 5.0, 4)]
    grid = grid_of(tmp_path, rows, scaled=True)
    assert grid.observed[:, 0].tolist() == [True, False, False, True]
    assert grid.values[:, 0].tolist() == pytest.approx([(2 - 8) / 5, 0, 0, (5 - 8) / 5])
    assert grid.since_last[:, 0].tolist() == [30, 90, 150, 40]
    assert grid.times(0)[0] == int(START.timestamp()) * 10**9


def test_the_last_reading_is_that_of_the_latest_time_not_of_the_last_line(tmp_path):
    rows = [reading(20, 2.0, 2), reading(50, 5.0, 3), reading(10, 1.0, 4), reading(70, 7.0, 5)]
    grid = grid_of(tmp_path, rows, scaled=True, reduce="last")
    assert (grid.values[:, 0] * 5 + 8).tolist() == pytest.approx([5, 7])


def test_flagged_and_missing_readings_are_not_observed_and_are_counted(tmp_path):
    rows = [
        reading(0, None, 2, quality=Quality.NO_NUMBER.value),
        reading(60, float("inf"), 3),
        reading(120, 4.0, 4, quality=Quality.OTHER_UNIT.value),
        reading(180, 4.0, 5),
    ]
    grid = grid_of(tmp_path, rows, scaled=True)
    assert len(grid) == 1 and grid.left_out == 3
    kept = SensorGrid(grid.data, "press", GridSettings(60.0, leave_out=Quality(0)))
    assert len(kept) == 2 and kept.left_out == 2
    assert grid.cells(1, 4) == [] and kept.cells(1, 4) == [(0, 0)]


def test_scales_that_are_open_come_from_the_training_period_alone(tmp_path):
    rows = [reading(60 * n, float(n % 5), n + 2) for n in range(100)]
    rows += [reading(60 * n, 1e6, n + 2) for n in range(110, 200)]
    grid = grid_of(tmp_path, rows, split=(6000, 6600))
    values = np.arange(100) % 5
    scale = 1.4826 * np.median(np.abs(values - 2))
    assert grid.values[:100, 0] == pytest.approx((values - 2) / scale)
    assert grid.unscaled == ()


def test_a_channel_that_never_varies_or_is_empty_has_scale_one_and_is_named(tmp_path):
    rows = [reading(60 * n, 3.0, n + 2) for n in range(10)]
    grid = grid_of(tmp_path, rows, channels=2)
    assert grid.unscaled == ("s0", "s1") and not grid.values.any() and not grid.observed[:, 1].any()
    assert np.isinf(grid.since_last[:, 1]).all()


def test_a_channel_first_read_after_training_is_refused(tmp_path):
    with pytest.raises(PlantDataError, match="no reading of the training period to scale channel 's0'"):
        grid_of(tmp_path, [reading(7000, 3.0, 2)], split=(6000, 6600))


def test_a_stray_year_a_step_of_nothing_and_an_unknown_channel_are_refused(tmp_path):
    rows = [reading(0, 1.0, 2), reading(3e9, 1.0, 3)]
    with pytest.raises(PlantDataError, match="wrong year"):
        grid_of(tmp_path / "a", rows, scaled=True, step=1.0)
    with pytest.raises(PlantDataError, match="a step of 0"):
        grid_of(tmp_path / "b", rows, scaled=True, step=0.0)
    with pytest.raises(PlantDataError, match=r"no channel 'oil'.*s0"):
        SensorGrid(write_folder(tmp_path / "c", readings=rows), "press", GridSettings(1.0, channels=("oil",)))


def test_a_reading_without_a_time_is_refused_with_its_line(tmp_path):
    with pytest.raises(PlantDataError, match=r"press\.csv, line 3: the reading has no time"):
        grid_of(tmp_path, [reading(0, 1.0, 2), (None, 0, 1.0, 0, 1, 3)])


def test_an_asset_without_readings_has_a_grid_of_no_steps(tmp_path):
    grid = grid_of(tmp_path, [])
    assert len(grid) == 0 and grid.lines(0, 10) == ()


def test_every_cell_knows_its_lines_and_every_line_its_cells(tmp_path):
    rng = np.random.default_rng(0)
    rows = [  # a long file: a line is one channel, times run back and forth
        reading(float(rng.integers(0, 3600)), float(rng.normal()), line, channel=int(rng.integers(0, 3)))
        for line in range(2, 400)
    ]
    grid = grid_of(tmp_path, rows, channels=3)
    first = grid.start // 10**9
    expected: dict[tuple[int, int], set[int]] = {}
    for time, channel, _, _, _, line in rows:
        expected.setdefault(((int(time.timestamp()) - first) // 60, channel), set()).add(line)
    for (step, channel), lines in expected.items():
        found = grid.lines(step, step, (f"s{channel}",))
        assert {line for part in found for _, line in part} == lines
        assert all(part.file == "press.csv" for part in found)
        assert all(grid.cells(1, line) == [(step, channel)] for line in lines)
    assert set(map(tuple, np.argwhere(grid.observed))) == expected.keys()


def test_consecutive_lines_of_a_wide_file_are_one_range(tmp_path):
    grid = grid_of(tmp_path, wide_readings(60), channels=2)
    assert [(part.first, part.last) for part in grid.lines(0, 1)] == [(2, 13)]
    assert grid.cells(1, 2) == [(0, 0), (0, 1)]


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.integers(2, 300))
def test_bins_keep_the_order_of_values_and_their_centres(a, b, bins):
    low, high = quantise(np.array([min(a, b), max(a, b)]), np.array([True, True]), bins)
    assert 1 <= low <= high <= bins
    assert quantise(bin_centers(bins), np.ones(bins, bool), bins).tolist() == list(range(1, bins + 1))
    assert np.abs(bin_centers(bins)).max() < LIMIT
    assert quantise(np.array([a]), np.array([False]), bins).tolist() == [MISSING]


@given(st.integers(0, 200), st.integers(2, 40), st.data())
def test_windows_cover_every_place_and_only_the_last_overlaps_unasked(size, length, data):
    stride = data.draw(st.integers(1, length))
    starts = window_starts(size, length, stride)
    assert {at for start in starts for at in range(start, min(size, start + length))} == set(range(size))
    assert starts == sorted(set(starts)) and all(b - a <= stride for a, b in pairwise(starts))


def test_forecast_rows_hold_past_future_and_masks_and_do_not_cross_the_split(tmp_path):
    rows = [reading(60 * n, float(n), n + 2) for n in range(100) if n not in range(40, 60)]
    grid = grid_of(tmp_path, rows, split=(60 * 60, 60 * 70))
    sets = forecast_rows({"press": grid}, context=8, horizon=4)
    train, test = sets["train"].with_format("numpy"), sets["test"].with_format("numpy")
    assert train["past_values"][0].shape == (8, 1) and train["future_values"][0].shape == (4, 1)
    assert max(row["first"] for row in train) + 12 <= 60 and min(row["first"] for row in test) == 70
    for row in train:
        at_first = int(row["first"])
        assert (row["past_values"] == grid.values[at_first : at_first + 8]).all()
        assert (row["future_observed_mask"] == grid.observed[at_first + 8 : at_first + 12]).all()
    # those that begin at 32 to 48 have no future
    assert sets["train"].info.description == '{"rows": 8, "without_readings": 5}'
    with pytest.raises(PlantDataError, match=r"no row of 60 \+ 20"):
        forecast_rows({"press": grid}, context=60, horizon=20)


def test_patchtst_takes_the_rows(tmp_path):
    import torch
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    grid = grid_of(tmp_path, wide_readings(200, every=60.0), channels=2)
    rows = forecast_rows({"press": grid}, context=16, horizon=4).with_format("torch")
    sizes = {"d_model": 16, "num_attention_heads": 2, "ffn_dim": 16, "num_hidden_layers": 1, "patch_length": 4}
    config = PatchTSTConfig(num_input_channels=2, context_length=16, prediction_length=4, patch_stride=4, **sizes)
    batch = {name: torch.stack([rows[i][name] for i in range(4)]) for name in rows.column_names[:3]}
    assert PatchTSTForPrediction(config)(**batch).loss.isfinite()
