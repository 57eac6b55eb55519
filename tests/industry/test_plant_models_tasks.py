"""Next event, failure ahead and what each way of reading costs: the mechanics, exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.event_folders import byte_tokenizer, log_lines, vocabulary_tokenizer, wide_readings, write_folder
from sklearn.metrics import average_precision_score

from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.pilot.alarm_metrics import check_scores
from hf_sparse_attn.industry.pilot.dataset_timeline import timeline_from_dataset
from hf_sparse_attn.industry.plant_models import reading_cost as costs
from hf_sparse_attn.industry.plant_models.failure_ahead import failure_ahead, failure_labels, step_states
from hf_sparse_attn.industry.plant_models.next_event import by_lag, cause_gains, next_events, template_tokens
from hf_sparse_attn.industry.plant_models.stream_reading import Reading
from hf_sparse_attn.industry.plant_models.surprise import surprise
from hf_sparse_attn.industry.plant_models.surprise_baseline import SurpriseBaseline, scores_on_grid, states_at
from hf_sparse_attn.industry.representation.log_tokens import token_streams
from hf_sparse_attn.industry.representation.log_vocabulary import LogVocabulary, VocabularySettings
from hf_sparse_attn.industry.representation.sensor_patches import GridSettings

READING = Reading(length=64, past=32)
KEYS = 80


@pytest.fixture(scope="module")
def plant(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("plant") / "data", log_lines(60))


@pytest.fixture(scope="module")
def vocabulary(plant):
    return LogVocabulary.fit(plant)


@pytest.fixture(scope="module")
def stream(plant, vocabulary):
    return token_streams(plant, vocabulary_tokenizer(vocabulary), vocabulary)["press"]


@pytest.fixture(scope="module")
def model(sparse_llama, real_budget):
    return sparse_llama(real_budget, noise=0.3)


@torch.no_grad()
def logits(model, ids):
    return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].float()


# -- the next event -------------------------------------------------------------------------------------------------


def test_templates_are_predicted_with_the_model_s_own_ranks_and_nats(stock_llama, stream, vocabulary):
    model, tokens = stock_llama(), template_tokens(stream)
    names = [stream.place(int(token)).part for token in tokens]
    assert names == ["template"] * 60
    events = next_events(model, stream.ids, tokens, READING)
    assert events.tokens.tolist() == tokens.tolist()
    scores = logits(model, stream.ids[:64])
    for token, nats, rank in zip(events.tokens, events.nats, events.ranks, strict=True):
        if token >= 64:
            break
        own = scores[token - 1, stream.ids[token]]
        assert math.isclose(nats, -float(scores[token - 1].log_softmax(-1)[stream.ids[token]]), abs_tol=2e-5)
        assert rank == int((scores[token - 1] > own).sum())
    summary = events.summary()
    assert summary["events"] == 60 and summary["top_1"] == (events.ranks < 1).mean() <= summary["top_5"]


def test_a_model_that_knows_nothing_is_not_right_by_the_order_of_its_tokens(stock_llama, stream):
    model = stock_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    events = next_events(model, stream.ids, template_tokens(stream), READING)
    assert (events.ranks == 96).all() and np.allclose(events.nats, math.log(97)) and events.accuracy(5) == 0


def test_effects_are_told_apart_by_how_far_their_cause_lies(model, stream):
    effects = template_tokens(stream)[[10, 20, 30, 40]]
    causes = effects - np.array([4, 9, 33, 35])
    events = next_events(model, stream.ids, template_tokens(stream), READING)
    gains = np.array([1.0, 2.0, 3.0, 5.0])
    near, far = by_lag(events, causes, effects, [1, 16, 32, 64], gains)
    assert (near.low, near.high, near.links, near.gain) == (1, 16, 2, 1.5)
    assert (far.low, far.links, far.gain) == (32, 2, 4.0)
    assert far.nats == pytest.approx(events.nats[[30, 40]].mean())
    assert math.isnan(by_lag(events, causes, effects, [1, 64])[0].gain)
    with pytest.raises(PlantDataError, match="not all of which are among"):
        by_lag(events, causes, effects + 1, [1, 64])


@pytest.mark.parametrize("reading", [READING, Reading("sparse", KEYS, 160, 100), Reading("window", KEYS, 160, 100)])
def test_the_gain_of_a_cause_is_the_nats_without_it_less_those_with_it(model, stream, reading):
    tokens = template_tokens(stream)
    gains = cause_gains(model, stream, tokens[[5, 1]], tokens[[12, 9]], reading)
    firsts = stream.segments["first"].to_numpy()
    for gain, cause, effect in zip(gains, (5, 1), (12, 9), strict=True):
        # all are short enough to be read whole, at any budget
        start = max(
            0,
            int(firsts[cause])
            - min(reading.length - reading.past, reading.length - 1 - int(tokens[effect] - firsts[cause])),
        )
        nats = [
            -float(logits(model, stream.ids[begin : tokens[effect]])[-1].log_softmax(-1)[stream.ids[tokens[effect]]])
            for begin in (int(firsts[cause + 1]), start)
        ]
        assert gain == pytest.approx(nats[0] - nats[1], abs=5e-5)
        assert gain != 0


def test_impossible_links_and_tokens_are_refused(model, stream, plant, tmp_path):
    tokens = template_tokens(stream)
    with pytest.raises(PlantDataError, match="link 1 has its cause"):
        cause_gains(model, stream, tokens[[1, 30]], tokens[[3, 29]], READING)  # after its effect
    with pytest.raises(PlantDataError, match="the context has 64 tokens"):
        cause_gains(model, stream, tokens[[1]], tokens[[50]], READING)
    with pytest.raises(PlantDataError, match="must ascend"):
        next_events(model, stream.ids, tokens[::-1], READING)
    with pytest.raises(PlantDataError, match="must ascend within"):
        next_events(model, stream.ids, np.array([len(stream)]), READING)
    text = token_streams(plant, byte_tokenizer(), mode="text", cache=tmp_path)["press"]
    with pytest.raises(PlantDataError, match="holds lines as text"):
        template_tokens(text)


# -- failures ahead -------------------------------------------------------------------------------------------------


def test_states_of_a_step_are_the_mean_of_its_tokens_and_stay_while_nothing_is_said(stock_llama, stream):
    model = stock_llama()
    times = stream.segments["stop"].to_numpy() - 1
    second = 10**9
    grid = times[0] - 3 * second + np.arange(100) * 5 * second  # lines come every 7 s: some steps have none
    states = step_states(model, stream, grid, Reading(length=4096, past=2048))
    with torch.no_grad():
        ids = torch.from_numpy(stream.ids.astype(np.int64))[None]
        hidden = model.model(ids).last_hidden_state[0].numpy()
    firsts = np.append(stream.segments["first"].to_numpy(), len(stream))
    expected, last = [], np.zeros(64)
    for begin in grid:
        mine = [
            hidden[firsts[s] : firsts[s + 1]] for s in np.flatnonzero((times >= begin) & (times < begin + 5 * second))
        ]
        last = np.concatenate(mine).mean(0) if mine else last
        expected.append(last)
    assert np.allclose(states, expected, atol=1e-4)
    late = step_states(model, stream, grid + 50 * second, Reading(length=4096, past=2048))  # lines before the grid
    assert late.shape == states.shape and np.isfinite(late).all()


def test_labels_are_failures_that_start_within_the_horizon_and_training_sees_none_of_the_rest():
    grid = np.arange(20) * 10
    labels = failure_labels(grid, np.array([[62, 75], [141, 150]]), 30, train_end=100, test_start=110)
    # a failure that starts at 62: ends of steps are 10 … 200, ahead from 40 (its 30 reach 70) to 60
    assert np.flatnonzero(labels.ahead).tolist() == [3, 4, 5, 11, 12, 13]
    lasting = [6, 7, 14]
    assert np.flatnonzero(~labels.known).tolist() == [*lasting, 17, 18, 19]  # the last: the record ends before
    assert np.flatnonzero(labels.train).tolist() == [0, 1, 2, 3, 4, 5]  # 6 and 7 last; of 8 on the horizon is over
    assert np.flatnonzero(labels.test).tolist() == [11, 12, 13, 15, 16]


@pytest.mark.parametrize(
    ("failures", "horizon", "ends", "message"),
    [
        ([[5, 9]], 0, (50, 60), "a horizon of 0"),
        ([[9, 5]], 10, (50, 60), "1 end before they start"),
        ([[5, 9]], 10, (60, 50), "training to 60 and evaluation from 50"),
    ],
)
def test_impossible_labels_are_refused(failures, horizon, ends, message):
    with pytest.raises(PlantDataError, match=message):
        failure_labels(np.arange(9) * 10, np.array(failures), horizon, train_end=ends[0], test_start=ends[1])


def test_failures_that_states_announce_are_found_and_others_are_at_the_base_rate():
    random, steps = np.random.default_rng(0), 2000
    starts = np.arange(50, steps, 50) * 10
    grid = np.arange(steps) * 10
    labels = failure_labels(grid, np.stack([starts, starts + 20], 1), 100, train_end=12_000, test_start=12_100)
    noise = random.normal(size=(steps, 4)).astype(np.float32)
    told = np.column_stack([noise, labels.ahead + 0.1 * random.normal(size=steps)]).astype(np.float32)
    found, blind = failure_ahead(told, labels), failure_ahead(noise, labels)
    assert found.average_precision > 0.99 and found.steps == labels.test.sum()
    assert found.failures == 15 and found.base_rate == labels.ahead[labels.test].mean()
    assert found.average_precision == average_precision_score(
        labels.ahead[labels.test], found.probabilities[labels.test]
    )
    assert abs(blind.average_precision - blind.base_rate) < 0.1
    assert found.probabilities.shape == (steps,) and np.isfinite(found.probabilities).all()
    # what comes after training has no say
    later = told.copy()
    later[~labels.train] = 7
    assert np.array_equal(failure_ahead(later, labels).probabilities[labels.train], found.probabilities[labels.train])


def test_a_training_period_without_failures_is_refused_and_a_test_without_them_has_no_precision():
    grid, states = np.arange(100) * 10, np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    labels = failure_labels(grid, np.array([[800, 810]]), 50, train_end=500, test_start=600)
    with pytest.raises(PlantDataError, match="of which 0 have a failure ahead"):
        failure_ahead(states, labels)
    labels = failure_labels(grid, np.array([[300, 310]]), 50, train_end=500, test_start=600)
    assert failure_ahead(states, labels).average_precision is None
    with pytest.raises(PlantDataError, match="99 states for 100 steps"):
        failure_ahead(states[:99], labels)


# -- cost -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Sets what each way of reading takes, in seconds a pass, by name."""
    passes = []

    def set_times(of):
        def alternate(functions, repeats, device):
            for function in functions.values():
                function()  # they do run
            passes.append(list(functions))
            return {name: [of(name)] * repeats for name in functions}

        monkeypatch.setattr(costs, "alternate", alternate)
        return passes

    return set_times


