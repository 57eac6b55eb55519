"""The verb prep: a whole folder or none, and an exit code that says how healthy the data is."""

from __future__ import annotations

import json

import pytest
from helpers.plant_files import stamps, values, write
from typer.testing import CliRunner

from hf_sparse_attn.cli.commands import app
from hf_sparse_attn.industry.dataset import PlantDataset
from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.preparation.prepare import refuse_other_folder


def table(path, count=400):
    return write(
        path, ["time,oil", *(f"{each},{value}" for each, value in zip(stamps(count), values(count), strict=True))]
    )


def prep(*arguments):
    return CliRunner().invoke(app, ["prep", *map(str, arguments)])


def test_a_folder_is_prepared_with_its_report_and_again_with_other_files(tmp_path):
    out = tmp_path / "out"
    done = prep(table(tmp_path / "press.csv"), "--out", out, "--json", tmp_path / "r.json", "--language", "ja")
    assert done.exit_code in (0, 1), done.output
    assert json.loads((tmp_path / "r.json").read_text())["status"] == done.exit_code
    assert {path.name for path in out.iterdir()} == {"assets", "dataset.json", "health.html", "health.json"}
    assert prep(table(tmp_path / "mill.csv"), "--out", out).exit_code == done.exit_code
    assert PlantDataset(out).manifest.assets == ["mill"] and [path.name for path in (out / "assets").iterdir()] == [
        "mill"
    ]


def test_what_cannot_be_read_leaves_an_earlier_folder_as_it_was(tmp_path):
    out = tmp_path / "out"
    prep(table(tmp_path / "press.csv"), "--out", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    bad = write(tmp_path / "bad.csv", ["nothing of use"])
    done = prep(tmp_path / "press.csv", bad, "--out", out)
    assert isinstance(done.exception, PlantDataError) and "bad.csv" in str(done.exception)
    assert {
        path: path.read_bytes() for path in out.rglob("*") if path.is_file() and ".parts" not in path.parts
    } == before


def test_a_folder_with_other_files_is_not_written_into(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(PlantDataError, match=r"holds 'letter\.txt' and no dataset\.json.*new folder"):
        refuse_other_folder(tmp_path)
    done = prep(tmp_path / "letter.txt", "--out", tmp_path)
    assert isinstance(done.exception, PlantDataError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--language", "fr"], "--language is 'fr'"),
        (["--asset", "press"], "--asset is 'press'"),
        (["--column", "=x"], "--column is '=x'"),
        (["--zone", "Nowhere"], "zone 'Nowhere'"),
        (["--form", "xls"], "form 'xls'"),
        (["--encoding", "klingon"], "encoding 'klingon'"),
        (["--max-bad-share", "2"], "max_bad_share is 2.0"),
    ],
)
def test_options_that_are_none_are_named(arguments, message, tmp_path):
    done = prep(table(tmp_path / "a.csv"), "--out", tmp_path / "out", *arguments)
    assert isinstance(done.exception, ValueError) and message in str(done.exception)


def test_what_is_analysed_can_be_set_and_a_field_that_there_is_not_is_refused(tmp_path):
    out, file = tmp_path / "out", table(tmp_path / "press.csv")
    prep(file, "--out", out, "--zone", "Asia/Tokyo", "--analysis", "context: 600, state_names: {idle: Ruhe}")
    settings = PlantDataset(out).manifest.settings
    assert settings["analysis"]["context"] == 600 and settings["analysis"]["state_names"] == {"idle": "Ruhe"}
    assert "Asia/Tokyo" in (out / "health.html").read_text()
    done = prep(file, "--out", out, "--analysis", "contxt: 600")
    assert isinstance(done.exception, ValueError) and "contxt" in str(done.exception)
