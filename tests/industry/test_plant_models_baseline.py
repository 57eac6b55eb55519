"""What surprise is usual: cells that have enough, their spread, hours by the plant's clock, and scores on a grid."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from helpers.event_folders import START, at, write_folder
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_attn.industry.dataset import STATES
from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.plant_models.stream_reading import Reading
from hf_sparse_attn.industry.plant_models.surprise import Surprise
from hf_sparse_attn.industry.plant_models.surprise_baseline import (
    SMALLEST_SCALE,
    SurpriseBaseline,
    scores_on_grid,
    states_at,
)

HOUR = 3600 * 10**9
MONDAY = 4 * 24 * HOUR  # 1970-01-05 00:00 UTC


def made(times, nats, kinds=None):
    size = len(times)
    kinds = np.zeros(size, np.uint8) if kinds is None else np.asarray(kinds, np.uint8)
    ones = np.ones(size, np.int64)
    return Surprise(np.asarray(times, np.int64), kinds, np.asarray(nats, np.float64), ones, 0 * ones, Reading())


def states(*names):
    return np.array(names, dtype=str)


def test_the_score_is_the_distance_from_the_median_in_robust_spreads():
    nats = [1.0, 2.0, 3.0, 4.0, 100.0]
    train = made([MONDAY + n for n in range(5)], nats)
    baseline = SurpriseBaseline.fit(train, states(*["run"] * 5), MONDAY + HOUR, least=5)
    scored = baseline.score(made([MONDAY + 1], [6.0]), states("run"))
    # median 3; absolute deviations 2, 1, 0, 1, 97: their median is 1
    assert scored.scores[0] == pytest.approx((6 - 3) / 1.4826) and scored.by_level == (1, 0, 0, 0)


def test_cells_with_too_few_segments_give_way_to_coarser_ones_and_that_is_counted():
    times = [MONDAY + n for n in range(10)] + [MONDAY + HOUR + n for n in range(3)]
    nats = [*range(10), *range(100, 103)]
    train = made(times, nats)
    names = states(*["run"] * 10, *["idle"] * 3)
    baseline = SurpriseBaseline.fit(train, names, MONDAY + 2 * HOUR, least=5)
    assert baseline.dropped == (1, 1, 0, 0)
    asked = made([MONDAY, MONDAY + 9 * HOUR, MONDAY, MONDAY], [4.5] * 4, kinds=[0, 0, 0, 1])
    scored = baseline.score(asked, states("run", "run", "idle", "run"))
    assert scored.levels.tolist() == [0, 1, 2, 3] and scored.by_level == (1, 1, 1, 1)
    whole = np.median(nats)
    spread = 1.4826 * np.median(np.abs(np.array(nats) - whole))
    assert scored.scores[:2] == pytest.approx(0)
    assert scored.scores[2:] == pytest.approx((4.5 - whole) / spread)


def test_nothing_after_the_end_of_training_is_fitted():
    times = np.arange(40) * 60 * 10**9 + MONDAY
    early = SurpriseBaseline.fit(made(times, np.arange(40.0)), states(*["a"] * 40), int(times[20]), least=5)
    other = made(times, np.where(np.arange(40) < 20, np.arange(40.0), 1e6))
    late = SurpriseBaseline.fit(other, states(*["a"] * 20, *["b"] * 20), int(times[20]), least=5)
    for one, two in zip(early.cells, late.cells, strict=True):
        assert one.sort(one.columns).equals(two.sort(two.columns))


def test_hours_are_those_of_the_plant_s_clock():
    # Sunday 15:00 UTC is Monday 00:00 in Tokyo; in summer 22:00 UTC is midnight in Berlin, in winter 23:00
    times = [MONDAY - 9 * HOUR + n for n in range(5)] + [MONDAY + n for n in range(5)]
    train = made(times, [1, 2, 3, 4, 5, 11, 12, 13, 14, 15])
    tokyo = SurpriseBaseline.fit(train, states(*["a"] * 10), MONDAY + HOUR, zone="Asia/Tokyo", least=5)
    assert sorted(tokyo.cells[0]["hour"].to_list()) == [0, 9]
    july = 1_720_216_800 * 10**9  # 2024-07-05 22:00 UTC, a Friday
    january = 1_704_495_600 * 10**9  # 2024-01-05 23:00 UTC, a Friday
    both = made([july + n for n in range(3)] + [january + n for n in range(3)], range(6))
    berlin = SurpriseBaseline.fit(both, states(*["a"] * 6), july + HOUR, zone="Europe/Berlin", least=2)
    assert berlin.cells[0]["hour"].to_list() == [5 * 24]  # Saturday 00:00, both


def test_equal_nats_have_a_spread_that_is_no_zero():
    times = [MONDAY + n for n in range(10)]
    flat = SurpriseBaseline.fit(made(times, [2.0] * 10), states(*["a"] * 10), MONDAY + HOUR, least=5)
    assert flat.score(made(times[:1], [2.5]), states("a")).scores[0] == pytest.approx(0.5 / SMALLEST_SCALE)
    mostly = SurpriseBaseline.fit(made(times, [2.0] * 8 + [3.0, 5.0]), states(*["a"] * 10), MONDAY + HOUR, least=5)
    # the median deviation is 0, the mean one 0.4
    assert mostly.score(made(times[:1], [3.0]), states("a")).scores[0] == pytest.approx(1 / (1.253314 * 0.4))


def test_what_cannot_be_fitted_is_refused():
    surprise, names = made([MONDAY + n for n in range(9)], range(9)), states(*["a"] * 9)
    with pytest.raises(PlantDataError, match="9 segments end before the end of training, a baseline needs 30"):
        SurpriseBaseline.fit(surprise, names, MONDAY + HOUR)
    with pytest.raises(PlantDataError, match="8 states for 9 segments"):
        SurpriseBaseline.fit(surprise, names[:8], MONDAY + HOUR, least=5)
    for zone in ("Asia/Tokio", "../etc", ""):
        with pytest.raises(PlantDataError, match="there is no time zone"):
            SurpriseBaseline.fit(surprise, names, MONDAY + HOUR, least=5, zone=zone)


def test_states_are_those_at_the_time(tmp_path):
    data = write_folder(tmp_path / "a", [])
    begin = int(START.timestamp()) * 10**9
    assert states_at(data, "press", np.array([begin])).tolist() == [""]
    table = pl.DataFrame([(at(60), at(90), "load"), (at(0), at(60), "idle")], schema=STATES, orient="row")
    table.write_parquet(data.folder / "assets" / "press" / "states.parquet")
    seconds = np.array([-1, 0, 59, 60, 89, 90])
    assert states_at(data, "press", begin + seconds * 10**9).tolist() == ["", "idle", "idle", "load", "load", ""]


def test_a_step_of_the_grid_has_its_highest_score_and_silence_the_lowest():
    grid = np.arange(4) * 10
    scores = scores_on_grid(np.array([35, 1, 9, 10, 12]), np.array([7.0, 1.0, 3.0, np.nan, -2.0]), grid)
    assert scores.tolist() == [3.0, -2.0, -2.0, 7.0]
    late = scores_on_grid(np.array([1, 35, 48]), np.array([1.0, 7.0, 9.0]), grid)  # a step that ends after the record
    assert late.tolist() == [1.0, 1.0, 1.0, 9.0]


@given(st.lists(st.tuples(st.integers(0, 99), st.floats(-50, 50)), min_size=1, max_size=40), st.randoms())
def test_scores_on_a_grid_do_not_depend_on_the_order_of_segments(pairs, random):
    def on_grid(parts):
        times, scores = zip(*parts, strict=True)
        return scores_on_grid(np.array(times), np.array(scores), np.arange(10) * 10)

    found = on_grid(pairs)
    assert found.shape == (10,) and np.isfinite(found).all() and found.max() == max(s for _, s in pairs)
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert on_grid(shuffled).tolist() == found.tolist()


@pytest.mark.parametrize(
    ("times", "scores", "grid", "message"),
    [
        ([40], [1.0], [0, 10, 20, 30], "0 lie before the grid and 1 behind it"),
        ([-1, 3], [1.0, 1.0], [0, 10], "1 lie before the grid"),
        ([1], [np.inf], [0, 10], "1 are infinite"),
        ([1], [np.nan], [0, 10], "1 are NaN"),
        ([], [], [0, 10], "of 0 scores"),
        ([1], [1.0], [0, 10, 25], "2 lengths apart"),
        ([1], [1.0], [0], "0 lengths apart"),
        ([1], [1.0], [10, 0], "1 lengths apart"),
    ],
)
def test_scores_that_fit_no_grid_are_refused(times, scores, grid, message):
    with pytest.raises(PlantDataError, match=message):
        scores_on_grid(np.array(times, np.int64), np.array(scores, float), np.array(grid))