def keys_of(name):
    return int(name.split(",")[1].split()[0]) if "," in name else 10**6


@pytest.mark.parametrize(
    ("a_key", "sparse_takes", "keys", "reason"),
    [
        (1.0, 130, 128, "the next larger window takes longer"),
        (1.0, 10, 80, "no window takes less time"),
        (0.0, 10, 240, "the largest window that was tried takes no longer; dense attention takes no longer either"),
    ],
)
def test_the_window_of_equal_cost_is_the_largest_that_takes_no_longer(model, clock, a_key, sparse_takes, keys, reason):
    passes = clock(lambda name: sparse_takes if name.startswith("sparse") else a_key * keys_of(name))
    ids = np.random.default_rng(0).integers(3, 97, 256).astype(np.int32)
    sparse = Reading("sparse", KEYS, 256, 128)
    found = costs.window_at_equal_cost(model, ids, sparse, repeats=3)
    assert found.window == Reading("window", keys, 256, 128) and reason in found.reason
    assert found.cost.median("sparse, 80 keys") == sparse_takes / 256
    assert len(passes) == 2 and passes[0] == passes[1] and {"dense", "sparse, 80 keys"} <= set(passes[0])
    row = found.cost.to_dict()["seconds_a_token"]["dense"]
    assert row["n"] == 3 and row["min_s"] == row["max_s"] == row["median_s"]


