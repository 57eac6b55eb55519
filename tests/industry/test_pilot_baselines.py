"""The detectors of the comparison: what each is for it finds, none looks ahead, what it cannot score it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.pilot_plants import plant
from helpers.tiny_models import tiny_config

from hf_sparse_attn.industry.pilot.baseline_detectors.boosting_detectors import BoostedFailure, BoostedForecast
from hf_sparse_attn.industry.pilot.baseline_detectors.channel_detectors import Ewma, MaxZ, RandomScores, SeasonalNaive
from hf_sparse_attn.industry.pilot.baseline_detectors.detector_base import StateScaler, trailing_sum
from hf_sparse_attn.industry.pilot.baseline_detectors.detector_registry import all_detectors
from hf_sparse_attn.industry.pilot.baseline_detectors.event_detectors import EventCountPca, EventNgram, NewTemplate
from hf_sparse_attn.industry.pilot.baseline_detectors.left_matrix_profile import LeftMatrixProfile, left_profile
from hf_sparse_attn.industry.pilot.baseline_detectors.outlier_detectors import Histograms, IsolationForest
from hf_sparse_attn.industry.pilot.baseline_detectors.pretrained_forecaster import PretrainedForecaster
from hf_sparse_attn.industry.pilot.detection_curves import average_precision


@pytest.fixture(scope="module")
def line():
    """60 days at 30 minutes; 24 h before each fault an event of kind 3."""
    return plant(0, days=60, step=30, pairs=24, lag=48, kinds=8, channels=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from transformers import TimesFmModelForPrediction

    config = tiny_config("timesfm")
    config.context_length, config.horizon_length = 64, 8
    folder = tmp_path_factory.mktemp("timesfm")
    TimesFmModelForPrediction(config).save_pretrained(folder)
    return folder


NAMES = [d.name for d in all_detectors()]


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_finite_and_no_detector_looks_ahead(name, line, checkpoint):
    detector = next(d for d in all_detectors(forecaster=checkpoint) if d.name == name)
    assert detector.unavailable(line) is None
    detector.fit(line.train())
    scores, cut = detector.scores(line), 2000
    assert scores.shape == (len(line),) and np.isfinite(scores).all()
    rng = np.random.default_rng(1)
    values, counts = line.values.copy(), line.counts.copy()
    values[cut:] = rng.permutation(values[cut:]) * 3
    counts[cut:] = rng.permutation(counts[cut:])
    other = detector.scores(replace(line, values=values, counts=counts))
    np.testing.assert_allclose(other[:cut], scores[:cut], atol=1e-6)
    if name != "random":
        assert not np.allclose(other[cut:], scores[cut:])


def with_faults(line, values=None, counts=None, at=(2000, 2300, 2500), length=24):
    step, begin = line.step, line.times[0]
    faults = np.array([[begin + a * step, begin + (a + length) * step] for a in at])
    return replace(
        line,
        values=line.values if values is None else values,
        counts=line.counts if counts is None else counts,
        faults=faults,
    )


# times the base rate that each reaches at least: histograms know nothing of how far outside a value lies
@pytest.mark.parametrize(
    ("detector", "factor"),
    [
        (MaxZ(), 3),
        (Ewma(), 3),
        (SeasonalNaive(), 3),
        (BoostedForecast(), 3),
        (IsolationForest(), 3),
        (Histograms(), 1.5),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_sensor_that_leaves_its_range_is_found(detector, factor, line):
    values = line.values.copy()
    for at in (2000, 2300, 2500):
        values[at : at + 24, 1] += 15 * np.sin(np.arange(24))
    faulty = with_faults(line, values)
    scores = detector.fit(faulty.train()).scores(faulty)[faulty.test_from :]
    assert (
        average_precision(scores, faulty.labels[faulty.test_from :]) > factor * faulty.labels[faulty.test_from :].mean()
    )


@pytest.mark.parametrize("detector", [NewTemplate(), EventCountPca(), EventNgram()], ids=lambda d: d.name)
def test_an_event_that_training_never_saw_is_found(detector, line):
    counts = line.counts.copy()
    counts[:, 5] = 0
    for at in (2000, 2300, 2500):
        counts[at : at + 24, 5] = 2
    faulty = with_faults(line, counts=counts)
    scores = detector.fit(faulty.train()).scores(faulty)[faulty.test_from :]
    assert average_precision(scores, faulty.labels[faulty.test_from :]) > 0.8


def test_the_ngram_finds_an_order_of_known_events_that_training_never_saw():
    line = plant(1, days=60, step=30, pairs=2, lag=48, kinds=5, channels=1)
    counts = np.zeros_like(line.counts)
    counts[np.arange(len(line)), np.arange(len(line)) % 4] = 1
    for at in (2000, 2300, 2500):
        counts[at : at + 24] = counts[at : at + 24][::-1]
    faulty = with_faults(line, counts=counts)
    scores = EventNgram().fit(faulty.train()).scores(faulty)[faulty.test_from :]
    assert average_precision(scores, faulty.labels[faulty.test_from :]) > 0.9
    rarity = NewTemplate().fit(faulty.train()).scores(faulty)[faulty.test_from :]
    assert average_precision(rarity, faulty.labels[faulty.test_from :]) < 0.2


def test_a_classifier_learns_the_events_before_faults(line):
    counts = line.counts.copy()
    for at in line.onsets():
        counts[max(at - 6, 0) : at, 2] += 1
    near = replace(line, counts=counts)
    detector = BoostedFailure(horizon_seconds=3 * 3600)
    scores = detector.fit(near.train()).scores(near)
    ahead = np.zeros(len(near), bool)
    for at in near.onsets():
        ahead[max(at - 6, 0) : at] = True
    assert average_precision(scores[near.test_from :], ahead[near.test_from :]) > 0.6


def test_operating_states_have_scales_of_their_own(line):
    values = np.random.default_rng(0).standard_normal(line.values.shape) * np.where(line.states == 1, 10, 1)[:, None]
    values[:, 0] += 100 * line.states
    scaled = replace(line, values=values)
    z = StateScaler().fit(scaled.train()).z(scaled)
    for state in (0, 1):
        assert abs(np.median(z[line.states == state])) < 0.1
        assert z[line.states == state].std() == pytest.approx(1, abs=0.1)


def direct_profile(points, length):
    profile = np.zeros(len(points))
    parts = [points[n : n + length] for n in range(len(points) - length + 1)]
    normal = [(p - p.mean()) / p.std() if p.std() > 1e-10 else None for p in parts]
    for n in range(length // 4 + 1, len(parts)):
        distances = []
        for other in normal[: n - length // 4]:
            if normal[n] is None or other is None:
                distances.append(0.0 if normal[n] is other else np.sqrt(length))
            else:
                distances.append(np.linalg.norm(normal[n] - other))
        profile[n + length - 1] = min(distances) / (2 * np.sqrt(length))
    return profile


def test_the_left_profile_equals_a_direct_computation_flat_stretches_included():
    points = np.sin(np.arange(300) / 5) + 0.3 * np.random.default_rng(0).standard_normal(300)
    points[100:140] = 1.0
    np.testing.assert_allclose(left_profile(points, 20), direct_profile(points, 20), atol=1e-3)


@pytest.mark.slow
def test_the_left_profile_is_that_of_stumpy():
    import stumpy

    points = np.sin(np.arange(600) / 5) + 0.3 * np.random.default_rng(0).standard_normal(600)
    left = stumpy.stump(points, 24)[:, 2].astype(int)
    ours, windows = left_profile(points, 24), np.lib.stride_tricks.sliding_window_view(points, 24)
    normal = (windows - windows.mean(1, keepdims=True)) / windows.std(1, keepdims=True)
    for n in np.flatnonzero(left >= 0):
        assert ours[n + 23] == pytest.approx(np.linalg.norm(normal[n] - normal[left[n]]) / (2 * np.sqrt(24)), abs=1e-3)


def test_the_matrix_profile_finds_a_day_of_another_shape(line):
    rng = np.random.default_rng(0)
    day = np.sin(2 * np.pi * np.arange(len(line)) / 48)
    values = day[:, None] + 0.05 * rng.standard_normal((len(line), 3))
    for at in (2000, 2300, 2500):
        values[at : at + 48, 0] = np.abs(values[at : at + 48, 0])
    faulty = with_faults(line, values, length=72)
    scores = LeftMatrixProfile().fit(faulty.train()).scores(faulty)[faulty.test_from :]
    assert average_precision(scores, faulty.labels[faulty.test_from :]) > 0.6


def test_what_a_record_lacks_is_said(line):
    silent = replace(line, counts=np.zeros_like(line.counts), faults=line.faults[:0])
    blind = replace(line, values=np.full_like(line.values, np.nan))
    for record, kinds in ((silent, (NewTemplate(), EventCountPca(), EventNgram())), (blind, (MaxZ(), Ewma()))):
        assert all(kind.unavailable(record) for kind in kinds)
    assert BoostedFailure().unavailable(silent) == "0 faults in training, 5 needed"
    assert PretrainedForecaster().unavailable(line) == "no checkpoint of TimesFM was named"
    assert "no folder" in PretrainedForecaster("/nowhere").unavailable(line)
    assert SeasonalNaive().unavailable(replace(line, train_steps=48)) == "1.0 days of training, more than 2 needed"


def test_missing_values_and_empty_channels_are_no_evidence(line):
    values = line.values.copy()
    values[:, 2] = np.nan
    values[1900:1950] = np.nan
    gappy = replace(line, values=values)
    for detector in (MaxZ(), Ewma(), SeasonalNaive(), BoostedForecast(), IsolationForest(), LeftMatrixProfile()):
        assert np.isfinite(detector.fit(gappy.train()).scores(gappy)).all()
    assert (MaxZ().fit(gappy.train()).scores(gappy)[1900:1950] == 0).all()


def test_sums_of_a_trailing_window_hold_the_step_itself():
    assert trailing_sum(np.arange(5), 2).tolist() == [0, 1, 3, 5, 7]
    assert trailing_sum(np.arange(3), 9).tolist() == [0, 1, 3]
    assert (RandomScores(1).scores(plant(0, days=10, pairs=2, lag=5)) < 1).all()
