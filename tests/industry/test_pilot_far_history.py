"""The test for far history: a planted lag is found, independent times are not, and shuffling keeps what it must."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.pilot_plants import plant
from scipy.stats import binom

from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.pilot.cause_candidates import block_steps, event_causes, joint_record, shift_causes
from hf_sparse_attn.industry.pilot.far_history import far_history
from hf_sparse_attn.industry.pilot.lag_scan import LagWindows, by_calendar, evidence
from hf_sparse_attn.industry.pilot.timeline import DAY

SMALL = {"days": 100, "step": 15, "kinds": 20, "channels": 2}  # 96 steps a day


@pytest.mark.parametrize(
    ("seed", "kind", "lag", "pairs"),
    [(0, "event", 300, 12), (1, "event", 700, 20), (2, "shift", 200, 30), (3, "event", 5, 12)],
)
def test_a_planted_lag_is_found_among_look_alikes(seed, kind, lag, pairs):
    result = far_history([plant(seed, lag=lag, pairs=pairs, cause=kind, **SMALL)], seed=seed)
    link = result.far if lag > 24 else result.anywhere
    assert link.p <= 0.01
    assert lag / 2 <= link.lag / 900 <= 2 * lag
    assert link.source == "INFO event 3" or link.source.startswith("sensor 0")
    gains = {round(g.multiple): g for g in result.gains}
    if kind == "event":
        reached = [g for g in result.gains if g.multiple > 1 and 24 * g.multiple > 1.2 * lag > 24]
        assert all(g.low > 0 and g.p <= 0.05 and g.gain > 1 + g.shuffled for g in reached)
        assert (gains[1].low > 1) == (lag < 24)


@pytest.mark.parametrize("seed", range(3))
def test_independent_times_give_no_link_and_no_gain(seed):
    result = far_history([plant(seed, lag=300, pairs=20, linked=False, **SMALL)], seed=seed)
    assert result.far.p > 0.01
    assert not any(g.low > 0 and (g.p or 1) <= 0.05 for g in result.gains)
    assert result.detectable <= 0.8


def test_shared_hours_shared_trends_and_shared_standstills_are_no_link():
    line = plant(0, lag=300, pairs=2, linked=False, **SMALL)
    for seed, rhythm in enumerate(("hour", "trend", "standstill")):
        rng = np.random.default_rng(seed)
        steps = np.arange(len(line))
        chance = {
            "hour": (steps % 96 == 24) / 1.0,
            "trend": (steps / len(line)) ** 2,
            "standstill": (steps // 1920 % 2 == 1) / 1.0,
        }[rhythm]
        times = [np.unique(rng.choice(len(line), 30, p=chance / chance.sum())) for _ in range(3)]
        counts = line.counts.copy()
        for kind in (3, 4):
            counts[:, kind] = 0
            counts[times[kind - 3], kind] = 1
        starts = line.times[times[2]]
        states = (steps // 1920 % 2).astype(np.int32) if rhythm == "standstill" else line.states
        record = replace(line, counts=counts, faults=np.stack([starts, starts + line.step], 1), states=states)
        assert far_history([record], seed=seed).far.p > 0.01, rhythm


def test_assets_are_pooled_and_never_mixed():
    lines = [plant(seed, lag=300, pairs=4, **SMALL) for seed in range(4)]
    pooled = far_history(lines)
    assert pooled.effects == sum(len(line.onsets()) for line in lines)
    assert pooled.far.p <= 0.01 and 150 <= pooled.far.lag / 900 <= 600
    # the causes of one asset before the faults of another
    crossed = [replace(line, faults=other.faults) for line, other in zip(lines, lines[1:] + lines[:1], strict=True)]
    assert far_history(crossed).far.p > 0.01


def test_events_of_a_kind_can_be_the_target():
    line = plant(5, lag=300, pairs=20, **SMALL)
    counts = line.counts.copy()
    counts[:, 6] = 0
    counts[line.onsets(), 6] = 1
    result = far_history([replace(line, counts=counts, faults=line.faults[:0])], target="INFO event 6")
    assert result.effects == len(line.onsets()) and result.far.source == "INFO event 3"
    with pytest.raises(PlantDataError, match="no asset has events of kind 'x'"):
        far_history([line], target="x")


def test_hits_and_coverage_equal_a_direct_count():
    rng = np.random.default_rng(0)
    line = plant(0, lag=30, pairs=8, days=10, step=15, kinds=5, channels=1)
    record = joint_record([line, plant(1, lag=30, pairs=8, days=12, step=15, kinds=5, channels=1)], 200)
    windows = LagWindows(200)
    name = "INFO event 3" if "INFO event 3" in record.causes else next(iter(record.causes))
    causes = record.causes[name]
    inside = np.concatenate([np.arange(first, last) for first, last in record.spans])
    for w in rng.choice(len(windows.first), 12, replace=False):
        first, last = windows.first[w], windows.last[w]
        preceded = [((causes > t - last) & (causes <= t - first)).any() for t in inside]
        assert windows.coverage(record, causes)[w] == pytest.approx(np.mean(preceded))
        hits = sum(((causes > t - last) & (causes <= t - first)).any() for t in record.effects)
        assert windows.hits(causes, record.effects[None])[0, w] == hits


def test_evidence_is_the_binomial_tail():
    assert evidence(np.array([3]), np.array([0.2]), 5)[0] == pytest.approx(-np.log10(binom.sf(2, 5, 0.2)))
    assert evidence(np.array([0]), np.array([0.2]), 5)[0] == 0


def test_a_shuffle_moves_whole_blocks_within_their_group_and_their_asset():
    record = joint_record([plant(0, lag=30, pairs=8, **SMALL), plant(1, lag=30, pairs=8, **SMALL)], 500)
    order = record.shuffled(np.random.default_rng(0))
    assert sorted(order) == list(range(len(record.blocks))) and (order != np.arange(len(order))).any()
    assert (record.groups[order] == record.groups).all()
    steps = np.concatenate([np.arange(first, last) for first, last in record.spans])
    moved = record.moved(steps, order)
    assert sorted(moved) == sorted(steps)
    assert ((moved - steps) % record.block == 0).all()
    middle = record.spans[1, 0]
    assert ((moved >= middle) == (steps >= middle)).all()


def test_blocks_are_as_long_as_activity_remembers():
    line = plant(0, lag=30, pairs=8, days=120, step=15)
    assert block_steps([line]) * line.step == DAY
    slow = np.repeat(np.random.default_rng(0).poisson(3, 24), 5 * 96)[:, None]
    assert block_steps([replace(line, counts=(line.counts + slow).astype(np.int32))]) * line.step == 7 * DAY
    assert block_steps([plant(0, lag=30, pairs=8, days=8, step=15)]) == 8 * 96 // 16


def test_frequent_events_stand_for_their_bursts_and_shifts_for_their_first_step():
    line = plant(0, lag=30, pairs=2, **SMALL)
    counts, values = line.counts.copy(), line.values.copy()
    counts[:, 19] = 1
    counts[4000:4004, 19] = 30
    values[6000:6048, 1] += 6
    causes = {**event_causes(replace(line, counts=counts)), **shift_causes(replace(line, values=values))}
    assert causes["burst of INFO event 19"].tolist() == [4000]
    assert np.abs(causes["sensor 1 rises (6 h)"] - 6000).min() <= 8


def test_what_cannot_be_tested_is_refused_with_a_way_on():
    line = plant(0, lag=30, pairs=4, days=10, step=15)
    with pytest.raises(PlantDataError, match="near context of 384 steps is no shorter than a quarter"):
        far_history([line], near_seconds=4 * 86400)
    with pytest.raises(PlantDataError, match="different steps"):
        joint_record([line, plant(0, lag=30, pairs=4, days=10, step=30)], 10)
    with pytest.raises(PlantDataError, match="no timeline"):
        far_history([])
    with pytest.raises(PlantDataError, match="multiples"):
        far_history([line], multiples=(1,))


def test_a_candidate_with_the_daily_rhythm_of_the_faults_counts_by_that_rhythm():
    line = plant(0, lag=300, pairs=2, linked=False, **SMALL)
    rng, days = np.random.default_rng(0), np.arange(95)  # on more days it would count as bursts
    counts = np.zeros_like(line.counts)
    counts[days * 96 + 20, 3] = 1  # every morning
    counts[rng.choice(len(line), 12, replace=False), 4] = 1
    at = line.times[rng.choice(days, 30, replace=False) * 96 + 40]  # at noon
    record = joint_record([replace(line, counts=counts, faults=np.sort(np.stack([at, at + line.step], 1), 0))], 400)
    windows = LagWindows(400)
    plain = windows.coverages(record)
    shares = by_calendar(record, windows, plain, record.effects, 0)
    morning, rare = "INFO event 3", "INFO event 4"
    near = (windows.first <= 20) & (windows.last > 20)
    assert (plain[morning][near] < 0.2).any() and (shares[morning][near] > 0.8).all()
    assert np.abs(shares[rare] - plain[rare]).mean() < 0.05
