"""The generated plant: the same bytes by seed, and what was planted where the truth says it stands."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from datetime import datetime
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse_attn.industry.plant_generator.causal_links import plan_of
from hf_sparse_attn.industry.plant_generator.log_stream import LogStream
from hf_sparse_attn.industry.plant_generator.operating_schedule import schedule_of
from hf_sparse_attn.industry.plant_generator.plant_settings import DAY, PlantSettings
from hf_sparse_attn.industry.plant_generator.plant_truth import PlantTruth
from hf_sparse_attn.industry.plant_generator.plant_writer import write_plant
from hf_sparse_attn.industry.plant_generator.sensor_signals import Signals

SMALL = {"assets": 2, "start": "2024-10-14", "days": 21, "interval": 300, "channels": 6, "log_lines": 200}


def written(folder, **changes):
    chunk = changes.pop("chunk_days", None)
    write_plant(folder, PlantSettings(**{**SMALL, **changes}), chunk_days=chunk, progress=False)
    return folder


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def milliseconds(text):
    return round(datetime.fromisoformat(text).timestamp() * 1000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written(tmp_path_factory.mktemp("plant") / "p", faults="all", seed=5)


@pytest.fixture(scope="module")
def truth(folder):
    return PlantTruth.read(folder)


def lines_of(folder, name):
    return (folder / name).read_text().splitlines()


def log_lines(folder, asset):
    """(milliseconds, text) of every line of an asset's three logs."""
    for line in lines_of(folder, f"raw/{asset}/maintenance.jsonl"):
        values = json.loads(line)
        # from the change of unit on these are seconds
        yield values["ts"] * (1000 if values["ts"] < 1e11 else 1), values["message"]
    for line in lines_of(folder, f"raw/{asset}/gateway.otlp.json"):
        for record in json.loads(line)["resourceLogs"][0]["scopeLogs"][0]["logRecords"]:
            yield int(record["timeUnixNano"]) // 1_000_000, record["body"]["stringValue"]
    for line in lines_of(folder, f"raw/{asset}/controller.log"):
        if line.startswith("- "):  # BGL: UTC
            _, _, _, _, stamp, *_, text = line.split(" ", 8)
            yield milliseconds(datetime.strptime(stamp, "%Y-%m-%d-%H.%M.%S.%f").isoformat() + "Z"), text
        else:
            yield None, line.partition("] ")[2]


# -- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("days", [1, 4, 100])
def test_chunks_of_any_size_give_the_same_bytes(folder, tmp_path, days):
    assert digests(written(tmp_path / "p", faults="all", seed=5, chunk_days=days)) == digests(folder)


