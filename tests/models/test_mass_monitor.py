"""A watch on the kept mass: it warns once, from what is known of a selection, and not before it is used."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from helpers.calls import Watching
from hf_sparse_attn_kernels import BlockSelection, TileGrid, block_mass
from transformers import DataCollatorWithFlattening

from hf_sparse_attn import MassMonitor, set_sparse_attention
from hf_sparse_attn.models.mass_monitor import kept_of_tiles
from hf_sparse_attn.training.router_loss import kept_mass

NEW = 12


@pytest.fixture
def sparse(sparse_llama, real_budget):
    return sparse_llama(real_budget, noise=0.1).eval()


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name.endswith("mass_monitor")]


@torch.no_grad()
def test_it_warns_once_and_names_layer_head_position_and_what_to_raise(sparse, token_ids, caplog):
    monitor = MassMonitor(sparse, floor=0.999)
    for _ in range(2):
        sparse(token_ids(1, 200), use_cache=False, sparse_call=monitor)
    (message,) = warnings_of(caplog)
    assert message == monitor.warning and "layer 0, KV head " in message and "raise min_keys (80)" in message
    assert "less than the floor of 0.999" in message and message.endswith("This is said once")
    # a new one says it again
    sparse(token_ids(1, 200), use_cache=False, sparse_call=MassMonitor(sparse, floor=0.999))
    assert len(warnings_of(caplog)) == 2


@torch.no_grad()
def test_below_its_floor_it_is_silent_and_changes_nothing(sparse, token_ids, caplog):
    ids, monitor = token_ids(1, 200), MassMonitor(sparse, floor=1e-6)
    assert torch.equal(sparse(ids, sparse_call=monitor).logits, sparse(ids).logits)
    assert monitor.warning is None and not warnings_of(caplog)


@torch.no_grad()
def test_the_estimate_is_the_mass_where_every_block_is_a_candidate(sparse_llama, real_budget, token_ids):
    """At full rank, all queries sampled and all blocks passed on, stage 2 knows the softmax mass."""
    changes = {"candidate_factor": 100.0, "index_dim": None, "query_samples": 16}
    model, seen = sparse_llama({**real_budget, **changes}).eval(), []

    def compare(router, inputs, selection):
        grid = selection.grid
        tiles = torch.arange(grid.tiles)
        truth = kept_mass(block_mass(inputs.q, inputs.k, grid, tiles, inputs.scale), selection.indices)
        for mass, head, position in kept_of_tiles(selection).tolist():
            seen.append(abs(mass - float(truth[0, int(head), int(position) // grid.query_tile])))

    model(token_ids(1, 200), use_cache=False, sparse_call=Watching(selection=compare))
    # tiles from the sixth on see more than five blocks
    assert len(seen) == 2 * 2 * 8 and max(seen) < 1e-4


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_hands_it_on(sparse, token_ids, cache):
    """Prefill is judged first; where it has nothing to cut, the first step that has."""
    ids = token_ids(1, 150)
    options = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": cache}
    options |= {"attention_mask": torch.ones_like(ids)}
    monitor = MassMonitor(sparse, floor=0.999)
    want = sparse.generate(ids, **options)
    assert torch.equal(sparse.generate(ids, **options, sparse_call=monitor), want) and monitor.warning is not None
    short, monitor = ids[:, :78], MassMonitor(sparse, floor=1.0)
    sparse.generate(short, **{**options, "attention_mask": torch.ones_like(short)}, sparse_call=monitor)
    position = int(monitor.warning.split("position ")[1].split(":")[0])
    assert 78 <= position < 78 + NEW


def test_generate_still_refuses_what_it_does_not_know(sparse, token_ids):
    with pytest.raises(ValueError, match=r"not used by the model: \['sparse_cal'\]"):
        sparse.generate(token_ids(1, 20), max_new_tokens=1, sparse_cal=MassMonitor(sparse, floor=0.5))


@torch.no_grad()
def test_padded_and_packed_batches_are_watched_document_by_document(sparse, token_ids, left_padded):
    documents = [token_ids(1, n, seed=n)[0] for n in (40, 160)]
    ids, mask = left_padded(documents)
    padded, packed, alone = (MassMonitor(sparse, floor=0.999) for _ in range(3))
    sparse(ids, attention_mask=mask, use_cache=False, sparse_call=padded)
    batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": d.tolist()} for d in documents])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    sparse(**inputs, use_cache=False, sparse_call=packed)
    # the short document keeps all it sees, and positions are those of the long one alone
    sparse(documents[1][None], use_cache=False, sparse_call=alone)
    assert padded.warning == packed.warning == alone.warning is not None


def made(mass):
    """A selection of one KV head and single queries, each with this mass in one kept block."""
    scores = torch.tensor(mass)[None, None, :, None]
    grid = TileGrid(len(mass), 100 + len(mass), 1, 16)
    return BlockSelection(torch.zeros(scores.shape, dtype=torch.int32), grid, scores)


def test_of_a_calibrated_model_one_tile_in_twenty_may_keep_less(sparse, caplog):
    sparse.calibration = SimpleNamespace(mass=0.9)
    router = SimpleNamespace(layer=3, config=sparse.config.sparse_attention.settings)
    monitor = MassMonitor(sparse)
    assert (monitor.floor, monitor.share) == (0.9, 0.05)
    # decoding: a tile a call, judged when there are twenty
    for at in range(40):
        monitor.on_selection(router, None, made([0.5 if at % 20 == 7 else 0.95]))
    assert monitor.warning is None
    for at in range(20):
        assert monitor.warning is None
        monitor.on_selection(router, None, made([0.5 if at in (7, 9) else 0.95]))
    assert "(2 of 20 tiles do)" in monitor.warning and "calibrate the model with a larger mass" in monitor.warning
    # a floor that is given holds for every tile
    monitor = MassMonitor(sparse, floor=0.6)
    monitor.on_selection(router, None, made([0.95] * 30 + [0.5]))
    assert "position 130" in monitor.warning and "(1 of 31 tiles do)" in monitor.warning
    sparse.calibration = None


def test_tiles_that_keep_all_they_see_are_not_counted():
    selection = made([float("nan"), 0.7])
    assert kept_of_tiles(selection).tolist() == [[pytest.approx(0.7), 0.0, 101.0]]


def test_the_advice_names_what_decides(sparse):
    set_sparse_attention(sparse, mass_threshold=0.01)
    router = SimpleNamespace(layer=0, config=sparse.config.sparse_attention.settings)
    monitor = MassMonitor(sparse, floor=0.9)
    monitor.on_selection(router, None, made([0.5]))
    assert "lower mass_threshold (0.01)" in monitor.warning


def test_a_monitor_without_a_floor_or_a_model_is_refused(sparse, stock_llama):
    with pytest.raises(ValueError, match=r"floor is None, and the model has no calibration .*: give a floor such as"):
        MassMonitor(sparse)
    with pytest.raises(ValueError, match="has no routers"):
        MassMonitor(stock_llama(), floor=0.5)
    for wrong in ({"floor": 0.0}, {"floor": 1.5}, {"floor": 0.5, "share": 1.0}):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\] and in \[0, 1\)"):
            MassMonitor(sparse, **wrong)


def test_warnings_go_to_the_librarys_logger(sparse, token_ids, caplog):
    with caplog.at_level(logging.ERROR, logger="hf_sparse_attn"):
        sparse(token_ids(1, 200), use_cache=False, sparse_call=MassMonitor(sparse, floor=0.999))
    assert not warnings_of(caplog)
