"""Every row of every format is found again in its line, and what stands there is the value that was stored."""

from __future__ import annotations

import csv
import gzip
import json
import random

import polars as pl
import pytest
import zstandard
from helpers.plant_files import read, rows, shared_file, stamps, values, write

from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.preparation import csv_fields, text_blocks
from hf_sparse_attn.industry.preparation.number_fields import number_of
from hf_sparse_attn.industry.preparation.provenance import locate, places, rows_of

COUNT = 1300
CHANNELS = ["oil", "bearing", "speed"]


def table(count=COUNT):
    return list(zip(stamps(count), *(values(count, seed) for seed in range(len(CHANNELS))), strict=True))


def wide(path):
    return write(path, [",".join(["time", *CHANNELS]), *(",".join(map(str, row)) for row in table())])


def german(path):
    """Preamble, quoted header, row of units, semicolons, decimal commas, an old encoding, Windows line ends."""
    head = ["Anlage: Prüfstand 3", "", '"Zeit";"Öl";"Lager 1";"Drehzahl"', ";°C;µm;1/min"]
    body = [";".join([row[0], *(str(each).replace(".", ",") for each in row[1:])]) for row in table()]
    return write(path, [*head, *body], "cp1252", "\r\n")


def japanese(path):
    head = "日時\t油温[℃]\t軸受\t回転数"
    return write(path, [head, *("\t".join(map(str, row)) for row in table())], "cp932", "\r\n")


def utf_16(path):
    return write(path, ["time\toil\tbearing\tspeed", *("\t".join(map(str, row)) for row in table())], "utf-16")


def quoted(path):
    """Notes over several lines, with separators and quotes in them, and blank lines between rows."""
    lines = ["time,tag,value,note"]
    for at, row in enumerate(table()):
        note = ['""', '"a, b"', '"two\nlines"', '"say ""stop"""', "plain", '"1\n\n3"'][at % 6]
        lines.append(f'"{row[0]}",press.oil,{row[1]},{note}')
        lines += [""] * (at % 7 == 0)
    return write(path, lines)


def long(path):
    lines = ["Timestamp;TagName;Value;Unit;Quality"]
    lines += [f"{row[0]};{CHANNELS[at % 3]};{row[1]};bar;Good" for at, row in enumerate(table())]
    return write(path, lines)


def csv_fields_of(separator, decimal=".", columns=None):
    def check(text, reading):
        fields = next(csv.reader([text], delimiter=separator))
        at = columns.index(reading["name"]) + 1 if columns else 2
        return number_of(fields[at], decimal) == reading["value"]

    return check


def json_value(text, reading):
    return float(json.loads(text)[reading["name"]]) == reading["value"]


def parquet_value(text, reading):
    held = json.loads(text)
    return held.get(reading["name"], held.get("value")) == reading["value"]


def sensor_lines(path):
    rows = [dict(zip(["time", *CHANNELS], row, strict=True)) for row in table()]
    return write(path, [json.dumps(row) for row in rows])


def sensor_array(path):
    rows = [dict(zip(["time", *CHANNELS], row, strict=True)) for row in table()]
    path.write_text(json.dumps(rows, indent=1))
    return path


def frame():
    return pl.DataFrame(table(), schema=["time", *CHANNELS], orient="row").with_columns(
        pl.col("time").str.to_datetime()
    )


def parquet_wide(path):
    frame().write_parquet(path, row_group_size=400)
    return path


def parquet_long(path):
    frame().unpivot(index="time", variable_name="tag").write_parquet(path)
    return path


def gzipped(path):
    plain = wide(path.with_suffix(""))
    path.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return path


def zstd(path):
    plain = sensor_lines(path.with_suffix(""))
    path.write_bytes(zstandard.compress(plain.read_bytes()))
    plain.unlink()
    return path


