"""The pilot as a whole: one table with intervals, contenders beside baselines, and a verdict."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.paths import DATA
from helpers.pilot_plants import plant

from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.pilot import pilot_table
from hf_sparse_attn.industry.pilot.baseline_detectors import detector_registry
from hf_sparse_attn.industry.pilot.csv_timeline import timeline_from_csv
from hf_sparse_attn.industry.pilot.pilot_table import Contender, PilotSettings, pilot

NAB = DATA / "nab"
SMALL = {"days": 60, "step": 30, "kinds": 6, "channels": 2}


@pytest.fixture(scope="module")
def lines():
    return [plant(seed, lag=96, pairs=16, **SMALL) for seed in range(2)]


def contenders(lines):
    """A model that sees the cause of a fault, one that sees the last hours only, and one that knows nothing."""
    far, near = {}, {}
    for line in lines:
        rng = np.random.default_rng(0)
        far[line.asset] = rng.random(len(line)) + line.labels
        near[line.asset] = rng.random(len(line))
    return [Contender("model 64 ×", far, "model", 86400.0), Contender("model 1 ×", near, "model", 3600.0)]


@pytest.fixture(scope="module")
def result(lines):
    with pytest.MonkeyPatch.context() as patch:
        # the detectors themselves are tested elsewhere
        cheap = [d for d in detector_registry.all_detectors() if d.name in ("random", "max |z|", "new template")]
        patch.setattr(pilot_table, "all_detectors", lambda **_: [*cheap, detector_registry.all_detectors()[-1]])
        yield pilot(lines, PilotSettings(seeds=(0, 1)), contenders(lines))


def test_rows_stand_in_table_order_with_intervals_and_what_is_missing_with_its_reason(result):
    names = [row.name for row in result.rows]
    assert names == ["random", "max |z|", "new template", "pretrained forecaster residual", "model 64 ×", "model 1 ×"]
    missing = result.table()[3]
    assert missing["not available"].endswith("no checkpoint of TimesFM was named")
    for row in result.rows:
        if row.measures:
            bounds = row.measures.average_precision
            assert bounds["low"] <= bounds["value"] <= bounds["high"]
            assert row.measures.faults == result.faults > 5


def test_random_scores_stand_at_the_base_rate_and_knowing_ones_above(result):
    random, far = result.rows[0].measures, result.rows[-2].measures
    assert random.average_precision["low"] <= result.base_rate <= random.average_precision["high"]
    assert random.vus_pr["low"] <= result.vus_base_rate <= random.vus_pr["high"]
    assert far.average_precision["low"] > 3 * result.base_rate and far.event_recall["value"] > 0.4


def test_no_detector_raises_more_alarms_than_the_budget(result):
    assert all(row.measures.alarms <= result.days / 7 + 1 for row in result.rows if row.measures)


def test_a_contender_with_far_context_is_held_against_itself_with_the_near_one(result):
    assert any(reason["en"].startswith("model 64 × against model 1 ×: +") for reason in result.verdict.reasons)


def test_the_result_is_written_as_json_with_the_rule_of_the_verdict(result, tmp_path):
    result.write(tmp_path / "pilot.json")
    read = json.loads((tmp_path / "pilot.json").read_text())
    assert read["verdict"]["sentence"]["en"] in result.verdict.sentence["en"]
    assert {"en", "ja"} == set(read["rule"]) and len(read["rows"]) == 6


def test_scores_that_do_not_fit_are_refused(lines):
    short = {line.asset: np.zeros(3) for line in lines}
    for scores, message in (({}, "no scores of asset 'press-0'"), (short, r"m: shape \(3,\)")):
        with pytest.raises(PlantDataError, match=message):
            pilot(lines, contenders=[Contender("m", scores)])
    with pytest.raises(PlantDataError, match="name of its own"):
        pilot([lines[0], lines[0]])
    with pytest.raises(PlantDataError, match="0 timelines"):
        pilot([])


def test_a_record_without_faults_cannot_tell(lines, monkeypatch):
    monkeypatch.setattr(pilot_table, "all_detectors", lambda **_: detector_registry.all_detectors()[:2])
    silent = pilot([replace(lines[0], faults=lines[0].faults[:0])])
    assert silent.verdict.sentence["en"] == "The data cannot tell (n = 0)."
    assert silent.rows[1].measures.average_precision["value"] is None
    json.dumps(silent.to_dict(), allow_nan=False)


@pytest.mark.skipif(not NAB.is_dir(), reason="the machine temperature of NAB is not here")
def test_the_machine_temperature_of_nab_has_too_few_faults_to_tell(monkeypatch):
    monkeypatch.setattr(pilot_table, "all_detectors", lambda **_: detector_registry.all_detectors()[:3])
    result = pilot([timeline_from_csv(NAB / "machine_temperature_system_failure.csv", NAB / "windows.json")])
    assert result.verdict.sentence["en"] == "The data cannot tell (n = 4)."
    assert result.rows[1].measures.average_precision["value"] > 5 * result.base_rate


def test_a_detector_that_finds_nothing_at_the_budget_is_not_advised(result):
    random, first, second = result.rows[0], result.rows[1], result.rows[2]
    blind = replace(second, measures=replace(second.measures, found=0, average_precision={"value": 0.9}))
    finds = replace(first, measures=replace(first.measures, found=2, average_precision={"value": 0.1}))
    assert pilot_table._best([random, finds, blind]) == first.name
    none = replace(finds, measures=replace(finds.measures, found=0))
    assert pilot_table._best([random, none, blind]) == second.name
