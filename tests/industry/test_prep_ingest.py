"""Which form a file has, which machine it is of, and that an interrupted call goes on; what is unclear is refused."""

from __future__ import annotations

import json

import polars as pl
import pytest
from helpers.plant_files import kinds, read, rows, stamps, times, values, write

from hf_sparse_attn.industry.dataset import EVENTS, READINGS
from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.preparation import ingest as ingest_module
from hf_sparse_attn.industry.preparation.ingest import ingest
from hf_sparse_attn.industry.preparation.ingest_settings import IngestSettings
from hf_sparse_attn.industry.preparation.part_files import safe_names


def wide(path, count=50, header="time,oil"):
    return write(path, [header, *(f"{each},{value}" for each, value in zip(stamps(count), values(count), strict=True))])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp932", "euc_jp", "utf-32"])
def test_japanese_names_are_read_in_any_encoding(encoding, tmp_path):
    head = "日時,軸受温度[℃],潤滑油圧力[MPa]"
    path = write(tmp_path / "a.csv", [head, *(f"{each},1.5,2" for each in stamps(60))], encoding)
    data, _ = read(tmp_path, path)
    assert [(each.name, each.unit) for each in data.manifest.channels] == [("軸受温度", "℃"), ("潤滑油圧力", "MPa")]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-8"])
def test_european_names_are_read_in_any_encoding(encoding, tmp_path):
    head = "Zeit;Öl-Temperatur [°C];Ventil größer (µm)"
    data, _ = read(tmp_path, write(tmp_path / "a.csv", [head, *(f"{each};1,5;2" for each in stamps(60))], encoding))
    assert [(each.name, each.unit) for each in data.manifest.channels] == [
        ("Öl-Temperatur", "°C"),
        ("Ventil größer", "µm"),
    ]


def test_an_encoding_that_cannot_be_told_is_asked_for(tmp_path):
    lines = ["время,давление масла", *(f"{each},1.5" for each in stamps(60))]
    path = write(tmp_path / "a.csv", lines, "cp1251")
    with pytest.raises(PlantDataError, match=r"a\.csv.*--encoding"):
        read(tmp_path, path)
    data, _ = read(tmp_path, path, encoding="cp1251", columns={"time": "время"})
    assert data.manifest.channels[0].name == "давление масла"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_in_any_way(end, tmp_path):
    path = wide(tmp_path / "a.csv")
    path.write_bytes(path.read_bytes().replace(b"\n", end.encode()))
    data, findings = read(tmp_path, path)
    assert rows(data)["line"].to_list() == list(range(2, 52)) and not findings


def test_the_last_line_needs_no_end_and_blank_lines_count(tmp_path):
    path = wide(tmp_path / "a.csv")
    path.write_text("\n\n" + path.read_text().rstrip() + "\n\n")
    data, findings = read(tmp_path, path)
    assert rows(data)["line"].to_list() == list(range(4, 54)) and not findings
    path.write_text(path.read_text().rstrip())
    assert rows(read(tmp_path, path)[0])["line"].to_list() == list(range(4, 54))


def test_a_table_without_a_header_has_numbered_columns(tmp_path):
    data, _ = read(tmp_path, write(tmp_path / "a.csv", [f"{each},{at}" for at, each in enumerate(stamps(50))]))
    assert data.manifest.channels[0].name == "column 2" and rows(data)["line"][0] == 1


def test_columns_of_a_long_table_without_names_are_told_by_what_they_hold(tmp_path):
    lines = [f"{each};{'ab'[at % 2]};{at},5;Good" for at, each in enumerate(stamps(60))]
    data, _ = read(tmp_path, write(tmp_path / "a.csv", lines))
    assert [each.name for each in data.manifest.channels] == ["a", "b"] and rows(data)["value"][2] == 2.5
    assert data.manifest.sources[0].form == "csv-long"