READINGS = {
    "wide.csv": (wide, csv_fields_of(",", columns=CHANNELS)),
    "german.csv": (german, csv_fields_of(";", ",", ["Öl", "Lager 1", "Drehzahl"])),
    "japanese.tsv": (japanese, csv_fields_of("\t", columns=["油温", "軸受", "回転数"])),
    "wide16.txt": (utf_16, csv_fields_of("\t", columns=CHANNELS)),
    "quoted.csv": (quoted, csv_fields_of(",")),
    "long.csv": (long, csv_fields_of(";")),
    "sensors.jsonl": (sensor_lines, json_value),
    "sensors.json": (sensor_array, json_value),
    "wide.parquet": (parquet_wide, parquet_value),
    "long.parquet": (parquet_long, parquet_value),
    "wide.csv.gz": (gzipped, csv_fields_of(",", columns=CHANNELS)),
    "sensors.jsonl.zst": (zstd, json_value),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks end within rows, so that a row is found again across them."""
    monkeypatch.setattr(text_blocks, "BLOCK", 3000)
    monkeypatch.setattr(text_blocks, "parts_of", lambda file, offset=0: _small(file))


def _small(file, size=1000):
    from hf_sparse_attn.data.file_check import chunks

    for part in chunks(file):
        yield from (part[at : at + size] for at in range(0, len(part), size))


@pytest.mark.parametrize("name", READINGS)
def test_a_thousand_random_readings_are_found_in_their_lines_with_their_values(name, tmp_path, small_blocks):
    make, holds = READINGS[name]
    path = make(tmp_path / name)
    data, findings = read(tmp_path, path)
    assert not findings
    stored = rows(data)
    assert stored.height == (COUNT if name in ("quoted.csv", "long.csv") else 3 * COUNT)
    chosen = random.Random(0).sample(range(stored.height), 1000)
    sample = stored[chosen]
    found = places(data, 0, sample["line"].to_list())
    assert all(place.line == line for place, line in zip(found, sample["line"], strict=True))
    assert all(holds(place.text, row) for place, row in zip(found, sample.iter_rows(named=True), strict=True))
    for row in chosen[:3]:
        place = locate(data, data.manifest.assets[0], "readings", row)
        assert (data.manifest.assets[0], "readings", row) in rows_of(data, place.file, place.line)


def syslog(path, count):
    return write(
        path, [f"{each} mill42 pump[7]: step {at}" for at, each in enumerate(stamps(count, form="%b %d %H:%M:%S"))]
    )


def structured(path, count):
    clock = stamps(count, form="%Y-%m-%dT%H:%M:%S.25+01:00")
    return write(path, [f'<165>1 {each} mill pump 8 - [a@1 b="\\]"] step {at}' for at, each in enumerate(clock)])


def labelled(path, count):
    clock = stamps(count, form="%s %Y.%m.%d R02 %Y-%m-%d-%H.%M.%S.675872")
    return write(
        path, [f"{'-' if at % 9 else 'KERNDTLB'} {each} R02 RAS KERNEL INFO step {at}" for at, each in enumerate(clock)]
    )


def traced(path, count):
    """Stack traces: their lines go on from the line above."""
    lines = []
    for at, each in enumerate(stamps(count, form="%Y-%m-%d %H:%M:%S,123")):
        lines.append(f"{each} ERROR [main] step {at}")
        lines += [f"    at frame {at}"] * (at % 5 == 0)
    return write(path, lines)


def log_records(path, count):
    return write(
        path, [json.dumps({"ts": each, "level": "info", "msg": f"step {at}"}) for at, each in enumerate(stamps(count))]
    )


def alarms(path, count):
    lines = [
        "Time,Severity,Source,Message",
        *(f'{each},HIGH,P1,"step {at}, held"' for at, each in enumerate(stamps(count))),
    ]
    return write(path, lines)


def otel(at):
    record = {
        "timeUnixNano": str(1_700_000_000_000_000_123 + at * 10**9),
        "severityNumber": 17,
        "body": {"stringValue": f"step {at}"},
        "attributes": [{"key": "log.record.template", "value": {"stringValue": "step <*>"}}],
    }
    service = [{"key": "service.name", "value": {"stringValue": "mill"}}]
    return {"resource": {"attributes": service}, "scopeLogs": [{"logRecords": [record]}]}


def otel_lines(path, count):
    return write(path, [json.dumps({"resourceLogs": [otel(at)]}) for at in range(count)])


def otel_whole(path, count):
    path.write_text(json.dumps({"resourceLogs": [otel(at) for at in range(count)]}, indent=2))
    return path


LOGS = {
    "syslog.log": syslog,
    "structured.log": structured,
    "labelled.log": labelled,
    "traced.log": traced,
    "records.jsonl": log_records,
    "alarms.csv": alarms,
    "otel.jsonl": otel_lines,
    "otel.json": otel_whole,
}


@pytest.mark.parametrize("name", LOGS)
def test_a_thousand_random_events_are_found_in_their_lines(name, tmp_path, small_blocks):
    path = LOGS[name](tmp_path / name, COUNT)
    data, findings = read(tmp_path, path, year=2024)
    assert not findings
    events = data.events(data.manifest.assets[0], in_order=False).collect()
    assert events.height == COUNT + (COUNT // 5 if name == "traced.log" else 0)
    sample = events[random.Random(1).sample(range(events.height), 1000)]
    found = places(data, 0, sample["line"].to_list())
    assert all(text.strip() in place.text for text, place in zip(sample["text"], found, strict=True))
    if name.startswith("otel"):
        assert events["template"].unique().to_list() == ["step <*>"] and events["origin"][0] == "mill"
        assert events["level"][0] == "ERROR"
        assert all(f'"{time}"' in place.text for time, place in zip(sample["time"].to_physical(), found, strict=True))


def test_a_file_that_is_gone_and_a_row_that_is_not_there_are_named(tmp_path):
    data, _ = read(tmp_path, path := wide(tmp_path / "a.csv"))
    with pytest.raises(PlantDataError, match="no row 99999"):
        locate(data, "a", "readings", 99999)
    with pytest.raises(PlantDataError, match=r"was not read from b\.csv"):
        rows_of(data, "b.csv", 1)
    path.unlink()
    with pytest.raises(PlantDataError, match="no longer"):
        locate(data, "a", "readings", 0)


def test_all_lines_of_bgl_are_read_with_their_labels(tmp_path):
    data, findings = read(tmp_path, shared_file("loghub/BGL_2k.log"))
    events = data.events("BGL_2k", in_order=False).collect()
    assert events.height == 2000 and events["label"].ne("-").sum() == 143 and not findings
    # 1117838570 is 22:42:50 UTC, the 15.42.50 of the line is Californian
    assert events["time"].dt.strftime("%FT%T%.f")[0] == "2005-06-03T22:42:50.675872"
    found = places(data, 0, events["line"].to_list())
    assert all(place.text.rstrip().endswith(text.rstrip()) for place, text in zip(found, events["text"], strict=True))


def test_a_quote_that_is_never_closed_costs_its_own_line_only(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_fields, "LONGEST", 20)
    lines = ["time,tag,value", *(f"{each},a,{at}" for at, each in enumerate(stamps(100)))]
    lines[50] = '2024-01-15 00:49:00,"a,49'
    data, findings = read(tmp_path, write(tmp_path / "a.csv", lines))
    assert rows(data)["line"].to_list() == [line for line in range(2, 102) if line != 51]
    assert [each.lines for each in findings] == [(51, 51)]
