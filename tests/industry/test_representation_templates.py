"""Templates are mined once, frozen, and saved as they are; parameters of lines become bins."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from helpers.event_folders import log_lines
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_attn.industry.dataset import EVENTS
from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.representation.log_parameters import BinSettings, ParameterBins, Slot
from hf_sparse_attn.industry.representation.log_templates import (
    UNKNOWN,
    Match,
    MinerSettings,
    TemplateMiner,
    masked,
)


def lines(*texts, templates=None):
    return pl.DataFrame(
        {"text": texts, "template": templates or [None] * len(texts)}, schema={"text": pl.String, "template": pl.String}
    )


def templates(miner):
    return [template.text for template in miner.templates]


PLANT = pl.DataFrame(log_lines(400), schema=EVENTS, orient="row")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CE sym 2, at 0x0b85eee0, mask 0x05", "CE sym <*>, at <*>, mask <*>"),
        ("to 172.16.96.116:33569 failed", "to <*> failed"),
        ("node R02-M1-N0-C:J12-U11 up since 2005-06-03-15.42.50", "node <*> up since <*>"),
        ("opened /var/log/a.log twice", "opened <*> twice"),
        ("read/write/exec double-hummer", "read/write/exec double-hummer"),
        ("x=-3.5,y=2 -7", "x=<*>,y=<*> <*>"),
        ("温度-5℃ ３.５MPa", "温度 <*>℃ <*>MPa"),
        ("安全装置がポンプ3号機で作動", "安全 装置 が ポンプ <*> 号機 で 作動"),
        ("a literal <*> stays one", "a literal <*> stays one"),
        ("", ""),
    ],
)
def test_what_varies_is_masked_and_scripts_without_spaces_get_words(text, expected):
    line = lines(text).select(masked(MinerSettings()))["masked"][0]
    assert line.split() == expected.split()


def test_a_frozen_miner_never_renumbers_and_unseen_lines_are_unknown():
    miner = TemplateMiner.fit(PLANT.lazy())
    first = miner.assign(PLANT)
    assert templates(miner)[0] == "valve <*> opened" and len(miner.templates) == 4
    unseen = miner.assign(lines("quite another line about nothing", "short", "", "valve 9999 opened"))
    assert unseen["number"].to_list() == [UNKNOWN, UNKNOWN, UNKNOWN, 1]
    assert unseen["match"].to_list() == [Match.UNKNOWN] * 3 + [Match.EXACT]
    assert miner.assign(PLANT).equals(first)
    assert set(first["match"]) == {Match.EXACT.value}


@given(st.lists(st.text(max_size=30) | st.text("ab ", max_size=9), max_size=60))
def test_every_line_of_the_training_data_has_its_template_in_any_batch(texts):
    frame = lines(*texts)
    miner = TemplateMiner.fit(frame.lazy())
    whole = miner.assign(frame)
    assert set(whole["match"]) <= {Match.EXACT.value}
    alone = [TemplateMiner.from_dict(miner.to_dict()).assign(lines(text))["number"][0] for text in texts]
    assert whole["number"].to_list() == alone


def test_the_nearest_template_is_taken_where_that_is_asked_for():
    frame = lines(*["pump one is on now"] * 3)
    unseen = lines("pump two is on now", "nothing like it at all")
    assert TemplateMiner.fit(frame.lazy()).assign(unseen)["number"].to_list() == [0, 0]
    nearest = TemplateMiner.fit(frame.lazy(), MinerSettings(nearest=True)).assign(unseen)
    assert nearest["number"].to_list() == [1, 0]
    assert nearest["match"].to_list() == [Match.NEAREST, Match.UNKNOWN]


def test_a_given_template_is_taken_as_it_is_and_an_unseen_one_is_unknown():
    frame = lines("user ann in", "user bob in", "valve 1 open", templates=["user <*> in", "user <*> in", None])
    miner = TemplateMiner.fit(frame.lazy())
    assert templates(miner) == ["user <*> in", "valve <*> open"]
    later = lines("user eve in", "user eve in", "valve 3 open", templates=["user <*> out", None, "valve <*> open"])
    # without one, the line of the same log may still fit it
    assert miner.assign(later)["number"].to_list() == [UNKNOWN, 1, 2]


def test_the_rarest_templates_beyond_the_limit_are_unknown_and_counted():
    frame = lines(*["alpha beta gamma"] * 3, "one two", *["x y z w"] * 2)
    miner = TemplateMiner.fit(frame.lazy(), MinerSettings(max_templates=2))
    assert templates(miner) == ["alpha beta gamma", "x y z w"] and miner.dropped == 1
    assert miner.assign(frame)["number"].to_list() == [1, 1, 1, 0, 2, 2]


@pytest.mark.parametrize(
    "texts", [[], ["one line"], [""], ["x" * 100_000], ["a\nb\tc"], ["圧力低下 " * 50], ["<|im_end|> <s>"]]
)
def test_logs_of_no_one_or_odd_lines_are_mined(texts, tmp_path):
    frame = lines(*texts)
    miner = TemplateMiner.fit(frame.lazy())
    assert miner.assign(frame)["number"].to_list() == [1] * len(texts)
    miner.save(tmp_path / "miner.json")
    assert TemplateMiner.load(tmp_path / "miner.json").assign(frame).equals(miner.assign(frame))


def test_a_saved_miner_is_loaded_as_it_was_and_a_changed_file_is_refused(tmp_path):
    miner = TemplateMiner.fit(PLANT.lazy())
    path = tmp_path / "miner.json"
    miner.save(path)
    loaded = TemplateMiner.load(path)
    assert loaded.digest == miner.digest
    assert loaded.assign(PLANT).equals(miner.assign(PLANT))
    values = json.loads(path.read_text())
    values["templates"][0]["text"] = "valve <*> broken"
    path.write_text(json.dumps(values))
    with pytest.raises(PlantDataError, match="was changed since it was saved"):
        TemplateMiner.load(path)
    path.write_text(path.read_text()[:50])
    with pytest.raises(PlantDataError, match="not a whole JSON file"):
        TemplateMiner.load(path)
    path.write_text("{}")
    with pytest.raises(PlantDataError, match="holds no log templates"):
        TemplateMiner.load(path)
    with pytest.raises(PlantDataError, match="is not there"):
        TemplateMiner.load(tmp_path / "none.json")


def bins_of(miner, frame, **settings):
    parameters = ParameterBins.fit(miner, frame.lazy(), BinSettings(**settings))
    return parameters, parameters.encode(miner, frame, miner.assign(frame))


def test_numbers_are_binned_by_quantiles_and_few_values_one_by_one():
    frame = lines(*[f"load {n} percent" for n in range(100)], *["alarm from pump", "alarm from fan"] * 20)
    miner = TemplateMiner.fit(frame.lazy())
    parameters, bins = bins_of(miner, frame, bins=4)
    load, alarm = parameters.slots
    assert len(load.edges) == 5 and set(alarm.values) == {"pump", "fan"}
    counts = np.bincount(bins[:100, 0])
    assert counts[:4].tolist() == [25, 25, 25, 25]
    # another number of the same template, none at all, and a name that was never seen
    later = lines("load 1e9 percent", "load none percent", "alarm from cat", "nothing of that kind")
    codes = parameters.encode(miner, later, miner.assign(later))[:, 0] if len(later) else []
    offsets = parameters.offsets
    assert codes.tolist()[0] == 3
    assert codes.tolist()[2] == offsets[2] - 1
    assert codes.tolist()[3] == -1


def test_several_parameters_in_a_japanese_line_are_told_apart():
    frame = lines(*[f"ポンプ{n % 3 + 1}号機の圧力が{n * 0.1:.1f}MPaに低下" for n in range(300)])
    parameters, bins = bins_of(TemplateMiner.fit(frame.lazy()), frame, per_line=2)
    pump, pressure = parameters.slots
    assert pump.values == ("1", "2", "3") and pressure.edges[-1] == pytest.approx(29.9)
    assert bins[:4, 0].tolist() == [0, 1, 2, 0] and (np.diff(bins[:, 1]) >= 0).all()


def test_signs_and_full_width_digits_are_part_of_the_number():
    slot = Slot(1, 0, 0, edges=(-10.0, 0.0, 10.0))
    assert slot.encode(pl.Series(["-5", "度-5", "５", "=-5", "0x5", "much", "1e999"])).tolist() == [0, 0, 1, 0, 2, 2, 2]


def test_bins_stay_within_their_budget_and_the_places_that_say_most_are_taken():
    frame = lines(*[f"a {n} b {n % 2} c" for n in range(64)], *[f"rare {n} of that" for n in range(32)])
    miner = TemplateMiner.fit(frame.lazy())
    parameters, bins = bins_of(miner, frame, bins=8, budget=9)
    assert [(slot.template, slot.word) for slot in parameters.slots] == [(1, 1)]
    assert parameters.offsets[-1] == 9 and bins.max() == 7
    assert (bins[64:] == -1).all()
    nothing, none = bins_of(miner, frame, budget=0)
    assert nothing.slots == () and (none == -1).all()


def test_a_sample_of_many_lines_has_all_that_recur(monkeypatch):
    monkeypatch.setattr("hf_sparse_attn.industry.representation.log_parameters.SAMPLE", 500)
    frame = lines(*[f"{('alpha', 'beta', 'gamma', 'delta')[n % 4]} at {n % 7}" for n in range(2000)])
    miner = TemplateMiner.fit(frame.lazy())
    parameters, _ = bins_of(miner, frame)
    assert len(miner.templates) == len(parameters.slots) == 4
    assert all(set(slot.values) == set("0123456") for slot in parameters.slots)


def test_bins_are_the_same_after_json():
    parameters, _ = bins_of(TemplateMiner.fit(PLANT.lazy()), PLANT, per_line=2)
    assert len(parameters.slots) > 2
    assert ParameterBins.from_dict(json.loads(json.dumps(parameters.to_dict()))) == parameters