def test_a_preamble_with_as_many_fields_is_no_header(tmp_path):
    head = ["Report;Mill;North", "From;2024-01-15 00:00;", "Zeit;Druck;Temp"]
    data, findings = read(tmp_path, write(tmp_path / "a.csv", [*head, *(f"{each};1,5;2" for each in stamps(40))]))
    assert [each.name for each in data.manifest.channels] == ["Druck", "Temp"] and not findings


def test_a_column_of_states_beside_one_sensor_is_no_column_of_tags(tmp_path):
    lines = ["time,a,mode", *(f"{each},{at},{'RUN' if at % 2 else 'STOP'}" for at, each in enumerate(stamps(40)))]
    data, findings = read(tmp_path, write(tmp_path / "a.csv", lines))
    assert [each.name for each in data.manifest.channels] == ["a", "mode"]
    assert [(each.kind, each.channel, each.count) for each in findings] == [("no_number", "mode", 40)]
    lines = ["Horodatage;Repere;Mesure", *(f"{each};T{tag};{tag},5" for each in stamps(20) for tag in range(3))]
    data, _ = read(tmp_path, write(tmp_path / "b.csv", lines))
    assert [each.name for each in data.manifest.channels] == ["T0", "T1", "T2"]


def test_fields_that_come_up_later_in_json_are_channels(tmp_path):
    lines = [
        json.dumps({"ts": each, "oil": {"in": at}, **({"late": True} if at > 30 else {})})
        for at, each in enumerate(stamps(60))
    ]
    data, _ = read(tmp_path, write(tmp_path / "a.jsonl", lines))
    counts = dict(rows(data)["name"].value_counts().iter_rows())
    assert counts == {"oil.in": 60, "late": 29}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "is empty"),
        ("hello\nworld\n", "no form that is known: it starts with 'hello'"),
        ("a,b\n1,2\n3,4\n", "no form that is known"),
        ('{"a": 1}\n{"a": 2}\n', "no field with a time"),
        ('{"resourceLogs": [{"scope', "whole JSON|no form"),
        ("PAR1 and nothing else", "no whole Parquet"),
        (
            "start,end,a\n" + "2024-01-01 00:00:00,2024-01-01 00:01:00,1\n" * 9,
            "several columns of time stamps: start, end",
        ),
    ],
)
def test_what_is_unclear_is_refused_in_words_with_ways_on(content, what, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(content)
    with pytest.raises(PlantDataError, match=rf"(?s)a\.txt.*(?:{what}).*What you can do: \(1\).*\(2\).*\(3\)"):
        read(tmp_path, path)


def test_the_user_names_columns_and_form(tmp_path):
    lines = ["begin,end,v", *(f"{each},{each},{at}" for at, each in enumerate(stamps(40)))]
    path = write(tmp_path / "a.csv", lines)
    data, _ = read(tmp_path, path, columns={"time": "end"})
    assert [each.name for each in data.manifest.channels] == ["begin", "v"]
    with pytest.raises(PlantDataError, match=r"no column 'stop'.*'begin', 'end', 'v'"):
        read(tmp_path, path, columns={"time": "stop"})


def test_a_machine_is_named_by_a_glob_a_column_or_the_name_of_the_file(tmp_path):
    first, second = wide(tmp_path / "press_1.csv"), wide(tmp_path / "press_2.csv")
    data, _ = read(tmp_path, first, second)
    assert data.manifest.assets == ["press_1", "press_2"]
    data, _ = read(tmp_path, first, second, assets={"press": ("press_*.csv",)})
    assert data.manifest.assets == ["press"] and len(data.manifest.channels) == 1
    assert rows(data)["source"].value_counts()["count"].to_list() == [50, 50]
    lines = ["time,turbine,power", *(f"{each},T{at % 2},{at}" for at, each in enumerate(stamps(60)))]
    data, findings = read(tmp_path, write(tmp_path / "farm.csv", lines))
    assert data.manifest.assets == ["T0", "T1"] and data.manifest.sources[0].asset is None and not findings
    assert rows(data, "T1")["line"].to_list() == list(range(3, 62, 2))
    with pytest.raises(PlantDataError, match="asset 'mill' has no file"):
        read(tmp_path, first, assets={"mill": ("mill*.csv",)})


def test_folders_with_files_of_one_name_are_machines(tmp_path):
    for line in ("line1", "line2"):
        (tmp_path / line).mkdir()
        wide(tmp_path / line / "temps.csv")
    wide(tmp_path / "line2/speed.csv", header="time,speed")
    data, _ = read(tmp_path, tmp_path / "line*/*.csv")
    assert data.manifest.assets == ["line1", "line2"] and len(data.manifest.channels) == 3


def test_a_sensor_file_and_a_log_of_one_machine_stand_together(tmp_path):
    wide(tmp_path / "press.csv")
    write(tmp_path / "press.log", [f"{each} INFO start" for each in stamps(10)])
    data, _ = read(tmp_path, tmp_path / "press.csv", tmp_path / "press.log")
    assert data.manifest.assets == ["press"]
    assert data.readings("press").collect().schema == READINGS and data.events("press").collect().schema == EVENTS
    assert data.events("press").collect()["source"].to_list() == [1] * 10


def test_names_that_are_no_folders_become_some_and_stay_apart():
    names = ["Press 1", "press 1", "a/b", "a:b", "..", "CON", "油圧", "x" * 300, ""]
    folders = safe_names(names)
    assert folders["Press 1"] == "Press 1" and folders["油圧"] == "油圧" and folders["a/b"] == "a_b"
    assert len({each.casefold() for each in folders.values()}) == len(names)
    assert all(
        each not in (".", "..", "CON") and "/" not in each and len(each.encode()) <= 105 for each in folders.values()
    )


def test_files_that_were_read_before_a_kill_are_not_read_again(tmp_path, monkeypatch):
    paths = [str(wide(tmp_path / f"{name}.csv")) for name in "abc"]
    out = tmp_path / "out"
    opened, read_files = ingest_module.opened, []

    def counted(file, settings, scratch):
        read_files.append(file.path)
        if len(read_files) == 3 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return opened(file, settings, scratch)

    stopped = []
    monkeypatch.setattr(ingest_module, "opened", counted)
    with pytest.raises(KeyboardInterrupt):
        ingest(paths, out, IngestSettings())
    wide(tmp_path / "b.csv", 60)
    manifest, _ = ingest(paths, out, IngestSettings())
    assert read_files == [*paths, paths[1], paths[2]] and [each.lines for each in manifest.sources] == [51, 61, 51]
    assert not (out / ".parts").exists()


def test_channels_of_several_files_have_one_number_each(tmp_path):
    first = wide(tmp_path / "a.csv", header="time,oil")
    second = write(tmp_path / "b.csv", ["time,water,oil", *(f"{each},1,{at}" for at, each in enumerate(stamps(20)))])
    data, _ = read(tmp_path, first, second, assets={"press": ("a.csv", "b.csv")})
    assert [each.name for each in data.manifest.channels] == ["oil", "water"]
    of_second = rows(data).filter(pl.col("source") == 1)
    assert of_second["name"].to_list()[:2] == ["water", "oil"] and of_second["value"].to_list()[:4] == [1, 0, 1, 1]


def test_a_table_of_alarms_is_events(tmp_path):
    lines = [
        "Date;Time;Priority;Area;Description",
        *(f"{each};HIGH;Mill;Pump {at} trip" for at, each in enumerate(stamps(30, form="%d.%m.%Y;%H:%M:%S"))),
    ]
    data, findings = read(tmp_path, write(tmp_path / "alarms.csv", lines))
    event = data.events("alarms").collect().row(0, named=True)
    assert data.manifest.sources[0].form == "csv-events" and event["text"] == "Pump 0 trip" and event["level"] == "HIGH"
    assert kinds(findings) == ["day_first_dates"] and times(data)[0] == "2024-01-15T00:00:00"
