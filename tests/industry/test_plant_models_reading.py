"""Reading in windows: nothing ahead is seen, windows give what one long pass gives, and every token has its past."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.event_folders import log_lines, vocabulary_tokenizer, wide_readings, write_folder

from hf_sparse_attn.data.model_inputs import NonFiniteError
from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.plant_models.stream_reading import Reading, read, reading_call, windows
from hf_sparse_attn.industry.plant_models.surprise import surprise, window_nats
from hf_sparse_attn.industry.representation.log_tokens import token_streams
from hf_sparse_attn.industry.representation.log_vocabulary import LogVocabulary, VocabularySettings
from hf_sparse_attn.industry.representation.sensor_patches import GridSettings
from hf_sparse_attn.industry.representation.token_segments import Kind
from hf_sparse_attn.models.attach import routers

KEYS = 80  # of REAL_BUDGET: five blocks, two of them selected
READINGS = [Reading("dense"), Reading("sparse", KEYS), Reading("window", KEYS), Reading("sparse")]
names = [reading.name for reading in READINGS]


@pytest.fixture(scope="module")
def model(sparse_llama, real_budget):
    return sparse_llama(real_budget, noise=0.3)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    data = write_folder(tmp_path_factory.mktemp("plant") / "data", log_lines(60), wide_readings(40))
    vocabulary = LogVocabulary.fit(data, VocabularySettings(sensor_bins=8))
    tokenizer = vocabulary_tokenizer(vocabulary)
    assert len(tokenizer) < 97  # what the tiny models know
    return token_streams(data, tokenizer, vocabulary, grid=GridSettings(20.0))["press"]


def in_windows(reading, length, past):
    return dataclasses.replace(reading, length=length, past=past)


def nats_of(model, ids, reading, **options):
    found = [window_nats(model, ids, window) for window in read(model, ids, reading, **options)]
    return np.concatenate([tokens for tokens, _ in found]), np.concatenate([nats for _, nats in found])


def random_ids(tokens, seed=0):
    return np.random.default_rng(seed).integers(3, 97, tokens).astype(np.int32)


@pytest.mark.parametrize("reading", READINGS, ids=names)
def test_what_comes_later_changes_no_earlier_surprise(model, reading):
    ids, reading = random_ids(330), in_windows(reading, 200, 90)
    _, before = nats_of(model, ids, reading)
    for cut in (1, 57, 199, 200, 203, 310, 329):
        changed = np.concatenate([ids[:cut], random_ids(400, seed=cut)])  # also a longer stream
        _, after = nats_of(model, changed, reading)
        # the first cut tokens give cut − 1 predictions
        assert np.allclose(before[: cut - 1], after[: cut - 1], atol=2e-5)
        assert not np.allclose(before[cut - 1 : 329], after[cut - 1 : 329], atol=1e-3)


def test_tiles_that_share_a_selection_do_look_ahead_which_is_why_queries_are_routed_singly(model):
    reading = dataclasses.replace(in_windows(READINGS[1], 200, 90), singly=False)
    ids, changed = random_ids(200), random_ids(200)
    changed[199:] = 5
    ids[199:] = 7
    moved = np.abs(nats_of(model, ids, reading)[1] - nats_of(model, changed, reading)[1])[:198]
    assert moved[192:].max() > 1e-3 and moved[: 192 - 1].max() < 1e-5  # the last tile of 16 begins at 192


@pytest.mark.parametrize("reading", READINGS, ids=names)
def test_one_window_over_all_gives_the_model_s_own_log_likelihoods(model, reading):
    ids = random_ids(190)
    tokens, nats = nats_of(model, ids, in_windows(reading, 256, 128))
    with torch.no_grad(), reading_call(model, reading) as call:
        row = torch.from_numpy(ids.astype(np.int64))[None]
        logits = model(row, **call).logits[0].float().log_softmax(-1)
    expected = -logits[:-1].gather(1, row[0, 1:, None])[:, 0].numpy()
    assert tokens.tolist() == list(range(1, 190))
    assert np.allclose(nats, expected, atol=2e-5)


@pytest.mark.parametrize("reading", READINGS, ids=names)
def test_overlapping_windows_that_hold_all_a_token_needs_give_the_nats_of_one_long_pass(model, reading):
    # tokens beyond the first window are read from their last ``past`` tokens at least
    ids = random_ids(260)
    reading = in_windows(reading, 160, 100)
    tokens, nats = nats_of(model, ids, reading)
    assert tokens.tolist() == list(range(1, 260))
    for start, first, stop in windows(260, reading):
        _, alone = nats_of(model, ids[start:stop], in_windows(reading, 160, 100))
        assert np.allclose(nats[max(first, 1) - 1 : stop - 1], alone[max(first, 1) - start - 1 :], atol=2e-5)


def test_a_window_sees_less_than_dense_attention_and_the_budget_is_kept(model):
    ids = random_ids(200)
    dense, sparse, window = (nats_of(model, ids, in_windows(r, 200, 100))[1] for r in READINGS[:3])
    assert np.allclose(dense[: KEYS - 16], window[: KEYS - 16], atol=2e-5)  # all is visible still
    assert np.abs(dense - window).max() > 1e-2 and np.abs(window - sparse).max() > 1e-2
    everything = in_windows(Reading("window", 208), 200, 100)
    assert np.allclose(nats_of(model, ids, everything)[1], dense, atol=2e-5)
    assert routers(model)[0].config.min_keys == KEYS and routers(model)[0].config.max_keys is None  # as it was


@pytest.mark.parametrize(("tokens", "length", "past"), [(1, 8, 3), (8, 8, 3), (9, 8, 7), (100, 8, 1), (100, 16, 11)])
def test_every_token_is_new_once_and_has_its_past(tokens, length, past):
    read_once = []
    for start, first, stop in windows(tokens, Reading(length=length, past=past)):
        assert stop - start <= length
        read_once += range(first, stop)
        assert all(token - start >= min(past, token) for token in range(first, stop))
    assert read_once == list(range(tokens))


def test_a_token_in_front_predicts_the_first_one(model):
    ids = random_ids(120)
    reading = Reading(length=64, past=32)
    tokens, nats = nats_of(model, ids, reading, bos=1)
    assert tokens.tolist() == list(range(120))
    with torch.no_grad():
        row = torch.from_numpy(np.concatenate([[1], ids[:63]]).astype(np.int64))[None]
        logits = model(row).logits[0].log_softmax(-1)
    assert np.allclose(nats[:63], -logits[:-1].gather(1, row[0, 1:, None])[:, 0].numpy(), atol=2e-5)


def test_surprise_of_segments_is_the_sum_of_their_tokens_with_time_kind_and_window(model, stream):
    reading = Reading(length=96, past=40)
    measured = surprise(model, stream, reading)
    tokens, nats = nats_of(model, stream.ids, reading)
    firsts = [*stream.segments["first"].to_list(), len(stream)]
    by_token = dict(zip(tokens.tolist(), nats, strict=True))
    spans = list(windows(len(stream), reading))
    assert len(measured) == len(stream.segments) and len(spans) > 3
    for at, (first, stop) in enumerate(pairwise(firsts)):
        mine = [by_token[token] for token in range(first, stop) if token in by_token]
        assert math.isclose(sum(mine), measured.nats[at], rel_tol=1e-6) and len(mine) == measured.tokens[at]
        assert measured.window_starts[at] == next(s for s, new, end in spans if new <= first < end)
        place = stream.place(first)
        assert measured.times[at] == place.stop - 1
        assert (measured.kinds[at] == Kind.STEP) == bool(place.channels)
    assert measured.tokens.sum() == len(stream) - 1 and set(measured.kinds) == {Kind.LINE, Kind.STEP}


def test_stock_models_are_read_densely_alone(stock_llama, stream):
    stock = stock_llama()
    assert np.isfinite(surprise(stock, stream, Reading(length=64, past=32)).nats).all()
    with pytest.raises(PlantDataError, match=r"has no routers.*\(3\) read it densely"):
        surprise(stock, stream, Reading("sparse", KEYS, 64, 32))


def test_a_model_that_would_run_all_windows_densely_is_not_called_sparse(sparse_llama, real_budget, stream):
    large = sparse_llama({**real_budget, "dense_below": 2048}, noise=0.3)
    with pytest.raises(PlantDataError, match=r"fewer than dense_below=2048 tokens densely, so all windows of 160"):
        surprise(large, stream, Reading("sparse", None, 160, 100))
    dense = surprise(large, stream, Reading("dense", None, 160, 100)).nats
    assert np.abs(surprise(large, stream, Reading("sparse", KEYS, 160, 100)).nats - dense).max() > 1e-3


def test_reading_leaves_the_model_in_its_mode_and_with_its_budget(model, stream):
    model.train()
    with pytest.raises(ValueError, match="min_keys"):
        surprise(model, stream, Reading("window", 16, 64, 32))  # less than what is forced
    surprise(model, stream, Reading("window", KEYS, 64, 32))
    assert model.training and routers(model)[0].config.max_keys is None
    model.eval()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length": 1, "past": 0}, "windows of 1 tokens"),
        ({"length": 8, "past": 8}, "8 before it"),
        ({"length": 8, "past": 0}, "take a past of 1 or more"),
        ({"keys": 64}, "dense attention reads all keys"),
        ({"attends": "oracle"}, "attends is 'oracle'"),
    ],
)
def test_impossible_readings_are_refused(values, message):
    with pytest.raises(PlantDataError, match=message):
        Reading(**values)


def test_tokens_that_the_model_does_not_know_and_states_that_are_no_numbers_are_refused(stock_llama):
    stock = stock_llama()
    with pytest.raises(PlantDataError, match="embeddings of 0 to 96"):
        list(read(stock, np.array([3, 97], np.int32), Reading()))
    with torch.no_grad():
        stock.model.norm.weight[0] = torch.nan
    with pytest.raises(NonFiniteError, match="after token 0 of a window of 2"):
        list(read(stock, np.array([3, 4], np.int32), Reading()))
