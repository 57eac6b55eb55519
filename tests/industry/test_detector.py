"""The surprise of a sparse language model as a detector of PyOD: one interface for both, rows and datasets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny_models import sparse_tiny_model
from pyod.models.base import BaseDetector
from pyod.models.hbos import HBOS
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.industry.anomaly_detector import SurpriseDetector
from hf_sparse_attn.industry.errors import PlantDataError


@pytest.fixture(scope="module")
def model():
    return sparse_tiny_model("llama", SparseAttentionConfig())


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).integers(0, 97, (24, 40))


def direct_loss(model, row, scored):
    with torch.no_grad():
        logits = model(torch.tensor(row, device="cpu")[None]).logits[0, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:], device="cpu"), reduction="none")
    return float(losses[-scored:].mean())


def test_scores_are_the_mean_losses_of_the_last_tokens(model, rows):
    for scored, tokens in ((None, 39), (5, 5)):
        detector = SurpriseDetector(model, scored_tokens=scored, batch_size=7).fit(rows)
        expected = [direct_loss(model, row, tokens) for row in rows]
        np.testing.assert_allclose(detector.decision_scores_, expected, rtol=1e-4)
        np.testing.assert_allclose(detector.decision_function(rows[:3]), expected[:3], rtol=1e-4)


def test_one_line_compares_it_with_another_detector_of_pyod(model, rows):
    for detector in (SurpriseDetector(model, contamination=0.25), HBOS(contamination=0.25)):
        assert isinstance(detector, BaseDetector)
        detector.fit(rows)
        assert detector.labels_.sum() == 6 and detector.threshold_ == np.quantile(detector.decision_scores_, 0.75)
        np.testing.assert_array_equal(detector.predict(rows), detector.labels_)
        chances = detector.predict_proba(rows)
        assert chances.shape == (24, 2) and np.allclose(chances.sum(1), 1)
        assert detector.predict(rows, return_confidence=True)[1].shape == (24,)


def test_what_the_model_expects_is_less_abnormal_than_noise(model, rows):
    start = torch.tensor(rows[:8, :8], device="cpu")
    expected = model.generate(start, max_new_tokens=32, do_sample=False).numpy()
    detector = SurpriseDetector(model).fit(rows)
    assert detector.decision_function(expected).max() < detector.decision_scores_.min()


def test_rows_of_different_lengths_score_as_each_alone(model, rows):
    ragged = [row[: 10 + n].tolist() for n, row in enumerate(rows)]
    detector = SurpriseDetector(model).fit(ragged)
    alone = [detector.decision_function([row])[0] for row in ragged]
    np.testing.assert_allclose(detector.decision_scores_, alone, rtol=1e-4)
    assert detector.predict_proba(ragged).shape == (24, 2)


def moments(n):
    """Every row an hour after the one before it; a night state that surprises more."""
    times = [f"2024-03-{1 + h // 24:02d}T{h % 24:02d}:30:00+00:00" for h in range(n)]
    return {"time": times, "state": ["night" if h % 24 < 6 else "day" for h in range(n)]}


def test_datasets_come_in_and_go_out_with_their_columns(model, rows):
    data = Dataset.from_dict({"input_ids": rows.tolist(), "line": list(range(24))})
    detector = SurpriseDetector(model).fit(data)
    scored = detector.score_dataset(data)
    assert scored.column_names == ["input_ids", "line", "anomaly_score", "anomaly"]
    np.testing.assert_allclose(scored["anomaly_score"], detector.decision_scores_)
    np.testing.assert_array_equal(scored["anomaly"], detector.labels_)


def test_the_baseline_takes_out_what_a_state_does_anyway(model, rows, monkeypatch):
    usual = np.random.default_rng(1).normal(4, 0.1, 480)
    data = Dataset.from_dict({"input_ids": np.resize(rows, (480, 40)).tolist(), **moments(480)})
    night = np.array(data["state"]) == "night"
    usual[night] += 3
    usual[400] += 1.5
    monkeypatch.setattr(SurpriseDetector, "surprise", lambda self, X: usual[: len(X)])
    plain = SurpriseDetector(model, contamination=0.01).fit(data)
    against = SurpriseDetector(model, contamination=0.01, baseline=True).fit(data)
    assert not night[400] and plain.labels_[400] == 0 and against.labels_[400] == 1
    assert abs(np.median(against.decision_scores_[night]) - np.median(against.decision_scores_[~night])) < 0.2
    np.testing.assert_allclose(against.decision_function(data.select(range(50))), against.decision_scores_[:50])


def test_an_hour_of_the_week_with_enough_rows_has_its_own_level_in_every_form_of_time(model, rows, monkeypatch):
    hours = np.tile(np.arange(168), 35)
    losses = np.random.default_rng(2).normal(4, 0.1, len(hours)) + 2 * (hours == 6)  # the six o'clock job on Mondays
    stamps = 1704067200 * 10**9 + np.arange(len(hours)) * 3600 * 10**9  # from Monday, 1 January 2024
    monkeypatch.setattr(SurpriseDetector, "surprise", lambda self, X: losses[: len(X)])
    texts = np.datetime_as_string(stamps.astype("datetime64[ns]"), unit="s").tolist()
    for times in (stamps.tolist(), texts, np.array(stamps.astype("datetime64[us]")).tolist()):
        data = Dataset.from_dict({"input_ids": [[1, 2]] * len(hours), "time": times, "state": ["on"] * len(hours)})
        scores = SurpriseDetector(model, baseline=True).fit(data).decision_scores_
        assert abs(np.median(scores[hours == 6])) < 0.2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[1, 2], [3]], "row 1 of int64 and shape"),
        ([[1.5, 2.0]], "row 0 of float64"),
        ([[1, 97]], "token ids from 1 to 97, the model knows 0 to 96"),
        ([[1, -100]], "token ids from -100"),
        ([], "no rows to fit on"),
        (Dataset.from_dict({"text": ["a"]}), "has no input_ids"),
    ],
)
def test_rows_that_are_none_are_refused(model, bad, message):
    with pytest.raises(PlantDataError, match=message):
        SurpriseDetector(model).fit(bad)


def test_a_baseline_without_states_or_times_is_refused(model, rows):
    with pytest.raises(PlantDataError, match="has no state"):
        SurpriseDetector(model, baseline=True).fit(rows)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "state": ["a"] * 24, "time": ["noon"] * 24})
    with pytest.raises(PlantDataError, match="row 0 has the time 'noon'"):
        SurpriseDetector(model, baseline=True).fit(data)


def test_it_behaves_as_an_estimator_and_leaves_the_model_as_it_was(model, rows):
    with pytest.raises(NotFittedError):
        SurpriseDetector(model).decision_function(rows)
    with pytest.raises(ValueError, match="contamination"):
        SurpriseDetector(model, contamination=0.7)
    model.train()
    detector = SurpriseDetector(model, scored_tokens=3).fit(rows)
    assert model.training and detector.get_params()["scored_tokens"] == 3
    model.eval()
    assert clone(SurpriseDetector(model, batch_size=2), safe=False).get_params(deep=False)["batch_size"] == 2
