"""Settings of a generated plant and folders for it: what cannot be is refused with what can, before anything is there;
the verb on the command line.
"""

from __future__ import annotations

import hashlib
import json

import pytest
from typer.testing import CliRunner

from hf_sparse_attn.cli.commands import app
from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.plant_generator import plant_writer
from hf_sparse_attn.industry.plant_generator.plant_settings import DAY, PlantSettings, PlantSettingsError
from hf_sparse_attn.industry.plant_generator.plant_truth import PlantTruth
from hf_sparse_attn.industry.plant_generator.plant_writer import write_plant

SMALL = {"assets": 2, "start": "2024-10-14", "days": 21, "interval": 300, "channels": 6, "log_lines": 200}


def written(folder, **changes):
    write_plant(folder, PlantSettings(**{**SMALL, **changes}), progress=False)
    return folder


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"days": 2}, "days is 2: must be a whole number from 3"),
        ({"days": "60"}, "days is '60'"),
        ({"assets": True}, "assets is True"),
        ({"seed": -1}, "seed is -1"),
        ({"interval": 7}, "interval is 7: must be .* divides a day"),
        ({"channels": 4}, "channels is 4"),
        ({"null": 1}, "null is 1: must be true or false"),
        ({"jitter": float("nan")}, "jitter is nan"),
        ({"lag": 59}, "lag is 59: must be a number from 60"),
        ({"start": "2.9.2024"}, "start is '2.9.2024': must be a date like"),
        ({"start": 2024}, "start is 2024"),
        ({"zone": "Moon/Crater"}, "zone is 'Moon/Crater': must be an IANA name"),
        ({"zone": "../etc"}, "zone is"),
        ({"faults": "gap"}, "faults is 'gap': must be all, a list"),
        ({"faults": ["nap"]}, "'nap' is none"),
        ({"faults": [["gap"]]}, r"\['gap'\] is none"),
        ({"faults": {"gap": 60}}, "gap a number from 240 to"),
        ({"faults": {"clock_offset": 0}}, "clock_offset a number other than 0"),
        ({"faults": {"duplicates": "many"}}, "duplicates a number from"),
        ({"faults": {"equal_stamps": 2.5}}, "equal_stamps a whole number from 2 to 80"),
        ({"faults": {"bad_line": float("nan")}}, "bad_line a whole number"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_what_can(change, words):
    with pytest.raises(PlantSettingsError, match=words):
        PlantSettings(**change)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pairs": 300}, "room for .* of 100 failures: give more days, fewer pairs"),
        ({"faults": {"gap": 20 * DAY}}, "gap, and its record has no quiet stretch .* give more days"),
        ({"faults": ["zone_change"], "zone": "UTC"}, "UTC has no offset from UTC"),
        ({"faults": {"duplicates": 1e-4}, "interval": 3600, "days": 7}, "duplicates is 0.0001, and raw/.* has no row"),
        ({"faults": ["time_ambiguous"], "start": "2024-10-14", "days": 10}, "no three days of the first twelve"),
    ],
)
def test_what_has_no_room_is_refused_and_nothing_is_written(changes, words, tmp_path):
    with pytest.raises(PlantSettingsError, match=words):
        written(tmp_path / "p", **changes)
    assert not list(tmp_path.rglob("*.*"))


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PlantDataError, match=r"something else than a generated plant.*another folder"):
        written(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_plant_is_written_over_by_the_same_settings_only(tmp_path):
    chosen = {"assets": 1, "days": 3, "interval": 3600}
    before = digests(written(tmp_path / "p", **chosen))
    (tmp_path / "p/raw/press-1/historian.csv").write_text("damaged")
    assert digests(written(tmp_path / "p", **chosen)) == before
    with pytest.raises(PlantDataError, match="a plant of other settings"):
        written(tmp_path / "p", **{**chosen, "days": 4})
    assert digests(tmp_path / "p") == before


def test_a_plant_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    def full(self, truth):
        raise OSError("no space left on device")

    monkeypatch.setattr(plant_writer.AssetWriter, "tell", full)
    with pytest.raises(OSError, match="no space"):
        written(tmp_path / "p", assets=1, days=3)
    assert not list((tmp_path / "p").rglob("*")) and [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_folder_without_a_plant_is_said_with_the_command_that_writes_one(tmp_path):
    with pytest.raises(PlantDataError, match="hf-sparse-attn synth FOLDER --plant"):
        PlantTruth.read(tmp_path)
    (tmp_path / "truth.json").write_text('{"format": 9}')
    with pytest.raises(PlantDataError, match="format 9"):
        PlantTruth.read(tmp_path)


# -- the verb --------------------------------------------------------------------------------------------------------


def synth(*arguments):
    return CliRunner().invoke(app, ["synth", *map(str, arguments)], catch_exceptions=False)


def test_the_verb_writes_the_plant_of_its_settings_and_seed(tmp_path):
    fields = "assets: 1, days: 10, interval: 600, faults: {gap: 7200, bad_line: null}, null: true"
    result = synth(tmp_path / "p", "--plant", "--set", fields, "--seed", 4, "--json", tmp_path / "r.json")
    assert "causes that lead to nothing" in " ".join(result.stderr.split())
    chosen = PlantSettings(seed=4, assets=1, days=10, interval=600, faults={"gap": 7200, "bad_line": 1}, null=True)
    write_plant(tmp_path / "q", chosen, progress=False)
    assert digests(tmp_path / "p") == digests(tmp_path / "q")
    values, truth = json.loads((tmp_path / "r.json").read_text()), PlantTruth.read(tmp_path / "p")
    assert (values["lines"], values["failures"], values["lag_s"]) == (truth.rows, len(truth.failures), truth.lag_s)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--learn"], "--learn is about LongLink sets"),
        (["--sparse", "block_size: 32"], "--sparse is about LongLink sets"),
        (["--learn", "--report", "r.html"], "--learn is about LongLink sets"),
        (["--set", "colour: 1"], "holds colour, which a plant has not: it has assets, start"),
        (["--set", "seed: 1"], "holds the seed: give it as --seed"),
        (["--set", "days: x"], "days is 'x'"),
        (["--seed", "-1"], "seed is -1"),
    ],
)
def test_options_that_make_no_sense_with_a_plant_are_refused_in_words(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        synth(tmp_path / "p", "--plant", *options)
    assert not list(tmp_path.rglob("*.*"))
