"""The one sentence of a pilot follows from its rule, in both languages."""

from __future__ import annotations

import pytest

from hf_sparse_attn.industry.pilot.context_gain import ContextGain
from hf_sparse_attn.industry.pilot.far_history import FarHistory
from hf_sparse_attn.industry.pilot.lag_scan import LagLink
from hf_sparse_attn.industry.pilot.verdict import RULE, ContenderGain, decide, duration


def result(*, effects=20, p=0.002, gain=1.2, low=0.4, shuffle_p=0.05, detectable=0.3):
    link = LagLink("E 7", 86400.0, 80000.0, 90000.0, 18, effects, 2.0, 9.0, p)
    gains = (
        ContextGain(1.0, 0.0, 0.0, 0.0),
        ContextGain(4, gain, low, 2.0, 0.0, shuffle_p),
        ContextGain(16, gain + 0.05 if gain else 0.0, low, 2.1, 0.0, shuffle_p),
    )
    return FarHistory(effects, 21600.0, 345600.0, 604800.0, 30, 499, link, link, gains, detectable)


WORTH = (
    "History beyond 6 h helps by 1.20 bits a fault (0.40 to 2.00): worth it.",
    "6時間より前の履歴は故障1件あたり1.20ビット(0.40〜2.00)役立ちます。導入する価値があります。",
)
NONE = (
    "No evidence beyond 6 h: use EWMA.",
    "6時間より前の履歴が役立つ証拠はありません。EWMA を使ってください。",
)
UNKNOWN = ("The data cannot tell (n = 20).", "このデータでは判断できません(n = 20)。")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, WORTH),
        ({"p": 0.2}, NONE),
        ({"p": 0.2, "low": -0.1}, NONE),
        ({"low": -0.1}, UNKNOWN),
        ({"gain": 0.0, "low": 0.0}, UNKNOWN),
        ({"shuffle_p": 0.3}, UNKNOWN),
        ({"p": 0.2, "detectable": 0.9}, UNKNOWN),
        ({"p": 0.2, "detectable": None}, UNKNOWN),
        ({"detectable": 0.9}, WORTH),
    ],
)
def test_the_sentence_follows_from_link_gain_and_power(change, expected):
    verdict = decide(result(**change), "EWMA")
    assert (verdict.sentence["en"], verdict.sentence["ja"]) == expected
    assert all(set(reason) == {"en", "ja"} and all(reason.values()) for reason in verdict.reasons)


def test_few_faults_never_tell_whatever_else_is_found():
    verdict = decide(result(effects=9), "EWMA", (ContenderGain("far", "near", 0.4, 0.3, 0.5),))
    assert verdict.answer == "cannot tell" and verdict.sentence["en"] == "The data cannot tell (n = 9)."
    assert {"en": "9 faults, 10 are needed", "ja": "故障は9件で、10件必要です"} in verdict.reasons


def test_a_contender_that_gains_from_its_context_is_evidence_and_one_that_may_not_is_none():
    better = ContenderGain("sparse 64 ×", "sparse 1 ×", 0.12, 0.03, 0.2)
    verdict = decide(result(p=0.5), "EWMA", (better,))
    assert verdict.sentence["en"].startswith("History beyond 6 h helps by 0.120 in average precision (0.030 to 0.200")
    assert "sparse 64 ×" in verdict.sentence["ja"] and verdict.answer == "worth it"
    unsure = ContenderGain("sparse 64 ×", "sparse 1 ×", 0.12, -0.01, 0.2)
    assert decide(result(p=0.5), "EWMA", (unsure,)).answer == "no evidence"


def test_without_a_fault_to_judge_baselines_by_none_is_recommended():
    assert decide(result(p=0.5), None).answer == "cannot tell"


def test_the_rule_is_written_down_in_both_languages_with_its_limits():
    assert "Fewer than 10 faults" in RULE["en"] and "10件未満" in RULE["ja"]
    assert all("0.01" in text and "80%" in text for text in RULE.values())


def test_durations_have_one_unit():
    spans = [duration(s, "en") for s in (90, 5400, 86400, 30 * 86400)]
    assert spans == ["1.5 min", "1.5 h", "1 days", "30 days"]
    assert duration(5400, "ja") == "1.5時間"
