"""Data faults of a generated plant: a plant with one fault differs from the same plant without it exactly where the
truth says.
"""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import polars as pl
import pytest

from hf_sparse_attn.industry.findings import KINDS
from hf_sparse_attn.industry.plant_generator.fault_kinds import FAULTS
from hf_sparse_attn.industry.plant_generator.plant_settings import PlantSettings
from hf_sparse_attn.industry.plant_generator.plant_writer import write_plant

SMALL = {"assets": 1, "start": "2024-10-19", "days": 16, "interval": 300, "channels": 7, "log_lines": 60, "pairs": 4}
# the first row of a stretch may be as it would be anyway
IN_PLACE = set(FAULTS) - {"gap", "duplicates", "backward_jump", "time_ambiguous", "empty_channel"}


def written(folder, **changes):
    truth = write_plant(folder, PlantSettings(**{**SMALL, **changes}), progress=False)
    texts = [path for path in folder.rglob("*.*") if path.suffix != ".parquet" and path.name != "truth.json"]
    return {path.name: path.read_text().splitlines() for path in texts}, truth


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return written(tmp_path_factory.mktemp("clean") / "p")[0]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Plants with one fault each, written when they are asked for."""
    known = {}

    def plant(kind):
        if kind not in known:
            known[kind] = written(tmp_path_factory.mktemp(kind) / "p", faults=[kind])
        files, truth = known[kind]
        (finding,) = (finding for finding in truth.findings if finding.kind == kind)
        return files, finding

    return plant


def name_of(finding):
    return finding.source.rpartition("/")[2]


def local(text):
    """An ISO time in UTC as the plant's clocks show it."""
    return datetime.fromisoformat(text).astimezone(ZoneInfo("Europe/Berlin")).replace(tzinfo=None)


def test_every_fault_is_a_kind_of_finding():
    assert set(FAULTS) <= set(KINDS)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_changes_one_file_and_no_other(kind, clean, faulty):
    files, finding = faulty(kind)
    changed = {name for name in files if files[name] != clean.get(name)}
    assert changed == {name_of(finding)} and files.keys() - clean.keys() <= changed


@pytest.mark.parametrize("kind", sorted(IN_PLACE))
def test_a_fault_in_place_changes_the_lines_that_the_truth_says(kind, clean, faulty):
    files, finding = faulty(kind)
    name = name_of(finding)
    assert len(files[name]) == len(clean[name])
    pairs = enumerate(zip(files[name], clean[name], strict=True), 1)
    changed = [number for number, (new, old) in pairs if new != old]
    first, last = finding.lines
    assert first <= changed[0] <= first + 1 and last - 1 <= changed[-1] <= last
    # a stuck or flat sensor may by chance record what it would have recorded anyway
    assert 0.7 * finding.count <= len(changed) <= finding.count


def test_a_gap_stands_between_its_two_lines(clean, faulty):
    files, finding = faulty("gap")
    new, old = files["historian.csv"], clean["historian.csv"]
    before, behind = finding.lines
    assert behind == before + 1 and finding.count == 10_800 // 300
    assert new == [*old[:before], *old[before + finding.count :]]
    stamps = [datetime.fromisoformat(new[line - 1].split(",")[0]) for line in finding.lines]
    assert stamps == [local(finding.start), local(finding.end)]
    assert (stamps[1] - stamps[0]).total_seconds() == 10_800 + 300


def test_duplicates_are_copies_of_the_rows_above_them(clean, faulty):
    files, finding = faulty("duplicates")
    new, old = files["process_data.csv"], clean["process_data.csv"]
    copies = [number for number, (line, above) in enumerate(zip(new[1:], new, strict=False), 2) if line == above]
    assert [line for line, above in zip(new, [None, *new], strict=False) if line != above] == old
    assert (len(copies), (copies[0], copies[-1])) == (finding.count, finding.lines)
    assert 0.04 < finding.count / len(old) < 0.06


def test_a_block_that_comes_late_makes_times_run_backwards_once(clean, faulty):
    files, finding = faulty("backward_jump")
    new, old = files["historian.csv"], clean["historian.csv"]
    stamps = [line.split(",")[0] for line in new[1:]]
    # the autumn night aside, in which local time runs backwards anyway
    jumps = [at + 3 for at, (a, b) in enumerate(pairwise(stamps)) if b < a and "10-27" not in b]
    assert jumps == [finding.lines[0]] and sorted(new) == sorted(old)
    first, last = finding.lines
    assert last - first + 1 == finding.count == 1200 // 300
    rows = [datetime.fromisoformat(new[line - 1].split(",")[0]) for line in finding.lines]
    assert rows == [local(finding.start), local(finding.end)]


