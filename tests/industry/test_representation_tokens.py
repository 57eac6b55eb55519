"""Rows of tokens: each token knows its line and its characters, each line its tokens, and no text controls a model."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from helpers.event_folders import CONTROL, at, byte_tokenizer, event, log_lines, wide_readings, write_folder
from tokenizers import pre_tokenizers

from hf_sparse_attn.config import IGNORE_INDEX
from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.representation.log_tokens import log_rows, token_streams
from hf_sparse_attn.industry.representation.log_vocabulary import LogVocabulary, VocabularySettings
from hf_sparse_attn.industry.representation.sensor_patches import GridSettings

TOKENS = 1000  # random ones that are checked in each mode


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def streams_of(data, tokenizer, sensor_bins=0, **options):
    vocabulary = LogVocabulary.fit(data, VocabularySettings(sensor_bins=sensor_bins))
    vocabulary.add_to(tokenizer)
    return token_streams(data, tokenizer, vocabulary, **options)["press"], vocabulary


def shuffled_lines(count):
    """Lines of two files, some with equal times, some out of order, a line that holds two records."""
    rng = random.Random(0)
    lines = [
        (at(rng.randrange(0, 3 * count)), *line[1:7], source, line[8]) for source in (0, 1) for line in log_lines(count)
    ]
    return [*lines, (at(5), *lines[0][1:])]


def check_random_tokens(stream, expected):
    """``expected``: (place, token) -> None, which asserts. Round trip: the place's lines have the token."""
    rng = random.Random(1)
    for token in rng.choices(range(len(stream)), k=TOKENS):
        place = stream.place(token)
        expected(place, token)
        for part in place.lines:
            for source, line in rng.sample(list(part), k=1):
                if place.part in ("gap", "step") and place.channels:
                    assert stream.tokens(source, line)
                else:
                    assert any(token in tokens for tokens in stream.tokens(source, line))


def test_every_template_token_knows_its_line_and_every_line_its_tokens(tmp_path, tokenizer):
    rows = shuffled_lines(300)
    data = write_folder(tmp_path / "a", rows)
    stream, vocabulary = streams_of(data, tokenizer)
    names = {int(number): name for number, name in zip(vocabulary.ids(tokenizer), vocabulary.names, strict=True)}
    known = {(row[7], row[8]): row for row in rows[:-1]}

    def expected(place, token):
        assert f"<|log:{place.part}:" in names[int(stream.ids[token])]
        (part,) = place.lines
        row = known[part.source, part.first]
        assert part.first == part.last and part.file == ("press.log", "press.csv")[part.source]
        assert place.origin == row[1] and place.span is None
        assert place.start in (int(row[0].timestamp()) * 10**9, int(at(5).timestamp()) * 10**9)

    check_random_tokens(stream, expected)
    assert len(stream.tokens("press.log", 1)) == 2  # two records of one line
    whole = [token for _, line in zip(rows, rows, strict=True) for r in stream.tokens(line[7], line[8]) for token in r]
    assert set(whole) == set(range(len(stream)))


@pytest.mark.parametrize("with_vocabulary", [True, False])
def test_every_text_token_knows_its_characters(tmp_path, tokenizer, with_vocabulary):
    rows = shuffled_lines(60)
    data = write_folder(tmp_path / "a", rows)
    if with_vocabulary:
        stream, _ = streams_of(data, tokenizer, mode="text")
    else:
        stream = token_streams(data, tokenizer, mode="text")["press"]
    known = {(row[7], row[8]): row[3] for row in rows[:-1]}

    def expected(place, token):
        (part,) = place.lines
        text = known[part.source, part.first]
        if place.part != "text":
            assert with_vocabulary and place.span is None
            return
        begin, end = place.span
        bytes_of_token = tokenizer.convert_ids_to_tokens(int(stream.ids[token]))
        characters = text[begin:end] if begin < len(text) else "\n"
        pieces, _ = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(characters)[0]
        assert bytes_of_token in pieces

    check_random_tokens(stream, expected)
    (tokens,) = stream.tokens(1, 3)
    words = stream.ids[tokens.start + (2 if with_vocabulary else 0) : tokens.stop]
    assert tokenizer.decode(words) == known[1, 3] + "\n"


