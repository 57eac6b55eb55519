"""Clocks that are off are told by how much, those that cannot be compared are said to be so."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.tidy_folders import DAY, START, clean_plant, shifted

from hf_sparse_attn.industry.dataset import Source
from hf_sparse_attn.industry.preparation.channel_series import SECOND
from hf_sparse_attn.industry.preparation.clock_offsets import ClockOffset, ClockSignal, estimate_offset
from hf_sparse_attn.industry.preparation.source_clocks import SourceClock, SourceSpan, clock_findings, compare_clocks


def signals(sensors):
    return [ClockSignal(s.name, START + np.rint(s.seconds * SECOND).astype(np.int64), s.values) for s in sensors]


def parts(seed, interval, offset):
    plant = clean_plant(seed, days=7 if interval >= 60 else 2, interval=interval)
    reference = [s for s in plant.sensors if s.source == "sensors.csv"]
    return signals(reference), signals([shifted(s, offset) for s in plant.sensors if s.source != "sensors.csv"])


@pytest.mark.parametrize(("interval", "tolerance"), [(10.0, 2.0), (60.0, 15.0)])
@pytest.mark.parametrize("offset", [37.0, -37.0, 3600.0])
def test_an_offset_between_sensors_is_told_within_a_part_of_their_interval(interval, tolerance, offset):
    for seed in (0, 1):
        found = estimate_offset(*parts(seed, interval, offset), 43200.0)
        assert found is not None and found.z >= 6 and found.seconds == pytest.approx(offset, abs=tolerance)


def test_the_clock_of_a_log_is_compared_by_what_happens_in_the_sensors():
    plant = clean_plant(3, days=7)
    rng = np.random.default_rng(0)
    switched = plant.sensors[0].seconds[1:][np.diff(plant.sensors[0].values > 0)]
    times = np.sort(np.concatenate((switched - rng.uniform(0, 60, len(switched)), rng.uniform(0, 7 * DAY, 500)))) + 300
    found = estimate_offset(
        signals(plant.sensors[:3]), [ClockSignal("*", START + (times * SECOND).astype(np.int64), None)], 43200.0
    )
    assert found is not None and found.seconds == pytest.approx(300, abs=25)


@pytest.mark.parametrize("seed", range(5))
def test_sources_without_anything_in_common_are_not_verified(seed):
    mine, _ = parts(seed, 60.0, 0.0)
    _, theirs = parts(seed + 100, 60.0, 0.0)
    assert estimate_offset(mine, theirs, 43200.0) is None


def test_a_cycle_that_repeats_exactly_verifies_nothing():
    seconds = np.arange(0, 7 * DAY, 60.0)
    cycle = (seconds % 3600 < 1200).astype(float)
    signal = [ClockSignal("valve", START + (seconds * SECOND).astype(np.int64), cycle)]
    assert estimate_offset(signal, signal, 43200.0) is None


def test_findings_name_offset_reference_and_what_could_not_be_compared():
    sources = [Source(path, "csv-long", "00", 1, 1) for path in ("plc.csv", "scada.csv", "late.log")]
    clocks = [
        SourceClock("press", (1,), (0,), ClockOffset(36.8, 20.0, 10.0, ("a", "b"), 3, by_lines=False)),
        SourceClock("press", (2,), (0,), None),
    ]
    off, unverified = clock_findings(clocks, sources, False)
    assert (off.kind, off.severity, off.source) == ("clock_offset", "warning", "scada.csv")
    assert off.values["offset_s"] == 36.8 and off.values["reference"] == "plc.csv" and not off.values["corrected"]
    assert (unverified.kind, unverified.severity) == ("clock_unverified", "information")
    agreeing = SourceClock("press", (1,), (0,), ClockOffset(1.0, 20.0, 10.0, ("a", "b"), 3, by_lines=False))
    assert clock_findings([agreeing], sources, False) == []


def test_files_of_a_rotation_are_one_clock(tmp_path):
    spans = [SourceSpan(n, f"plc-2024-0{n + 1}.csv", 10, 0, n * 100, n * 100 + 99) for n in range(3)]
    assert compare_clocks("press", tmp_path, spans, 100.0) == []


def test_a_clock_that_was_set_in_between_has_two_offsets():
    """Two records of one signal: the second is 40 s ahead, and an hour more from the middle on."""
    rng = np.random.default_rng(3)
    steps, step = 4000, 10.0
    signal = np.cumsum(rng.normal(size=steps))
    times = (np.arange(steps) * step * 1e9).astype(np.int64)
    late = times + np.where(np.arange(steps) < steps // 2, 40, 3640) * 10**9
    one, two = ClockSignal("a", times, signal), ClockSignal("b", late, signal + rng.normal(scale=0.05, size=steps))
    offset = estimate_offset([one], [two], 7200.0)
    assert offset.before == pytest.approx(40, abs=step) and offset.seconds == pytest.approx(3640, abs=step)


def test_the_highest_of_many_chance_peaks_is_no_offset():
    """Lines at random times against sensors that jump: 36 pairs and 1440 lags, five times."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(5):
        times = (np.arange(3000) * 60e9).astype(np.int64)
        jumps = [rng.standard_t(2, size=3000).cumsum() for _ in range(6)]
        sensors = [ClockSignal(f"s{n}", times, values) for n, values in enumerate(jumps)]
        lines = [ClockSignal(f"l{n}", np.sort(rng.integers(0, times[-1], 40)), None) for n in range(6)]
        found += estimate_offset(sensors, lines, 43200.0) is not None
    assert found == 0