def test_another_process_with_other_hashes_and_threads_gives_the_same_bytes(folder, tmp_path):
    arguments = {**SMALL, "faults": "all", "seed": 5}
    code = (
        "from hf_sparse_attn.industry.plant_generator.plant_settings import PlantSettings\n"
        "from hf_sparse_attn.industry.plant_generator.plant_writer import write_plant\n"
        f"write_plant({str(tmp_path / 'p')!r}, PlantSettings(**{arguments!r}), progress=False)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "POLARS_MAX_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert digests(tmp_path / "p") == digests(folder)


def test_another_seed_gives_other_readings_lines_and_links(folder, tmp_path):
    other = digests(written(tmp_path / "p", faults="all", seed=6))
    mine = digests(folder)
    # of sources with faults of their own the names may differ
    assert all(mine[name] != other[name] for name in mine.keys() & other.keys())


@given(cuts=st.sets(st.integers(1, 5), max_size=5))
@settings(max_examples=8, deadline=None)
def test_readings_and_lines_do_not_depend_on_where_chunks_are_cut(cuts):
    chosen = PlantSettings(days=6, interval=600, log_lines=300, seed=2)
    schedule = schedule_of(chosen, "a")
    plan = plan_of(chosen, "a", schedule)
    edges = [0, *sorted(cuts), 6]

    def record(edges):
        signals, lines = Signals(chosen, "a", schedule, plan.excursions), LogStream(chosen, "a", schedule, plan.lines)
        spans = [(chosen.begin + a * DAY, chosen.begin + b * DAY) for a, b in pairwise(edges)]
        readings = [signals.chunk(*span) for span in spans]
        wide = {name: np.concatenate([part[1][name] for part in readings]) for name in readings[0][1]}
        long = [np.concatenate([part[at] for part in readings]) for at in (2, 3, 4)]
        return wide, long, pl.concat([lines.chunk(*span) for span in spans])

    (wide, long, lines), (whole_wide, whole_long, whole_lines) = record(edges), record([0, 6])
    assert all(np.array_equal(wide[name], whole_wide[name]) for name in whole_wide)
    assert all(np.array_equal(*pair) for pair in zip(long, whole_long, strict=True))
    assert lines.equals(whole_lines)


# -- the truth -------------------------------------------------------------------------------------------------------


def test_the_truth_is_read_as_it_was_written(folder, truth):
    again = PlantTruth(**{**truth.__dict__})
    assert again.to_dict() == json.loads((folder / "truth.json").read_text())


def test_sources_have_the_bytes_lines_and_digest_that_the_truth_says(folder, truth):
    found = digests(folder)
    for source in truth.sources:
        path = folder / source.path
        rows = pl.read_parquet(path).height if path.suffix == ".parquet" else path.read_bytes().count(b"\n")
        assert (found[source.path], path.stat().st_size, rows) == (source.sha256, source.bytes, source.lines)
    assert {source.path for source in truth.sources} | {"truth.json"} == found.keys()


def test_lines_of_causes_failures_and_look_alikes_stand_where_the_truth_says(folder, truth):
    checked = Counter()
    for event in [*truth.causes, *truth.failures, *truth.distractors]:
        patterns = [re.escape(text).replace(re.escape("<*>"), r"\S+") for text in event.templates]
        for place in (place for place in event.places if place.channel is None):
            first, last = place.lines
            text = re.compile("|".join(patterns))
            lines = lines_of(folder, place.file)[first - 1 : last]
            # an OpenTelemetry record has its text, then perhaps its template
            found = [text.findall(line.replace("<*>", "")) for line in lines]
            # a burst of background lines may say the same by chance, no less
            assert found[0] and found[-1] and sum(map(len, found)) >= place.count
            checked[event.kind] += 1
    assert set(checked) > {"valve", "seal", "overheating", "trip", "bearing noise", "valve look-alike"}


def test_no_line_of_a_cause_stands_anywhere_else(folder, truth):
    planted = Counter(cause.kind for cause in truth.causes)
    texts = [text for asset in truth.assets for _, text in log_lines(folder, asset)]
    assert sum("with part TYPE-B" in text for text in texts) == planted["valve"] > 3
    assert sum("batch K7" in text for text in texts) == planted["seal"] > 0


def test_records_of_opentelemetry_are_counted_through_its_lines(folder, truth):
    failure = next(f for f in truth.failures if any(place.records for place in f.places))
    place = next(place for place in failure.places if place.records)
    records = [
        record
        for line in lines_of(folder, place.file)
        for record in json.loads(line)["resourceLogs"][0]["scopeLogs"][0]["logRecords"]
    ]
    for number in place.records:
        moment = int(records[number - 1]["timeUnixNano"]) // 1_000_000
        assert milliseconds(failure.start) <= moment <= milliseconds(failure.start) + 1_300_000
        assert "alarm of" in records[number - 1]["body"]["stringValue"]


def test_lags_are_exact_and_near_the_lag_of_the_plant(truth):
    far = [(cause, failure) for cause, failure in truth.links() if failure.kind == "overheating"]
    assert len(far) >= truth.settings["assets"] * 10
    for cause, failure in far:
        assert milliseconds(failure.start) - milliseconds(cause.start) == round(1000 * cause.lag_s)
        # two and a half times the jitter, and what a second cause comes later
        assert abs(cause.lag_s / truth.lag_s - 1) < 2.5 * 0.03 + 0.055
    near = [cause.lag_s for cause, failure in truth.links() if failure.kind == "trip"]
    assert near and all(1200 <= lag <= 2400 for lag in near)


def test_causes_that_stand_in_for_each_other_share_a_failure(tmp_path):
    truth = PlantTruth.read(written(tmp_path / "p", assets=1, days=40, pairs=30, interval=3600, lag=3 * 3600))
    kinds = {cause.id: cause.kind for cause in truth.causes}
    sets = Counter(tuple(sorted(kinds[c] for c in f.causes)) for f in truth.failures if f.kind == "overheating")
    assert set(sets) == {("valve",), ("seal",), ("seal", "valve"), ("pressure dip",)}


def test_lines_between_cause_and_failure_are_counted(folder, truth):
    asset = truth.assets[1]  # its text log is in UTC
    times = np.sort([time for time, _ in log_lines(folder, asset)])
    # of the lines whose unit changed the milliseconds are lost
    tolerance = 3
    for cause, failure in truth.links():
        if cause.asset == asset:
            count = np.searchsorted(times, [milliseconds(cause.start), milliseconds(failure.start)])
            assert abs(int(count[1] - count[0]) - cause.lines_between) <= tolerance


def test_a_failure_shows_in_the_rows_of_its_sensor(tmp_path):
    folder = written(tmp_path / "p", assets=1, zone="UTC")
    table = pl.read_csv(folder / "raw/press-1/historian.csv")
    for failure in (f for f in PlantTruth.read(folder).failures if f.channel):
        place = next(place for place in failure.places if place.channel)
        first, last = place.lines  # line 2 is row 0
        times = table["timestamp"][first - 2], table["timestamp"][last - 2]
        stamps = [milliseconds(text + "+00:00") for text in times]
        assert milliseconds(failure.start) <= stamps[0] < milliseconds(failure.start) + 300_000
        assert milliseconds(failure.end) - 300_000 < stamps[1] <= milliseconds(failure.end)
        values = table[f"{failure.channel} [°C]"].to_numpy()
        assert values[first - 2 : last - 1].max() > np.median(values[first - 14 : first - 2]) + 5


def test_states_cover_the_record_and_the_log_says_each_change(folder, truth):
    for asset in truth.assets:
        states = [state for state in truth.states if state["asset"] == asset]
        assert (states[0]["start"], states[-1]["end"]) == (truth.begin, truth.end)
        assert all(a["end"] == b["start"] for a, b in pairwise(states))
        said = [text for _, text in log_lines(folder, asset) if "operating state changed to" in text]
        assert [text.rpartition(" to ")[2] for text in said] == [state["state"] for state in states]
    assert {state["state"] for state in truth.states} == {"idle", "start-up", "load", "maintenance"}


def test_logs_have_about_as_many_lines_as_asked_from_many_templates(tmp_path):
    folder = written(tmp_path / "p", log_lines=900, zone="UTC")
    for asset in PlantTruth.read(folder).assets:
        texts = [text for _, text in log_lines(folder, asset)]
        assert 0.9 < len(texts) / (900 * 21) < 1.15
        parameters = r"0x\w+|R\d\d-M\d-N\d|\bP\d+|\d[\d.]*|operator|shift-lead|service|scada"
        masked = {re.sub(parameters, "", text) for text in texts}
        assert 60 <= len(masked) <= 150


def test_two_systems_see_one_load_through_clocks_that_can_be_compared(tmp_path):
    folder = written(tmp_path / "p", assets=1, zone="UTC", interval=60, faults={"clock_offset": -110})
    wide = pl.read_csv(folder / "raw/press-1/historian.csv")
    long = pl.read_csv(folder / "raw/press-1/process_data.csv").filter(pl.col("tag") == "MOT.PWR")
    known = wide["timestamp"].str.to_datetime().dt.epoch("ms").to_numpy() / 1000
    shown = long["time"].str.to_datetime("%Y-%m-%dT%H:%M:%S%.fZ").dt.epoch("ms").to_numpy() / 1000
    grid = np.arange(known[0] + 600, known[-1] - 600, 10)
    steps = np.diff(np.interp(grid, known, wide["power [kW]"].to_numpy()))
    shifts = range(-300, 301, 10)
    scores = [
        np.corrcoef(steps, np.diff(np.interp(grid + shift, shown, long["value"].to_numpy())))[0, 1] for shift in shifts
    ]
    assert abs(shifts[int(np.argmax(scores))] + 110) <= 15