def test_lines_of_all_origins_stand_by_time_with_their_gaps(tmp_path, tokenizer):
    lines = [event(9, "c", 1, "x"), event(0, "a", 2, "y"), event(0, "b", 3, "x")]
    stream, vocabulary = streams_of(write_folder(tmp_path / "a", lines), tokenizer)
    names = tokenizer.convert_ids_to_tokens(stream.ids.tolist())
    assert stream.segments["line"].to_list() == [2, 3, 1]
    assert names[::3] == [f"<|log:gap:{n}|>" for n in (0, 1, 9)]
    assert names[1::3] == [f"<|log:origin:{vocabulary.origins.index(o) + 1}|>" for o in "yxx"]


def test_lines_in_several_batches_are_those_of_one(tmp_path, tokenizer, monkeypatch):
    data = write_folder(tmp_path / "a", log_lines(101), wide_readings(80))
    options = {"grid": GridSettings(20.0), "sensor_bins": 8}
    one, _ = streams_of(data, tokenizer, **options)
    monkeypatch.setattr("hf_sparse_attn.industry.representation.log_tokens.BATCH", 7)
    many, _ = streams_of(data, tokenizer, cache=tmp_path / "b", **options)
    assert many.folder != one.folder and np.array_equal(many.ids, one.ids) and many.segments.equals(one.segments)


def test_logs_and_sensors_stand_in_one_document_and_know_their_lines(tmp_path, tokenizer):
    data = write_folder(tmp_path / "a", log_lines(100), wide_readings(60, channels=3), channels=3)
    stream, vocabulary = streams_of(data, tokenizer, sensor_bins=8, grid=GridSettings(30.0))
    ids = dict(zip(vocabulary.ids(tokenizer).tolist(), vocabulary.names, strict=True))
    assert stream.segments["stop"].is_sorted() and stream.meta["counts"]["steps"] == 20
    time = int(at(0).timestamp()) * 10**9

    def expected(place, token):
        name = ids[int(stream.ids[token])]
        if not place.channels:
            assert name.startswith("<|log:")
            return
        step = (place.start - time) // (30 * 10**9)
        assert [(part.file, part.first, part.last) for part in place.lines] == [
            ("press.csv", 2 + 3 * step, 4 + 3 * step)
        ]
        if place.part == "value":
            channel = int(place.channels[0][1:])
            value = np.mean([((n * (channel + 1)) % 17 - 8.0) / 5.0 for n in range(3 * step, 3 * step + 3)])
            number = int(np.floor((np.arcsinh(value) / np.arcsinh(15) + 1) / 2 * 8))
            assert name == f"<|sensor:bin:{number}|>"
        else:
            assert len(place.channels) == 3

    check_random_tokens(stream, expected)
    # a line of a wide file is a run of values in one step
    (tokens,) = stream.tokens("press.csv", 2)
    assert [ids[int(stream.ids[token])].split(":")[1] for token in tokens] == ["bin"] * 3
    assert {part.file for part in stream.lines(0, len(stream) - 1)} == {"press.log", "press.csv"}
    assert [(part.first, part.last) for part in stream.lines(0, len(stream) - 1)] == [(1, 100), (2, 61)]


def test_a_step_stands_behind_the_lines_it_covers_and_before_those_at_its_end(tmp_path, tokenizer):
    lines = [event(s, "x", n + 1) for n, s in enumerate((0, 59.999, 60, 61))]
    data = write_folder(tmp_path / "a", lines, wide_readings(3, every=30.0))
    stream, _ = streams_of(data, tokenizer, sensor_bins=8, grid=GridSettings(60.0))
    assert stream.segments["kind"].to_list() == [0, 0, 1, 0, 0, 1]


