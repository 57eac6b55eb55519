"""Time stamps in all their spellings: zones, hours that occur twice, units of numbers, orders of dates."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import polars as pl
import pytest
from helpers.plant_files import kinds, of_kind, read, rows, stamps, times, values, write
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.findings import Quality
from hf_sparse_attn.industry.preparation import text_blocks
from hf_sparse_attn.industry.preparation.clock_times import StampReader
from hf_sparse_attn.industry.preparation.ingest_settings import IngestSettings

MOMENT = "2024-01-25T15:07:09"


def table(path, clock, header="time,oil", separator=","):
    return write(
        path, [header, *(f"{each}{separator}{value}" for each, value in zip(clock, values(len(clock)), strict=True))]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-01-25 15:07:09", MOMENT),
        ("2024-01-25T15:07:09.250Z", f"{MOMENT}.250"),
        ("2024-01-25T15:07:09,25+01:00", "2024-01-25T14:07:09.250"),
        ("2024-01-25 15:07:09 +0530", "2024-01-25T09:37:09"),
        ("2024-01-25 15:07:09 CET", "2024-01-25T14:07:09"),
        ("2024/1/25 15:07:09", MOMENT),
        ("25.01.2024 15:07:09", MOMENT),
        ("1/25/2024 3:07:09 PM", MOMENT),
        ("25-Jan-2024 15:07:09", MOMENT),
        ("25-JAN-24 03:07:09.000 PM", MOMENT),
        ("Jan 25, 2024 15:07:09", MOMENT),
        ("Thu Jan 25 15:07:09 2024", MOMENT),
        ("Thu, 25 Jan 2024 15:07:09 GMT", MOMENT),
        ("2024年1月25日 15時07分09秒", MOMENT),
        ("20240125T150709Z", MOMENT),
        ("20240125 150709", MOMENT),
        ("20240125150709", MOMENT),
        ("2024-01-25-15.07.09.000001", f"{MOMENT}.000001"),
        ("2024-01-24 24:00:00", "2024-01-25T00:00:00"),
        ("1706195229", MOMENT),
        ("1706195229.125", f"{MOMENT}.125"),
        ("1706195229125", f"{MOMENT}.125"),
        ("1706195229125001", f"{MOMENT}.125001"),
        ("1706195229125001002", f"{MOMENT}.125001002"),
        ("1.706195229E9", MOMENT),
        ("45316.6299652778", MOMENT),
        ("45316,6299652778", MOMENT),
        ("133506688290000000", MOMENT),
    ],
)
def test_a_stamp_is_read_however_it_is_written(text, expected):
    reader = StampReader("a.csv", IngestSettings())
    texts, lines = pl.Series([text] * 3), pl.Series([1, 2, 3])
    reader.survey(texts, lines)
    reader.decide()
    read_back = reader.read(texts, lines)["ns"].cast(pl.Datetime("ns")).dt.strftime("%Y-%m-%dT%H:%M:%S%.f")
    assert read_back.to_list() == [expected] * 3


@settings(max_examples=60, deadline=None)
@given(
    st.datetimes(datetime(1990, 1, 2), datetime(2090, 1, 1)),
    st.sampled_from(
        ["%Y-%m-%d %H:%M:%S", "%d.%m.%Y %H:%M:%S", "%m/%d/%Y %I:%M:%S %p", "%d-%b-%Y %H:%M:%S", "%Y%m%dT%H%M%S"]
    ),
)
def test_a_month_of_stamps_is_read_as_it_was_written(start, form):
    start = start.replace(microsecond=0)
    clock = [start + timedelta(hours=7 * at) for at in range(120)]
    texts, lines = pl.Series([each.strftime(form) for each in clock]), pl.Series(range(120))
    reader = StampReader("a.csv", IngestSettings())
    reader.survey(texts, lines)
    reader.decide()
    assert reader.read(texts, lines)["ns"].cast(pl.Datetime("ns")).to_list() == clock


def test_dates_with_the_day_first_are_told_by_one_day_above_twelve_and_reported(tmp_path):
    clock = stamps(400, "2024-01-01T00:00:00", "1h", "%d/%m/%Y %H:%M")
    data, findings = read(tmp_path, table(tmp_path / "a.csv", clock))
    assert times(data)[0] == "2024-01-01T00:00:00" and times(data)[-1] == "2024-01-17T15:00:00"
    assert kinds(findings) == ["day_first_dates"]


@pytest.mark.parametrize("form", ["%d/%m/%Y %H:%M", "%m-%d-%Y %H:%M", "%y.%m.%d %H:%M"])
def test_dates_that_can_be_read_in_two_orders_are_refused_with_the_options_that_decide(form, tmp_path):
    path = table(tmp_path / "a.csv", stamps(200, "2024-02-01T00:00:00", "1h", form))
    with pytest.raises(PlantDataError, match=r"a\.csv.*day or with the month first.*--day-first.*--month-first"):
        read(tmp_path, path)
    assert len(times(read(tmp_path, path, time_format=form)[0])) == 200


def test_two_digits_of_a_year_are_told_by_a_whole_month(tmp_path):
    data, _ = read(tmp_path, table(tmp_path / "a.csv", stamps(800, "2024-01-01T00:00:00", "1h", "%d/%m/%y %H:%M")))
    assert times(data)[-1] == "2024-02-03T07:00:00"


def test_the_user_says_whether_the_day_stands_first(tmp_path):
    path = table(tmp_path / "a.csv", stamps(48, "2024-02-01T00:00:00", "1h", "%d/%m/%Y %H:%M"))
    assert times(read(tmp_path, path, day_first=True)[0])[30] == "2024-02-02T06:00:00"
    assert times(read(tmp_path, path, day_first=False)[0])[30] == "2024-01-02T06:00:00".replace("01-02", "02-02")


def test_two_orders_in_one_file_are_refused_with_both_lines(tmp_path):
    clock = stamps(400, "2024-01-01T00:00:00", "2h", "%d/%m/%Y %H:%M")
    clock += stamps(400, "2024-02-10T00:00:00", "2h", "%m/%d/%Y %H:%M")
    with pytest.raises(PlantDataError, match=r"two orders: .*\(line \d+\).*\(line \d+\)"):
        read(tmp_path, table(tmp_path / "a.csv", clock))


def test_one_wrong_date_among_many_does_not_decide_the_order(tmp_path):
    clock = stamps(2000, "2024-01-01T00:00:00", "1h", "%d/%m/%Y %H:%M")
    clock[1000] = "02/25/2024 00:00"
    data, findings = read(tmp_path, table(tmp_path / "a.csv", clock))
    assert len(times(data)) == 1999
    assert [(each.kind, each.lines) for each in of_kind(findings, "time_unreadable")] == [
        ("time_unreadable", (1002, 1002))
    ]


def berlin(first, last, step):
    """Local clock of Berlin, and the true times."""
    zone, now, local, true = ZoneInfo("Europe/Berlin"), first, [], []
    while now <= last:
        local.append(now.astimezone(zone).strftime("%Y-%m-%d %H:%M:%S"))
        true.append(now.strftime("%Y-%m-%dT%H:%M:%S"))
        now += step
    return local, true


FOLD = datetime.fromisoformat("2024-10-26T20:00:00Z"), datetime.fromisoformat("2024-10-27T06:00:00Z")


@pytest.mark.parametrize("minutes", [1, 7, 10, 15, 30, 60])
@pytest.mark.parametrize("block", [16 << 20, 700])
def test_an_hour_that_occurs_twice_is_resolved_by_the_order_of_rows(minutes, block, tmp_path, monkeypatch):
    monkeypatch.setattr(text_blocks, "BLOCK", block)
    local, true = berlin(*FOLD, timedelta(minutes=minutes))
    data, findings = read(tmp_path, table(tmp_path / "a.csv", local), zone="Europe/Berlin")
    assert times(data) == true
    assert kinds(findings) == ["dst_fold"] and findings[0].severity == "information"
    twice = [at for at, each in enumerate(local, 2) if each.startswith("2024-10-27 02")]
    assert findings[0].lines == (twice[0], twice[-1]) and findings[0].count == len(twice)
    flagged = rows(data).filter(pl.col("quality") & Quality.AMBIGUOUS_TIME.value != 0)["line"].to_list()
    assert flagged == twice


def test_each_channel_of_a_long_table_has_its_own_fold(tmp_path):
    local, true = berlin(*FOLD, timedelta(minutes=10))
    lines = [
        "time,tag,value",
        *(f"{each},a,{at}" for at, each in enumerate(local)),
        *(f"{each},b,{at}" for at, each in enumerate(local)),
    ]
    data, findings = read(tmp_path, write(tmp_path / "a.csv", lines), zone="Europe/Berlin")
    assert times(data) == [*true, *true] and kinds(findings) == ["dst_fold"]


def test_a_fold_without_a_jump_is_flagged_and_said_not_to_be_resolved(tmp_path):
    local, _ = berlin(*FOLD, timedelta(minutes=10))
    once = sorted({*local})
    data, findings = read(tmp_path, table(tmp_path / "a.csv", once), zone="Europe/Berlin")
    assert [(each.kind, each.severity, each.values["resolved_by_order"]) for each in findings] == [
        ("dst_fold", "warning", False)
    ]
    assert (rows(data)["quality"] == Quality.AMBIGUOUS_TIME.value).sum() == 6


def test_a_jump_of_one_hour_where_some_zone_folds_is_named_although_no_zone_was_given(tmp_path):
    local, _ = berlin(*FOLD, timedelta(minutes=10))
    _, findings = read(tmp_path, table(tmp_path / "a.csv", local))
    assert "dst_fold" in kinds(findings) and "backward_jump" not in kinds(findings)
    assert of_kind(findings, "dst_fold")[0].values["back_s"] == 3000


def test_times_that_do_not_exist_are_kept_and_reported(tmp_path):
    clock = stamps(100, "2024-03-30T22:00:00", "10m")
    data, findings = read(tmp_path, table(tmp_path / "a.csv", clock), zone="Europe/Berlin")
    gap = of_kind(findings, "dst_gap")[0]
    assert gap.count == 6 and gap.lines == (26, 31) and len(times(data)) == 100


def test_offsets_that_follow_summer_time_are_no_change_of_zone_and_others_are(tmp_path):
    local, true = berlin(*FOLD, timedelta(minutes=10))
    zoned = [f"{each}{'+02:00' if at < len(local) // 2 - 11 else '+01:00'}" for at, each in enumerate(local)]
    switch = next(at for at, each in enumerate(true) if each >= "2024-10-27T01:00:00")
    zoned = [f"{each}{'+02:00' if at < switch else '+01:00'}" for at, each in enumerate(local)]
    data, findings = read(tmp_path, table(tmp_path / "a.csv", zoned))
    assert times(data) == true and not findings
    clock = stamps(60, form="%Y-%m-%dT%H:%M:%S+09:00") + stamps(60, "2024-01-14T16:00:00", form="%Y-%m-%dT%H:%M:%SZ")
    _, findings = read(tmp_path, table(tmp_path / "b.csv", clock))
    changed = of_kind(findings, "zone_change")[0]
    assert changed.lines == (62, 62) and changed.values == {"from": "+09:00", "to": "Z"}


def test_a_clock_that_is_set_to_another_zone_is_found_by_its_jump(tmp_path):
    clock = stamps(600, "2024-01-15T09:00:00") + stamps(900, "2024-01-15T10:00:00")
    _, findings = read(tmp_path, table(tmp_path / "a.csv", clock), zone="Asia/Tokyo")
    changed = of_kind(findings, "zone_change")
    assert [each.lines for each in changed] == [(602, 602)] and changed[0].values["hours"] == -9


def test_a_block_that_comes_late_is_no_change_of_zone(tmp_path):
    clock = stamps(600)
    clock = [*clock[:100], *clock[160:220], *clock[100:160], *clock[220:]]
    _, findings = read(tmp_path, table(tmp_path / "a.csv", clock))
    assert kinds(findings) == ["backward_jump"] and findings[0].lines == (162, 162)
    assert findings[0].values["back_s"] == 119 * 60


def test_a_changed_unit_of_numeric_stamps_is_read_and_reported(tmp_path):
    clock = [str(1_700_000_000_000 + 1000 * at) for at in range(50)] + [str(1_700_000_050 + at) for at in range(50)]
    data, findings = read(tmp_path, table(tmp_path / "a.csv", clock))
    assert times(data)[49:51] == ["2023-11-14T22:14:09", "2023-11-14T22:14:10"]
    assert [(each.kind, each.lines, dict(each.values)) for each in findings] == [
        ("epoch_unit_change", (52, 52), {"from": "epoch-ms", "to": "epoch-s"})
    ]


@pytest.mark.parametrize(
    ("number", "units"), [("638396644290000000", "epoch-ns.*ticks"), ("2024012515", "epoch-s.*compact")]
)
def test_a_number_that_two_units_read_is_asked_for(number, units, tmp_path):
    path = table(tmp_path / "a.csv", [number] * 5)
    with pytest.raises(PlantDataError, match=f"a.csv, line 2: .*{units}.*--time-format"):
        read(tmp_path, path)
    unit = units.rpartition("*")[2]
    assert times(read(tmp_path, path, time_format=unit)[0])[0].startswith("2024-01-")


@pytest.mark.parametrize("form", ["%d.%m.%Y;%H:%M:%S", "%Y%m%d;%H:%M:%S", "%m/%d/%Y;%I:%M:%S %p"])
def test_date_and_time_in_two_columns_are_one_stamp(form, tmp_path):
    clock = stamps(50, form=form)
    path = table(tmp_path / "a.csv", clock, "Datum;Uhrzeit;Druck [bar]", ";")
    data, _ = read(tmp_path, path)
    assert times(data)[1] == "2024-01-15T00:01:00" and data.manifest.channels[0].unit == "bar"


def test_a_log_without_years_takes_them_from_the_file_and_goes_on_at_new_year(tmp_path):
    clock = stamps(2000, "2023-12-25T00:00:00", "10m", "%b %d %H:%M:%S")
    path = write(tmp_path / "a.log", [f"{each} mill pump: step" for each in clock])
    os.utime(path, (datetime(2024, 1, 9).timestamp(),) * 2)
    data, findings = read(tmp_path, path)
    assert times(data)[0] == "2023-12-25T00:00:00" and times(data)[-1] == "2024-01-07T21:10:00"
    assert not of_kind(findings, "backward_jump")
    assert times(read(tmp_path, path, year=2019)[0])[-1].startswith("2020-01-07")


def test_a_leap_day_without_a_year_is_read(tmp_path):
    clock = stamps(300, "2024-02-28T00:00:00", "10m", "%b %e %H:%M:%S")
    path = write(tmp_path / "a.log", [f"{each} mill pump: step" for each in clock])
    assert times(read(tmp_path, path, year=2024)[0])[200] == "2024-02-29T09:20:00"


def test_a_zone_that_is_none_is_refused():
    with pytest.raises(PlantDataError, match="Europe/Berlin"):
        IngestSettings(zone="Mars/Olympus")