def test_costs_that_cannot_be_compared_are_refused(model):
    ids = np.full(64, 5, np.int32)
    with pytest.raises(PlantDataError, match="readings dense, dense"):
        costs.reading_cost(model, ids, [Reading(), Reading(length=64, past=32)])
    with pytest.raises(PlantDataError, match="over 64 tokens has no window of equal cost"):
        costs.window_at_equal_cost(model, ids, Reading("sparse", KEYS))
    with pytest.raises(PlantDataError, match="no window of equal cost"):
        costs.window_at_equal_cost(model, ids, Reading("window", 32))


def test_times_are_measured_in_turn_and_the_model_is_left_as_it_was(model):
    ids = np.full(128, 5, np.int32)
    model.train()
    cost = costs.reading_cost(model, ids, [Reading(), Reading("window", KEYS)], repeats=2)
    assert model.training and {len(s) for s in cost.seconds.values()} == {2} and cost.tokens == 128
    assert all(second > 0 for s in cost.seconds.values() for second in s)
    model.eval()


# -- beside the detectors of a pilot --------------------------------------------------------------------------------


def test_scores_on_the_grid_of_a_timeline_are_what_a_pilot_takes(model, tmp_path):
    data = write_folder(tmp_path / "data", log_lines(80), wide_readings(60), split=(300, 360))
    vocabulary = LogVocabulary.fit(data, VocabularySettings(sensor_bins=8))
    stream = token_streams(data, vocabulary_tokenizer(vocabulary), vocabulary, grid=GridSettings(40.0))["press"]
    timeline = timeline_from_dataset(data, "press", step_seconds=20.0, faults=[])
    measured = surprise(model, stream, READING)
    states = states_at(data, "press", measured.times)
    train_end = int(timeline.times[timeline.train_steps - 1]) + timeline.step
    scored = SurpriseBaseline.fit(measured, states, train_end, least=5).score(measured, states)
    scores = scores_on_grid(measured.times, scored.scores, timeline.times)
    check_scores(scores, len(timeline))
    assert step_states(model, stream, timeline.times, READING).shape == (len(timeline), 64)