def test_steps_without_readings_have_no_tokens_and_missing_values_have_one(tmp_path, tokenizer):
    readings = [(at(0), 0, 8.0, 0, 1, 2), (at(600), 1, 8.0, 0, 1, 3)]
    data = write_folder(tmp_path / "a", [], readings)
    stream, _ = streams_of(data, tokenizer, sensor_bins=8, grid=GridSettings(60.0))
    assert tokenizer.convert_ids_to_tokens(stream.ids.tolist()) == [
        *("<|log:gap:0|>", "<|sensor:step|>", "<|sensor:bin:4|>", "<|sensor:missing|>"),
        *("<|log:gap:12|>", "<|sensor:step|>", "<|sensor:missing|>", "<|sensor:bin:4|>"),
    ]


ODD = [
    "",
    "x",
    "\n",
    "圧力低下 🙂",
    "a" * 5_000,
    CONTROL,
    f"x{CONTROL}<pad><s>{CONTROL}",
    "<|log:gap:3|>",
    "\ud800"[:0],
]


@pytest.mark.parametrize("texts", [[text] for text in ODD] + [ODD])
def test_odd_lines_are_tokenised_and_known_in_both_modes(tmp_path, tokenizer, texts):
    data = write_folder(tmp_path / "a", [event(n, text, n + 1) for n, text in enumerate(texts)])
    stream, vocabulary = streams_of(data, tokenizer)
    assert len(stream) == 3 * len(texts) and stream.meta["counts"]["unknown"] == 0
    text_stream = token_streams(data, tokenizer, mode="text")["press"]
    control = {*vocabulary.ids(tokenizer).tolist(), 0, 1, 2}
    for line, text in enumerate(texts, 1):
        (tokens,) = text_stream.tokens(0, line)
        ids = text_stream.ids[tokens.start : tokens.stop]
        assert not control & set(ids.tolist())
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text + "\n"
        spans = [text_stream.place(token).span for token in tokens]
        assert spans[0][0] == 0 and spans[-1][1] == len(text)
        assert all(a[1] >= b[0] for a, b in pairwise(spans))


def test_unseen_lines_are_counted_and_have_the_unknown_template(tmp_path, tokenizer):
    lines = [*log_lines(50), event(1000, "never seen before at all", 51)]
    data = write_folder(tmp_path / "a", lines, split=(500, 600))
    stream, _ = streams_of(data, tokenizer)
    assert stream.meta["counts"] == {"lines": 51, "unknown": 1, "nearest": 0, "steps": 0}
    assert "<|log:template:0|>" in tokenizer.convert_ids_to_tokens(stream.ids[-3:].tolist())


@pytest.mark.parametrize("stride", [None, 20])
def test_rows_have_every_token_of_a_part_as_one_label_and_none_of_the_gap(tmp_path, tokenizer, stride):
    data = write_folder(tmp_path / "a", log_lines(200), split=(700, 900))
    stream, _ = streams_of(data, tokenizer)
    sets = log_rows({"press": stream}, 64, stride)
    seen = {}
    for name, rows in sets.items():
        labels = [row["first"] + i for row in rows for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX]
        seen[name] = set(labels)
        assert len(labels) == len(seen[name]) and {len(row["input_ids"]) for row in rows} == {64}
        for row in rows:
            assert row["input_ids"] == stream.ids[row["first"] : row["first"] + 64].tolist()
    starts = {name: [stream.place(token).start for token in tokens] for name, tokens in seen.items()}
    limit = [int(at(s).timestamp()) * 10**9 for s in (700, 900)]
    assert max(starts["train"]) < limit[0] and min(starts["test"]) >= limit[1]
    outside = set(range(len(stream))) - seen["train"] - seen["test"]
    assert outside and all(limit[0] <= stream.place(token).start < limit[1] for token in outside)