def column(lines, channel):
    names = lines[0].split(",")
    (number,) = (at for at, name in enumerate(names) if name.split(" [")[0] == channel)
    return [line.split(",")[number] if line.count(",") >= number else None for line in lines[1:]]


def part(lines, finding):
    first, last = finding.lines
    return column(lines, finding.channel)[first - 2 : last - 1]


def test_a_stuck_sensor_repeats_the_value_at_its_start(clean, faulty):
    files, finding = faulty("stuck_sensor")
    values = part(files["historian.csv"], finding)
    assert set(values) == {part(clean["historian.csv"], finding)[0]} and len(values) == 6 * 3600 // 300


def test_a_flat_sensor_moves_a_fiftieth_of_what_it_did(clean, faulty):
    files, finding = faulty("flat_sensor")
    new, old = (pl.Series(part(lines["historian.csv"], finding)).cast(pl.Float64) for lines in (files, clean))
    assert new.max() - new.min() < 0.06 * (old.max() - old.min()) + 0.1 and old.std() > 10 * new.std()


def test_a_saturated_sensor_stays_on_its_limit(faulty):
    files, finding = faulty("saturated_sensor")
    assert {float(value) for value in part(files["historian.csv"], finding)} == {finding.values["limit"]}


def test_a_unit_changes_from_a_row_on(clean, faulty):
    files, finding = faulty("unit_change")
    factor, summand = {"°F": (1.8, 32), "kPa": (100, 0)}[finding.values["to"]]
    pairs = zip(part(files["historian.csv"], finding), part(clean["historian.csv"], finding), strict=True)
    assert all(abs(float(new) - float(old) * factor - summand) < 0.051 for new, old in pairs)
    assert f"{finding.channel} [{finding.values['from']}]" in files["historian.csv"][0]


def test_a_clock_that_is_ahead_shows_every_time_later(clean, faulty):
    files, finding = faulty("clock_offset")
    for new, old in zip(files["process_data.csv"][1:], clean["process_data.csv"][1:], strict=True):
        shown, true = (datetime.fromisoformat(line.split(",")[0]) for line in (new, old))
        assert shown - true == timedelta(seconds=37) and new.split(",")[1:] == old.split(",")[1:]
    assert finding.values == {"offset_s": 37.0}


def test_a_zone_changes_from_local_times_to_utc(clean, faulty):
    files, finding = faulty("zone_change")
    first = finding.lines[0]
    before, after = (datetime.fromisoformat(files["historian.csv"][at].split(",")[0]) for at in (first - 2, first - 1))
    assert (before - after).total_seconds() == finding.values["backward_s"] - 300
    assert after == datetime.fromisoformat(finding.start).replace(tzinfo=None)


def test_a_zone_can_change_from_utc_to_local_times(tmp_path):
    # the second asset's historian has UTC
    for seed in range(2):
        folder = tmp_path / str(seed)
        _, truth = written(folder, assets=2, seed=seed, faults=["zone_change"], log_lines=20)
        finding = next(finding for finding in truth.findings if finding.kind == "zone_change")
        assert finding.values["from"] == ("Europe/Berlin" if finding.asset == "press-1" else "UTC")
        # the clocks are set back after the change: where times are local from then on, an hour occurs twice
        folds = {finding.source for finding in truth.findings if finding.kind == "dst_fold"}
        assert ("raw/pump-2/historian.csv" in folds) == (finding.asset == "pump-2")
        assert ("raw/press-1/historian.csv" in folds) == (finding.asset == "pump-2")


