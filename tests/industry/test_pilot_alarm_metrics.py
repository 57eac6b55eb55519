"""Measures of alarms against slow direct ones, and what scores without meaning reach."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.pilot.alarm_metrics import alarm_steps, budget_threshold, check_scores, match_events
from hf_sparse_attn.industry.pilot.block_bootstrap import drawn_weights, interval, ratio
from hf_sparse_attn.industry.pilot.detection_curves import (
    BlockCurves,
    average_precision,
    slope_widths,
    vus_base_rate,
    vus_pr,
)


def planted(seed, steps=400, faults=4, length=12, strength=1.5):
    rng = np.random.default_rng(seed)
    labels = np.zeros(steps, bool)
    for at in rng.integers(0, steps - length, faults):
        labels[at : at + length] = True
    # rounded: equal scores have to be one threshold
    return np.round(rng.standard_normal(steps) + strength * labels, 1), labels


def direct_vus(scores, labels, most):
    """Paparrizos et al. 2022 in loops, with every score as a threshold."""
    areas = []
    for width in slope_widths(most):
        sloped = labels.astype(float)
        ends = [n for n in range(len(labels)) if labels[n] and (n + 1 == len(labels) or not labels[n + 1])]
        starts = [n for n in range(len(labels)) if labels[n] and (n == 0 or not labels[n - 1])]
        for n in range(len(labels)):
            # slopes of all segments add up
            distances = [n - end for end in ends if n > end] + [start - n for start in starts if n < start]
            slopes = sum(np.sqrt(1 - d / width) for d in distances if d <= width // 2)
            sloped[n] = min(1, sloped[n] + slopes)
        runs, start = [], None
        for n, value in enumerate([*sloped, 0]):
            if value > 0 and start is None:
                start = n
            elif value == 0 and start is not None:
                runs.append((start, n))
                start = None
        area, old_recall, old_precision = 0.0, 0.0, 1.0
        for threshold in sorted(set(scores), reverse=True):
            alarms = scores >= threshold
            hits = sum(s for s, a in zip(sloped, alarms, strict=True) if a)
            found = sum(any(alarms[a:b]) for a, b in runs) / len(runs)
            recall = min(1, hits / ((labels.sum() + sloped.sum()) / 2)) * found
            precision = hits / alarms.sum()
            area += (recall - old_recall) * (precision + old_precision) / 2
            old_recall, old_precision = recall, precision
        areas.append(area)
    return np.mean(areas)


@pytest.mark.parametrize("seed", range(6))
def test_vus_pr_equals_a_direct_computation(seed):
    scores, labels = planted(seed, strength=seed)
    assert vus_pr(scores, labels, 30) == pytest.approx(direct_vus(scores, labels, 30), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_curve_of_a_bootstrap_is_that_of_the_steps_it_draws(seed):
    scores, labels = planted(seed)
    blocks = np.arange(len(scores)) // 50
    drawn = drawn_weights(8, seed, draws=20)
    areas = BlockCurves(scores, labels, blocks).average_precision(drawn)
    for weights, area in zip(drawn, areas, strict=True):
        assert area == pytest.approx(average_precision_score(labels, scores, sample_weight=weights[blocks]))


def test_random_scores_get_the_base_rate():
    _, labels = planted(0, steps=4000, faults=40)
    draws = [np.random.default_rng(seed).random(4000) for seed in range(40)]
    assert np.mean([average_precision(s, labels) for s in draws]) == pytest.approx(labels.mean(), rel=0.1)
    assert np.mean([vus_pr(s, labels, 12) for s in draws]) == pytest.approx(vus_base_rate(labels, 12), rel=0.1)


def test_perfect_scores_get_one_and_constant_scores_the_base_rate():
    _, labels = planted(1)
    assert average_precision(labels.astype(float), labels) == vus_pr(labels.astype(float), labels, 0) == 1
    assert average_precision(np.zeros(400), labels) == pytest.approx(labels.mean())


def test_a_record_without_a_fault_has_no_measure_and_scores_that_are_no_numbers_are_refused():
    assert np.isnan(average_precision(np.arange(4.0), np.zeros(4, bool)))
    assert np.isnan(vus_pr(np.arange(4.0), np.zeros(4, bool), 2))
    with pytest.raises(PlantDataError, match=r"model x: shape \(3,\) with 1 that are not finite"):
        check_scores(np.array([1, np.nan, 2]), 3, "model x")


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(0, 6), st.integers(1, 5))
def test_a_budget_is_never_exceeded_and_alarms_keep_their_distance(levels, most, cool_down):
    scores = np.array(levels, float)
    threshold = budget_threshold(scores, most, cool_down)
    alarms = alarm_steps(scores, threshold, cool_down)
    assert len(alarms) <= most
    assert (np.diff(alarms) >= cool_down).all() and (scores[alarms] >= threshold).all()


def largest_matching(alarms, windows):
    """By trying all pairings."""
    small, large = sorted((range(len(alarms)), range(len(windows))), key=len)
    flipped = len(windows) < len(alarms)
    for size in range(len(small), 0, -1):
        for chosen in combinations(small, size):
            for others in permutations(large, size):
                pairs = [(o, c) if flipped else (c, o) for c, o in zip(chosen, others, strict=True)]
                if all(windows[w][0] <= alarms[a] < windows[w][1] for a, w in pairs):
                    return size
    return 0


@given(
    st.lists(st.integers(0, 20), max_size=4),
    st.lists(st.integers(0, 18), max_size=4),
    st.integers(0, 4),
    st.integers(0, 4),
)
def test_the_matching_is_one_to_one_and_of_the_largest_size(alarms, starts, before, after):
    faults = np.array([[s, s + 1 + s % 3] for s in sorted(starts)], np.int64).reshape(-1, 2)
    matching = match_events(np.array(sorted(alarms), np.int64), faults, before, after)
    windows = [(first - before, last + after) for first, last in faults]
    assert matching.alarm_hits.sum() == matching.fault_hits.sum() == largest_matching(sorted(alarms), windows)
    for at, hit, false in zip(sorted(alarms), matching.alarm_hits, matching.false_alarms, strict=True):
        inside = any(first <= at < last for first, last in windows)
        assert false != inside and (inside or not hit)


def test_lead_time_is_that_of_the_first_alarm_in_the_window():
    matching = match_events(np.array([7, 9, 14]), np.array([[10, 12], [15, 18], [30, 31]]), 3, 0)
    np.testing.assert_array_equal(matching.leads, [3, 1, np.nan])
    assert matching.alarm_hits.tolist() == [True, False, True]
    assert matching.false_alarms.tolist() == [False, False, False]


def test_an_interval_covers_the_truth_and_says_how_many_draws_had_no_value():
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        sums, sizes = rng.normal(1, 1, 80), np.ones(80)
        bounds = interval(lambda w, sums=sums, sizes=sizes: ratio(w @ sums, w @ sizes), drawn_weights(80, seed))
        covered += bounds["low"] <= 1 <= bounds["high"]
    assert covered >= 51  # 95 % ± three standard errors
    rare = np.eye(4)[0]
    bounds = interval(lambda w: ratio(w @ rare, w @ rare), drawn_weights(4, 0))
    assert bounds["value"] == bounds["low"] == bounds["high"] == 1
    assert bounds["undefined"] == pytest.approx((3 / 4) ** 4, abs=0.05)
    assert interval(lambda w: ratio(w @ rare, 0.0 * (w @ rare)), drawn_weights(4, 0))["value"] is None
