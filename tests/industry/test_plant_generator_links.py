"""Causes and failures of a generated plant and of a null plant, in which nothing follows from anything."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse_attn.industry.plant_generator.causal_links import lag_of, plan_of
from hf_sparse_attn.industry.plant_generator.operating_schedule import schedule_of
from hf_sparse_attn.industry.plant_generator.plant_settings import DAY, PlantSettings


def plan(**changes):
    chosen = PlantSettings(**changes)
    return plan_of(chosen, "press-1", schedule_of(chosen, "press-1")), lag_of(chosen)


def seconds(text):
    return datetime.fromisoformat(text).timestamp()


def of_role(plan, role):
    return [event for event in plan.events if f"/{role}/" in event.id]


def far(plan):
    """(starts of causes, starts of far failures) in seconds."""
    causes = [seconds(c.start) for c in of_role(plan, "cause") if c.kind != "bearing noise"]
    return np.array(causes), np.array([seconds(f.start) for f in of_role(plan, "failure") if f.kind == "overheating"])


@pytest.mark.parametrize("seed", range(4))
def test_a_null_plant_has_the_same_causes_and_as_many_failures_but_no_link(seed):
    linked, null = plan(seed=seed)[0], plan(seed=seed, null=True)[0]
    for role in ("cause", "distractor"):
        told = [sorted((e.kind, e.start, e.end) for e in of_role(p, role)) for p in (linked, null)]
        assert told[0] == told[1]
    kinds = [Counter(event.kind for event in of_role(p, "failure")) for p in (linked, null)]
    assert kinds[0] == kinds[1] and len(linked.lines) == len(null.lines)
    assert all(f.causes for f in of_role(linked, "failure")) and not any(f.causes for f in of_role(null, "failure"))
    assert all(c.failure is None and c.lag_s is None for c in of_role(null, "cause"))


@given(st.integers(0, 2**63 - 1), st.floats(7200, DAY / 2))
@settings(max_examples=10, deadline=None)
def test_only_of_a_linked_plant_does_a_failure_follow_the_lag_after_each_cause(seed, lag):
    def share(null):
        causes, failures = far(plan(seed=seed, days=90, lag=lag, null=null)[0])
        # within the jitter, and what a second cause comes later
        return sum(-0.13 < (f - c) / lag - 1 < 0.08 for c, f in product(causes, failures)) / len(causes)

    # a null plant has the failures that fall into a tenth of a day by chance
    assert share(null=False) >= 1 and share(null=True) < 0.6


@pytest.mark.parametrize("null", [False, True])
def test_failures_and_most_causes_lie_where_the_machine_is_at_work(null):
    chosen = PlantSettings(days=90, null=null, lag=2 * DAY)
    schedule = schedule_of(chosen, "press-1")
    causes, failures = far(plan_of(chosen, "press-1", schedule))
    assert {schedule.state(second) for second in failures} == {2}
    assert np.mean([schedule.state(second) != 0 for second in causes]) > 0.9
    # two failures never overlap
    assert np.diff(np.sort(failures)).min() > 2 * 3600


def test_hours_of_failures_are_those_of_a_null_plant():
    def hours(null):
        starts = [far(plan(seed=seed, days=120, lag=30_000.0, null=null)[0])[1] for seed in range(4)]
        return np.histogram(np.concatenate(starts) % DAY, bins=6, range=(0, DAY))[0] / sum(map(len, starts))

    assert np.abs(hours(False) - hours(True)).max() < 0.13


def test_the_seed_draws_the_lag_from_minutes_to_weeks():
    lags = np.array([lag_of(PlantSettings(seed=seed, days=200)) for seed in range(300)])
    assert 600 <= lags.min() < 1200 and 14 * DAY < lags.max() <= 21 * DAY
    # log-uniform: as many below the geometric middle as above
    assert 0.4 < (lags < np.sqrt(600 * 21 * DAY)).mean() < 0.6
    assert lag_of(PlantSettings(lag=7200)) == 7200
