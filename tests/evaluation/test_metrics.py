"""The metrics of answers, by hand, without a network, and filled by several processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hf_sparse_attn.evaluation.metrics import AnswerMatch

PROCESS = """
import sys
from hf_sparse_attn.evaluation.metrics import AnswerMatch
rank, folder = int(sys.argv[1]), sys.argv[2]
metric = AnswerMatch(num_process=2, process_id=rank, experiment_id="test", cache_dir=folder)
metric.add_batch(predictions=[[1, 2], [3, rank]], references=[[1, 2], [3, 0]])
print(metric.compute())
"""


def test_answers_by_hand():
    metric = AnswerMatch()
    metric.add_batch(predictions=[[1, 2, 3], [1, 0, 0]], references=[[1, 2, 3], [1, 2, 3]])
    metric.add_batch(predictions=[[5]], references=[[6]])
    scores = metric.compute()
    assert scores["shares"] == [1, pytest.approx(1 / 3), 0] and scores["n"] == 3
    assert scores["accuracy"] == pytest.approx(4 / 9) and scores["exact"] == pytest.approx(1 / 3)
    # shares 1, 1/3 and 0 around 4/9: √((25 + 1 + 16) / 81 / 2) / √3
    assert scores["accuracy_error"] == pytest.approx((42 / 81 / 2 / 3) ** 0.5)
    assert AnswerMatch().compute(predictions=[[1]], references=[[1]])["accuracy_error"] is None


@pytest.mark.parametrize(
    ("predicted", "message"), [([1], "answer 0 has 2 tokens and a prediction of 1"), ([], "a prediction of 0")]
)
def test_a_prediction_of_another_length_is_refused(predicted, message):
    with pytest.raises(ValueError, match=message):
        AnswerMatch().compute(predictions=[predicted], references=[[1, 2]])


def test_one_process_leaves_no_file_and_two_add_to_one_result(tmp_path):
    AnswerMatch(cache_dir=str(tmp_path / "one")).compute(predictions=[[1]], references=[[1]])
    assert not [path for path in (tmp_path / "one").rglob("*") if path.is_file()]
    command, environment = [sys.executable, "-c", PROCESS], {**os.environ, "HF_HUB_OFFLINE": "1"}
    options = {"stdout": subprocess.PIPE, "text": True, "env": environment}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "two")], **options) for rank in (0, 1)]
    printed = [rank.communicate(timeout=200)[0].strip() for rank in ranks]
    assert (
        "'accuracy': 0.875" in printed[0]
        and "'exact': 0.75" in printed[0]
        and "'n': 4" in printed[0]
        and printed[1] == "None"
    )