def test_epochs_change_from_milliseconds_to_seconds(clean, faulty):
    files, finding = faulty("epoch_unit_change")
    for number, (new, old) in enumerate(zip(files["maintenance.jsonl"], clean["maintenance.jsonl"], strict=True), 1):
        stamps = json.loads(new)["ts"], json.loads(old)["ts"]
        assert stamps[0] == (stamps[1] // 1000 if number >= finding.lines[0] else stamps[1])


def test_dates_have_the_day_first(clean, faulty):
    files, _ = faulty("day_first_dates")
    for new, old in zip(files["historian.csv"][1:], clean["historian.csv"][1:], strict=True):
        assert datetime.strptime(new.split(",")[0], "%d/%m/%Y %H:%M:%S") == datetime.fromisoformat(old.split(",")[0])


def test_ambiguous_dates_can_all_be_read_in_both_ways(faulty):
    files, finding = faulty("time_ambiguous")
    stamps = [line.split(",")[0] for line in files["counter.csv"][1:]]
    # a record of 24-hour days ends at 23 o'clock where an hour came twice
    assert len(stamps) == finding.count == 24 * 3 - 1
    for form in ("%d/%m/%Y %H:%M:%S", "%m/%d/%Y %H:%M:%S"):
        assert all(datetime.strptime(stamp, form) for stamp in stamps)
    days = {datetime.strptime(stamp, "%d/%m/%Y %H:%M:%S").date().isoformat() for stamp in stamps}
    assert days == {"2024-11-01", "2024-11-02", "2024-11-03"}


def test_equal_stamps_stand_on_rows_of_different_values(faulty):
    files, finding = faulty("equal_stamps")
    first, last = finding.lines
    rows = files["historian.csv"][first - 1 : last]
    assert len(rows) == 8 == len(set(rows)) and len({row.split(",")[0] for row in rows}) == 1
    assert files["historian.csv"][last].split(",")[0] != rows[0].split(",")[0]


def test_a_bad_line_is_the_first_part_of_a_good_one(clean, faulty):
    files, finding = faulty("bad_line")
    number = finding.lines[0] - 1
    bad, good = files["historian.csv"][number], clean["historian.csv"][number]
    assert good.startswith(bad) and bad.count(",") < good.count(",")


def test_a_time_that_is_none_stands_in_a_whole_row(clean, faulty):
    files, finding = faulty("time_unreadable")
    new, old = (lines["historian.csv"][finding.lines[0] - 1].split(",") for lines in (files, clean))
    assert new == ["0000-00-00 00:00:00", *old[1:]]


def test_fields_without_a_number_are_empty_or_words(clean, faulty):
    files, finding = faulty("no_number")
    values = Counter(column(files["historian.csv"], finding.channel))
    words = {value: count for value, count in values.items() if value in ("", "n/a", "Bad", "-")}
    assert sum(words.values()) == finding.count and len(words) > 1
    assert 0.005 < finding.count / (len(files["historian.csv"]) - 1) < 0.02


def test_an_empty_channel_is_a_column_without_a_number(clean, faulty):
    files, finding = faulty("empty_channel")
    assert [line.rpartition(",")[::2] for line in files["historian.csv"][1:]] == [
        (line, "") for line in clean["historian.csv"][1:]
    ]
    assert files["historian.csv"][0].endswith(",spare") and finding.channel == "spare"


@pytest.mark.parametrize(("zone", "start"), [("Europe/Berlin", "2024-10-19"), ("America/New_York", "2024-10-25")])
def test_an_hour_that_occurs_twice_is_found_in_every_file_with_local_times(zone, start, tmp_path):
    files, truth = written(tmp_path / "p", zone=zone, start=start, log_lines=2000)
    folds = {finding.source.rpartition("/")[2]: finding for finding in truth.findings if finding.kind == "dst_fold"}
    assert set(folds) == {"historian.csv", "controller.log"}
    first, last = folds["historian.csv"].lines
    stamps = Counter(line.split(",")[0] for line in files["historian.csv"][1:])
    twice = [line.split(",")[0] for line in files["historian.csv"][first - 1 : last]]
    assert folds["historian.csv"].count == last - first + 1 == 24
    assert set(twice) == {stamp for stamp, count in stamps.items() if count == 2} and len(set(twice)) == 12


def test_a_record_without_such_an_hour_has_no_finding_at_all(tmp_path):
    for zone, start in (("Asia/Tokyo", "2024-10-19"), ("Europe/Berlin", "2024-03-20"), ("UTC", "2024-10-19")):
        files, truth = written(tmp_path / zone / start, zone=zone, start=start)
        stamps = [line.split(",")[0] for line in files["historian.csv"][1:]]
        assert truth.findings == [] and len(set(stamps)) == len(stamps) == 16 * 288


def test_faults_have_the_magnitude_that_is_asked_for(tmp_path):
    asked = {"gap": 3600, "duplicates": 0.2, "equal_stamps": 5, "bad_line": 3, "stuck_sensor": 7200}
    _, truth = written(tmp_path / "p", days=30, faults=asked)
    counts = Counter()
    for finding in truth.findings:
        counts[finding.kind] += finding.count
    assert (counts["gap"], counts["equal_stamps"], counts["bad_line"], counts["stuck_sensor"]) == (12, 5, 3, 24)
    assert 0.18 < counts["duplicates"] / (30 * 288 * 2) < 0.22


def test_faults_are_shared_out_over_assets_and_do_not_overlap(tmp_path):
    _, truth = written(tmp_path / "p", assets=1, days=60, faults="all")
    assert {finding.kind for finding in truth.findings} >= set(FAULTS)
    local = ("gap", "stuck_sensor", "flat_sensor", "saturated_sensor", "equal_stamps", "backward_jump", "bad_line")
    spans = sorted(
        (finding.lines[0] + (finding.kind == "gap"), finding.lines[1] - (finding.kind == "gap"))
        for finding in truth.findings
        if finding.kind in local
    )
    assert all(a[1] < b[0] for a, b in pairwise(spans))
