"""Rows of training data: which tokens are where, what is cut, padded and dropped."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_attn.data.packing import IGNORE_INDEX, Packer, PackingOptions, PackingReport
from hf_sparse_attn.data.sources import SourceError

PAD = 0


def numbered(lengths):
    """Documents whose tokens are 1, 2, 3, … throughout."""
    ends = np.cumsum([0, *lengths])
    return [np.arange(1 + a, 1 + b, dtype=np.int32) for a, b in itertools.pairwise(ends)]


def fed(packer, documents, part=None):
    """Rows of documents that come in parts of ``part`` tokens."""
    rows = []
    for ids in documents:
        parts = [ids[i : i + part] for i in range(0, len(ids), part)] if part and len(ids) else [ids]
        for i, some in enumerate(parts):
            rows += packer.add(some, i == len(parts) - 1)
    packer.finish()
    return rows


def packed(lengths, length, block_size, part=None, **options):
    packer = Packer(PackingOptions(length, block_size, **options), PAD)
    return fed(packer, numbered(lengths), part), packer.report


def segments(row):
    """Tokens of each document in a row, padding left out."""
    starts = [*np.flatnonzero(row["position_ids"] == 0), len(row["input_ids"])]
    result = [row["input_ids"][a:b] for a, b in itertools.pairwise(starts)]
    return [ids for ids in result if ids[0] != PAD]


def same(rows, others):
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys() and all(np.array_equal(row[key], other[key]) for key in row)


sizes = st.lists(st.integers(0, 150), max_size=25)
shapes = st.sampled_from([(16, 16), (32, 16), (48, 16), (64, 8), (64, 64), (7, 1)])


@given(sizes, shapes)
def test_every_token_is_in_one_row_in_order_or_counted_as_dropped(lengths, shape):
    rows, report = packed(lengths, *shape)
    kept = np.concatenate([ids for row in rows for ids in segments(row)]) if rows else np.empty(0)
    assert np.array_equal(kept, np.arange(1, len(kept) + 1))
    assert report.tokens == sum(lengths) == len(kept) + report.dropped and report.dropped < shape[0]
    assert report.rows == len(rows) and report.padding == sum(int((row["input_ids"] == PAD).sum()) for row in rows)
    assert report.tokens + report.padding == report.rows * shape[0] + report.dropped


@given(sizes, shapes)
def test_rows_have_one_length_and_labels_for_all_but_first_tokens_and_padding(lengths, shape):
    for row in packed(lengths, *shape)[0]:
        assert list(row) == ["input_ids", "position_ids", "labels"]
        assert all(values.shape == (shape[0],) and values.dtype == np.int64 for values in row.values())
        unlearned = (row["position_ids"] == 0) | (row["input_ids"] == PAD)
        assert np.array_equal(row["labels"], np.where(unlearned, IGNORE_INDEX, row["input_ids"]))
        assert row["position_ids"][0] == 0 and set(np.diff(row["position_ids"])[row["position_ids"][1:] != 0]) <= {1}


@given(sizes, shapes)
def test_a_segment_holds_tokens_of_one_document_only(lengths, shape):
    document = np.repeat(np.arange(len(lengths)), lengths)  # of each token
    for row in packed(lengths, *shape)[0]:
        result = segments(row)
        owners = [set(document[ids - 1]) for ids in result]
        assert all(len(owner) == 1 for owner in owners)
        # and each has one segment in a row
        assert [min(owner) for owner in owners] == sorted({min(owner) for owner in owners})


@given(sizes, st.sampled_from([(32, 16), (48, 16), (64, 8)]))
def test_a_document_is_never_cut_into_parts_shorter_than_a_block(lengths, shape):
    length, block = shape
    rows, _ = packed(lengths, length, block)
    document = np.repeat(np.arange(len(lengths)), lengths)
    for row in rows:
        for ids in segments(row):
            assert len(ids) >= block or len(ids) == lengths[document[ids[0] - 1]]
        assert (row["input_ids"] == PAD).sum() < 2 * block


@given(sizes, shapes, st.integers(1, 200), st.booleans())
def test_parts_make_the_same_rows_as_whole_documents(lengths, shape, part, pad):
    whole, report = packed(lengths, *shape, pad=pad)
    rows, other = packed(lengths, *shape, part, pad=pad)
    same(rows, whole)
    assert report == other


@given(sizes, shapes, st.integers(0, 25), st.booleans())
def test_a_packer_goes_on_from_a_state_that_went_through_json(lengths, shape, stop, pad):
    documents, options = numbered(lengths), PackingOptions(*shape, pad=pad)
    whole, report = packed(lengths, *shape, pad=pad)
    first = Packer(options, PAD)
    rows = [row for ids in documents[:stop] for row in first.add(ids, True)]
    second = Packer(options, PAD)
    second.load_state(json.loads(json.dumps(first.state())))
    same(rows + fed(second, documents[stop:]), whole)
    assert second.report == report


@given(sizes, shapes)
def test_padded_rows_hold_one_part_of_a_document_each(lengths, shape):
    length, block = shape
    rows, report = packed(lengths, length, block, pad=True)
    document = np.repeat(np.arange(len(lengths)), lengths)
    kept = []
    for row in rows:
        assert list(row) == ["input_ids", "attention_mask", "labels"]
        count = int(row["attention_mask"].sum())
        assert np.array_equal(row["attention_mask"], np.arange(length) < count)
        ids = row["input_ids"][:count]
        assert len(set(document[ids - 1])) == 1 and (row["input_ids"][count:] == PAD).all()
        assert (
            row["labels"][0] == IGNORE_INDEX
            and (row["labels"][count:] == IGNORE_INDEX).all()
            and (row["labels"][1:count] == ids[1:]).all()
        )
        kept += ids.tolist()
    assert kept == list(range(1, sum(lengths) + 1)) and report.dropped == 0
    assert report.tokens + report.padding == report.rows * length


def test_a_long_document_fills_whole_rows_and_its_rest_is_packed_with_the_next():
    rows, report = packed([80, 40, 8], 32, 16)
    assert [[len(ids) for ids in segments(row)] for row in rows] == [[32], [32], [16, 16], [24, 8]]
    assert report == PackingReport(tokens=128, rows=4)


def test_a_tail_shorter_than_a_block_takes_a_block_along():
    rows, report = packed([40, 16], 32, 16)
    assert [[len(ids) for ids in segments(row)] for row in rows] == [[24], [16, 16]] and report.padding == 8
    assert (
        rows[0]["position_ids"].tolist() == [*range(24), *range(8)] and (rows[0]["labels"][24:] == IGNORE_INDEX).all()
    )


def test_what_does_not_fill_a_row_is_dropped_and_counted():
    rows, report = packed([40], 64, 16)
    assert rows == [] and report == PackingReport(tokens=40, dropped=40)


def test_a_packer_keeps_no_more_than_a_row_and_a_block():
    packer = Packer(PackingOptions(64, 16), PAD)
    for _ in range(50):
        list(packer.add(np.ones(1000, np.int32), False))
        state = packer.state()
        assert sum(map(len, state["parts"])) + len(state["waiting"]) < 64 + 16
        assert packer._waiting.base is None  # not a view of all that came in


@pytest.mark.parametrize(("length", "block"), [(100, 64), (0, 64), (-64, 64), (32, 64), (64, 0)])
def test_rows_that_do_not_hold_whole_blocks_are_refused(length, block):
    with pytest.raises(SourceError, match=f"length {length} is no multiple of block_size {block}"):
        PackingOptions(length, block)
