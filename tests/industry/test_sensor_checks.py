"""Faults of sensors are found where they were planted, and a machine that is switched on and off has none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.tidy_folders import DAY, START, changed, clean_plant, flat, on_off, saturated, stuck, without

from hf_sparse_attn.industry.dataset import Source
from hf_sparse_attn.industry.findings import Quality
from hf_sparse_attn.industry.preparation.asset_grid import AssetGrid
from hf_sparse_attn.industry.preparation.channel_series import SECOND, ChannelSeries, quantum
from hf_sparse_attn.industry.preparation.operating_states import find_states
from hf_sparse_attn.industry.preparation.sampling_gaps import find_gaps
from hf_sparse_attn.industry.preparation.sensor_checks import check_sampling, check_values
from hf_sparse_attn.industry.preparation.unit_changes import find_unit_changes, first_unit

SOURCES = [Source("a.csv", "csv-long", "00", 1, 1)]
NAMES = ("current", "oil temperature", "pressure", "vibration", "room temperature")


def series(sensor, number=0):
    count = len(sensor.values)
    times = START + np.rint(sensor.seconds * SECOND).astype(np.int64)
    return ChannelSeries(
        "press",
        sensor.name,
        number,
        times,
        sensor.values.astype(float),
        np.arange(count),
        np.zeros(count, np.uint16),
        np.arange(2, count + 2, dtype=np.uint64),
    )


def checked(plant):
    """What is found in the values of every channel of a plant, by name."""
    channels = [series(sensor, number) for number, sensor in enumerate(plant.sensors)]
    grid = AssetGrid.over(int(channels[0].times[0]), int(channels[0].times[-1]), 60.0)
    for channel in channels:
        grid.add(channel)
    states = find_states(grid)
    return {channel.name: check_values(channel, SOURCES, states.at(channel.times), grid) for channel in channels}


def times_of(*seconds):
    return START + (np.concatenate(seconds) * SECOND).astype(np.int64)


@pytest.mark.parametrize("interval", [1.0, 60.0, 3600.0])
def test_a_gap_of_three_hours_is_found_in_regular_readings(interval):
    seconds = np.arange(0, 2000 * interval + 6 * 3600, interval)
    kept = (seconds < 1000 * interval) | (seconds >= 1000 * interval + 3 * 3600)
    gaps = find_gaps(times_of(seconds[kept]))
    assert gaps.regular and gaps.after.tolist() == [1000]
    assert gaps.seconds[0] == pytest.approx(3 * 3600 + interval) and gaps.usual[0] == interval


@pytest.mark.parametrize("seed", range(5))
def test_jitter_and_single_lost_readings_are_no_gaps(seed):
    rng = np.random.default_rng(seed)
    seconds = (np.arange(40_000) + rng.uniform(-0.2, 0.2, 40_000)) * 60
    assert len(find_gaps(times_of(seconds[rng.random(40_000) > 0.01])).after) == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_channel_that_reports_on_change_has_no_gaps_at_night_and_its_long_silence_only_informs(seed):
    rng = np.random.default_rng(seed)
    random = np.cumsum(rng.exponential(60, 30_000))
    assert len(find_gaps(times_of(random)).after) == 0
    by_day = random[(random % DAY > 6 * 3600) & (random % DAY < 20 * 3600)]
    assert len(find_gaps(times_of(by_day)).after) == 0
    silent = times_of(random[(random < 5 * DAY) | (random > 5.5 * DAY)])
    gaps = find_gaps(silent)
    assert not gaps.regular and len(gaps.after) == 1
    sensor = without(clean_plant(0, days=1).sensors[0], 0, 0)
    sensor = replace(sensor, seconds=(silent - START) / SECOND, values=np.arange(len(silent), dtype=float))
    assert [f.severity for f in check_sampling(series(sensor), SOURCES, int(silent[-1])).findings] == ["information"]


def test_a_change_of_the_sampling_rate_is_no_row_of_gaps():
    seconds = np.concatenate((np.arange(0, 10 * DAY, 10.0), np.arange(10 * DAY, 20 * DAY, 300.0)))
    assert len(find_gaps(times_of(seconds)).after) <= 1


def test_a_sensor_that_falls_silent_before_the_others_has_a_gap_until_the_end():
    sensor = clean_plant(1, days=3).sensors[0]
    short = replace(sensor, seconds=sensor.seconds[:2000], values=sensor.values[:2000])
    faults = check_sampling(series(short), SOURCES, START + int(sensor.seconds[-1]) * SECOND)
    assert [(f.kind, f.severity, f.values["at_end"]) for f in faults.findings] == [("gap", "warning", True)]


@pytest.mark.parametrize("seed", range(2))
def test_a_machine_that_is_switched_has_no_faults(seed):
    plant = clean_plant(seed, days=20)
    assert [f for faults in checked(plant).values() for f in faults.findings] == []
    assert [find_unit_changes(sensor.values) for sensor in plant.sensors] == [[]] * 5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("kind", "flag", "fault", "seconds"),
    [
        ("stuck_sensor", Quality.STUCK, stuck, 6 * 3600),
        ("flat_sensor", Quality.FLAT, flat, DAY / 2),
        ("saturated_sensor", Quality.SATURATED, saturated, 4 * DAY),
    ],
    ids=["stuck", "flat", "saturated"],
)
def test_a_planted_fault_is_found_and_flagged_where_it_is(name, kind, flag, fault, seconds):
    plant = clean_plant(NAMES.index(name), days=14)
    number, start = NAMES.index(name), 6.3 * DAY
    plant.sensors[number] = fault(plant.sensors[number], start, seconds)
    faults = checked(plant)
    assert {other for other in NAMES if faults[other].findings} == {name}
    assert {finding.kind for finding in faults[name].findings} == {kind}
    flagged = plant.sensors[number].seconds[(faults[name].flags & int(flag)) > 0]
    assert len(flagged) and start - 3600 <= flagged.min() and flagged.max() <= start + seconds + 3600


def test_all_sensors_frozen_at_once_by_their_gateway_are_stuck():
    plant = clean_plant(4, days=14)
    on = plant.sensors[0].values > 0
    start = plant.sensors[0].seconds[np.flatnonzero(on & (plant.sensors[0].seconds > 5 * DAY))[20]]
    plant.sensors = [stuck(sensor, start, 12 * 3600) for sensor in plant.sensors]
    kinds = {name: {f.kind for f in faults.findings} for name, faults in checked(plant).items()}
    assert sum("stuck_sensor" in found for found in kinds.values()) >= 3, kinds


def test_a_setpoint_a_switch_and_a_counter_that_rests_are_not_stuck():
    rng = np.random.default_rng(0)
    plant = clean_plant(0, days=14)
    seconds = plant.sensors[0].seconds
    on = plant.sensors[0].values > 0
    held = np.repeat(rng.integers(20, 90, 14), len(seconds) // 14).astype(float)
    counter = np.cumsum(on * rng.integers(1, 4, len(seconds))).astype(float)
    for name, values in (("setpoint", held), ("switch", on.astype(float)), ("counter", counter)):
        plant.sensors.append(replace(plant.sensors[0], name=name, values=values))
    faults = checked(plant)
    assert [f for name in ("setpoint", "switch", "counter") for f in faults[name].findings] == []


CHANGES = [
    ("oil temperature", "°C", "°F", lambda v: np.round(1.8 * v + 32, 2)),
    ("room temperature", "°C", "K", lambda v: np.round(v + 273.15, 2)),
    ("pressure", "bar", "kPa", lambda v: 100 * v),
    ("pressure", "bar", "psi", lambda v: np.round(14.503774 * v, 2)),
    ("current", "k", "1", lambda v: 1000 * v),
    ("current", "1", "k", lambda v: v / 1000),
    ("oil temperature", "+", "-", lambda v: -v),
]


@pytest.mark.parametrize(("name", "old", "new", "convert"), CHANGES, ids=[f"{o} to {n}" for _, o, n, _ in CHANGES])
def test_a_change_of_unit_is_told_with_both_units_and_can_be_undone(name, old, new, convert):
    clean = clean_plant(6, days=14).sensors[NAMES.index(name)]
    running = clean_plant(6, days=14).sensors[0].values > 0
    steady = np.flatnonzero(np.convolve(running, np.ones(121), "same") == 121)  # not switched within an hour
    start = clean.seconds[steady[len(steady) // 2]]
    values = changed(clean, start, 99 * DAY, convert).values
    changes = find_unit_changes(values)
    assert [(change.conversion.old, change.conversion.new) for change in changes] == [(old, new)]
    assert abs(changes[0].stretch.start - int(start / 60)) <= 2
    assert np.abs(first_unit(values, changes) - clean.values).max() < 0.02 * np.ptp(clean.values)


def test_a_unit_that_comes_and_goes_is_one_stretch():
    clean = clean_plant(7, days=14).sensors[4]
    values = changed(clean, 5 * DAY, 2 * DAY, lambda v: 1.8 * v + 32).values
    stretches = [change.stretch for change in find_unit_changes(values)]
    assert [(s.start // 1440, s.stop // 1440) for s in stretches] == [(5, 7)]


@pytest.mark.parametrize("seed", range(10))
def test_a_process_that_jumps_in_level_alone_changes_no_unit(seed):
    rng = np.random.default_rng(seed)
    level = 20 + 40 * on_off(rng, np.arange(20_000) * 60.0, 20 * 3600, 10 * 3600)
    assert find_unit_changes(level + rng.normal(size=20_000)) == []


@pytest.mark.parametrize(("values", "step"), [(np.arange(50) * 0.25, 0.25), (np.random.default_rng(0).random(500), 0)])
def test_the_resolution_of_rounded_values_is_known(values, step):
    assert quantum(values) == pytest.approx(step)