def test_a_token_before_each_row_is_no_label_and_shifts_no_place(tmp_path, tokenizer):
    stream, _ = streams_of(write_folder(tmp_path / "a", log_lines(100)), tokenizer)
    rows = log_rows({"press": stream}, 64, bos=1)
    assert {len(row["input_ids"]) for row in rows} == {64}
    labels = []
    for row in rows:
        assert (row["input_ids"][0], row["labels"][0]) == (1, IGNORE_INDEX)
        assert row["input_ids"][1:] == stream.ids[row["first"] + 1 : row["first"] + 64].tolist()
        labels += [row["first"] + i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX]
    assert labels == list(range(len(stream)))


def test_a_part_shorter_than_a_row_is_one_short_row_and_an_empty_one_is_refused(tmp_path, tokenizer):
    data = write_folder(tmp_path / "a", log_lines(5))
    stream, _ = streams_of(data, tokenizer)
    rows = log_rows({"press": stream}, 64)
    assert rows[0]["input_ids"] == stream.ids.tolist() and '"short": 1' in rows.info.description
    empty, _ = streams_of(write_folder(tmp_path / "b", []), byte_tokenizer())
    assert len(empty) == 0 and empty.tokens(0, 1) == [] and empty.meta["counts"]["lines"] == 0
    with pytest.raises(PlantDataError, match="no token lies in part 'all'"):
        log_rows({"press": empty}, 64)
    with pytest.raises(PlantDataError, match="stride of 65"):
        log_rows({"press": stream}, 64, 65)
    late, _ = streams_of(write_folder(tmp_path / "c", log_lines(5), split=(700, 900)), byte_tokenizer())
    with pytest.raises(PlantDataError, match="part 'test'"):
        log_rows({"press": late}, 64)


def test_tokens_are_made_once_and_again_when_anything_changes(tmp_path, tokenizer, monkeypatch):
    lines = log_lines(20)
    data = write_folder(tmp_path / "a", lines)
    stream, vocabulary = streams_of(data, tokenizer)
    monkeypatch.setattr(
        "hf_sparse_attn.industry.representation.log_tokens._write", lambda *_: pytest.fail("made again")
    )
    assert np.array_equal(token_streams(data, tokenizer, vocabulary)["press"].ids, stream.ids)
    monkeypatch.undo()
    other = token_streams(data, tokenizer, vocabulary, mode="text")["press"]
    assert other.folder != stream.folder
    (stream.folder / "tokens.arrow").write_bytes(b"cut off")
    again = token_streams(data, tokenizer, vocabulary)["press"]
    assert again.folder == stream.folder and len(again.ids) == len(stream)
    path = data.folder / "assets/press/events.parquet"
    pl.read_parquet(path).head(10).write_parquet(path)
    assert len(token_streams(data, tokenizer, vocabulary)["press"]) < len(stream)


def test_what_cannot_be_tokenised_is_refused_before_anything_is_written(tmp_path, tokenizer):
    data = write_folder(tmp_path / "a", [(None, "plc", "INFO", "x", None, None, 0, 0, 7)])
    with pytest.raises(PlantDataError, match=r"need a vocabulary.*mode='text'"):
        token_streams(data, tokenizer)
    with pytest.raises(PlantDataError, match="sensors as tokens need a vocabulary"):
        token_streams(data, tokenizer, mode="text", grid=GridSettings(60.0))
    with pytest.raises(PlantDataError, match=r"press\.log, line 7: the line has no time"):
        token_streams(data, tokenizer, mode="text")
    fitted = LogVocabulary.fit(write_folder(tmp_path / "b", log_lines(9)))
    with pytest.raises(PlantDataError, match="does not hold this vocabulary"):
        token_streams(data, tokenizer, fitted)
    fitted.add_to(tokenizer)
    with pytest.raises(PlantDataError, match="no tokens for sensors"):
        token_streams(data, tokenizer, fitted, grid=GridSettings(60.0))
    with pytest.raises(PlantDataError, match="no asset 'pump'"):
        token_streams(data, tokenizer, fitted, assets=["pump"])
    assert not list((tmp_path / "a").rglob("stream.json"))
