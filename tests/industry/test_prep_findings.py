"""What is wrong with a file is reported with its place, and nothing is reported of a file that is clean."""

from __future__ import annotations

import json
import random

import numpy as np
import polars as pl
import pytest
from helpers.plant_files import kinds, of_kind, read, rows, shared_file, stamps, values, write

from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.findings import Quality
from hf_sparse_attn.industry.preparation import text_blocks


def flagged(data, flag):
    return sorted({*rows(data).filter(pl.col("quality") & flag.value != 0)["line"].to_list()})


def wide(path, clock, columns=3):
    body = zip(clock, *(values(len(clock), seed) for seed in range(columns)), strict=True)
    return write(path, ["time,a,b,c", *(",".join(map(str, row)) for row in body)])


def long(path, clock, tags=("a", "b")):
    numbers = iter(values(len(clock) * len(tags)))
    return write(path, ["time,tag,value", *(f"{each},{tag},{next(numbers)}" for each in clock for tag in tags)])


@pytest.fixture(params=[16 << 20, 2000], ids=["one block", "many blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(text_blocks, "BLOCK", request.param)


@pytest.mark.parametrize("make", [wide, long])
@pytest.mark.parametrize("step", ["1s", "10m", "1h", "1d"])
def test_nothing_is_found_in_clean_data(make, step, tmp_path, block):
    data, findings = read(tmp_path, make(tmp_path / "a.csv", stamps(380, step=step)))
    assert not findings and (rows(data)["quality"] == 0).all()


def test_nothing_is_found_where_steps_vary_and_channels_take_turns(tmp_path, block):
    rng = np.random.default_rng(3)
    clock = np.cumsum(rng.exponential(90, 2000)) + 1_700_000_000
    lines = [f"{each:.3f},{'abc'[int(rng.integers(3))]},{each % 97:.2f}" for each in clock]
    data, findings = read(tmp_path, write(tmp_path / "a.csv", ["time,tag,value", *lines]))
    assert not findings and (rows(data)["quality"] == 0).all()


@pytest.mark.parametrize("make", [wide, long])
def test_every_row_that_occurs_twice_is_flagged_and_counted(make, tmp_path, block):
    path = make(tmp_path / "a.csv", stamps(500))
    lines = path.read_text().splitlines()
    chosen = {*random.Random(0).sample(range(1, len(lines)), len(lines) // 20)}
    doubled, copies = [], []
    for at, line in enumerate(lines):
        doubled.append(line)
        if at in chosen:
            doubled.append(line)
            copies.append(len(doubled))
    data, findings = read(tmp_path, write(path, doubled))
    assert kinds(findings) == ["duplicates"] and findings[0].count == len(copies)
    assert findings[0].lines == (copies[0], copies[-1]) and flagged(data, Quality.DUPLICATE) == copies


def test_a_block_that_is_sent_again_is_found_row_by_row(tmp_path, block):
    lines = wide(tmp_path / "a.csv", stamps(300)).read_text().splitlines()
    data, findings = read(tmp_path, write(tmp_path / "b.csv", [*lines, *lines[121:241]]))
    assert flagged(data, Quality.DUPLICATE) == list(range(302, 422))
    assert sorted(kinds(findings)) == ["backward_jump", "duplicates"]


def test_eight_of_eighty_rows_with_one_stamp_are_reported(tmp_path, block):
    clock = stamps(80)
    clock[40:48] = [clock[40]] * 8
    data, findings = read(tmp_path, wide(tmp_path / "a.csv", clock))
    assert [(each.kind, each.count, each.lines) for each in findings] == [("equal_stamps", 8, (42, 49))]
    assert flagged(data, Quality.EQUAL_STAMP) == list(range(42, 50))


def test_rows_that_run_backwards_stay_where_they_stand(tmp_path, block):
    clock = stamps(200)
    clock[100], clock[101] = clock[101], clock[100]
    data, findings = read(tmp_path, wide(tmp_path / "a.csv", clock))
    assert kinds(findings) == ["backward_jump"] and findings[0].lines == (103, 103)
    assert flagged(data, Quality.BACKWARD) == [103]
    assert rows(data)["line"].is_sorted() and not rows(data)["time"].is_sorted()


def test_many_jumps_are_told_in_a_few_findings_that_count_them_all(tmp_path):
    clock = stamps(1000)
    random.Random(1).shuffle(clock)
    data, findings = read(tmp_path, wide(tmp_path / "a.csv", clock))
    jumps = of_kind(findings, "backward_jump")
    assert len(jumps) <= 21 and sum(each.count for each in jumps) + sum(
        each.count for each in of_kind(findings, "zone_change")
    ) == len(flagged(data, Quality.BACKWARD))


def test_one_bad_line_in_many_is_reported_and_all_others_are_read(tmp_path):
    lines = wide(tmp_path / "a.csv", stamps(100_000, step="1s")).read_text().splitlines()
    lines[54_321] = lines[54_321][:9]
    data, findings = read(tmp_path, write(tmp_path / "b.csv", lines))
    assert [(each.kind, each.lines, each.values["found"]) for each in findings] == [
        ("bad_line", (54_322, 54_322), "1 fields where the others have 4")
    ]
    assert rows(data).height == 3 * 99_999


@pytest.mark.parametrize(
    ("line", "kind", "found"),
    [
        (b"2024-01-15 00:50:00,1,2\xff,3", "bad_line", "no utf-8"),
        (b"\0\0\0\0", "bad_line", "zero bytes"),
        (b"1,2,3,4,5,6", "bad_line", "6 fields"),
        (b"0000-00-00 00:00:00,1,2,3", "time_unreadable", "0000-00-00"),
        (b",1,2,3", "time_unreadable", "empty field"),
        (b"2024-02-30 00:00:00,1,2,3", "time_unreadable", "2024-02-30"),
        (b"Total: 99 rows", "bad_line", "1 fields"),
    ],
)
def test_what_is_bad_about_a_line_is_said(line, kind, found, tmp_path, block):
    path = wide(tmp_path / "a.csv", stamps(300))
    raw = path.read_bytes().replace(b"time,a", "time,Öl".encode()).split(b"\n")
    raw[51] = line
    path.write_bytes(b"\n".join(raw))
    data, findings = read(tmp_path, path)
    assert [(each.kind, each.lines) for each in findings] == [(kind, (52, 52))]
    assert found in findings[0].values["found"] and rows(data).height == 3 * 299


def test_too_many_bad_lines_end_the_reading_and_the_share_can_be_raised(tmp_path):
    lines = wide(tmp_path / "a.csv", stamps(900)).read_text().splitlines()
    lines[5::10] = ["---"] * len(lines[5::10])
    path = write(tmp_path / "b.csv", lines)
    with pytest.raises(PlantDataError, match=r"b\.csv, line 6: 90 of 901 lines.*--max-bad-share 0\.11"):
        read(tmp_path, path)
    _, findings = read(tmp_path, path, max_bad_share=0.11)
    assert sum(each.count for each in of_kind(findings, "bad_line")) == 90 and len(findings) == 21


@pytest.mark.parametrize(
    "word", ["Bad", "No Data", "I/O Timeout", "Digital State", "n/a", "-", "NaN", "inf", "#DIV/0!"]
)
def test_words_of_historians_are_no_numbers(word, tmp_path):
    path = long(tmp_path / "a.csv", stamps(100))
    lines = path.read_text().splitlines()
    lines[10] = f"{lines[10].rpartition(',')[0]},{word}"
    data, findings = read(tmp_path, write(path, lines))
    assert [(each.kind, each.lines, each.count) for each in findings] == [("no_number", (11, 11), 1)]
    row = rows(data).filter(pl.col("line") == 11)
    assert row["value"].to_list() == [None] and row["quality"].to_list() == [Quality.NO_NUMBER.value]


def test_empty_fields_of_a_wide_table_are_counted_and_are_no_readings(tmp_path):
    lines = ["time,a,b", *(f"{each},{at},{'' if at % 2 else at}" for at, each in enumerate(stamps(100)))]
    data, findings = read(tmp_path, write(tmp_path / "a.csv", lines))
    assert rows(data)["name"].value_counts().sort("name")["count"].to_list() == [100, 50] and not findings
    assert data.manifest.settings["reading"][0]["empty_fields"] == {"b": 50}


@pytest.mark.parametrize(
    ("field", "decimal", "value"),
    [
        ("1,5", ",", 1.5),
        ("1.234,5", ",", 1234.5),
        ("1,234.5", ".", 1234.5),
        ("12.5", ",", 12.5),
        ("1.234", ",", None),
        ("1,234", ".", None),
        ("1 234,5", ",", 1234.5),
        ("\u22125", ".", -5.0),
        (" 7 ", ".", 7.0),
        ("1e-3", ".", 0.001),
        ("+3", ",", 3.0),
        ("0x10", ".", None),
        ("", ".", None),
    ],
)
def test_a_number_is_read_by_the_mark_before_its_fraction(field, decimal, value):
    from hf_sparse_attn.industry.preparation.number_fields import number_of

    assert number_of(field, decimal) == value


def test_repeated_lines_of_a_log_are_flagged(tmp_path):
    lines = [f"{each} INFO pump {at}" for at, each in enumerate(stamps(200, form="%Y-%m-%dT%H:%M:%S.5Z"))]
    data, findings = read(tmp_path, write(tmp_path / "a.log", [*lines, lines[-1]]))
    assert [(each.kind, each.severity, each.lines) for each in findings] == [("duplicates", "warning", (201, 201))]
    assert data.events("a", in_order=False).collect()["quality"].to_list()[-1] == Quality.DUPLICATE.value


def test_a_changed_unit_that_the_file_names_is_reported(tmp_path):
    lines = [
        json.dumps({"time": each, "tag": "p", "value": at, "unit": "bar" if at < 60 else "kPa"})
        for at, each in enumerate(stamps(100))
    ]
    _, findings = read(tmp_path, write(tmp_path / "a.jsonl", lines))
    assert [(each.kind, each.channel, each.lines, dict(each.values)) for each in findings] == [
        ("unit_change", "p", (61, 61), {"from": "bar", "to": "kPa"})
    ]


def test_the_machine_temperature_of_nab_repeats_an_hour(tmp_path):
    data, findings = read(tmp_path, shared_file("nab/machine_temperature_system_failure.csv"))
    assert rows(data).height == 22_695
    assert [(each.kind, each.lines) for each in findings] == [("zone_change", (10_151, 10_151))]
    assert len(flagged(data, Quality.EQUAL_STAMP)) == 24
