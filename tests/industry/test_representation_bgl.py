"""The log of a Blue Gene/L machine (LogHub, 2,000 lines) as tokens: few, and each known to its line."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import polars as pl
import pytest
from helpers.event_folders import byte_tokenizer
from helpers.paths import DATA
from tokenizers import pre_tokenizers

from hf_sparse_attn.industry.dataset import EVENTS, Manifest, PlantDataset, Source
from hf_sparse_attn.industry.representation.log_tokens import token_streams
from hf_sparse_attn.industry.representation.log_vocabulary import LogVocabulary

LOG = DATA / "loghub" / "BGL_2k.log"
pytestmark = pytest.mark.skipif(not LOG.is_file(), reason=f"{LOG} is not there")


@pytest.fixture(scope="module")
def raw():
    return LOG.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def plant(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bgl")
    rows = []
    for number, line in enumerate(raw, 1):
        label, _, _, node, time, _, _, _, level, *text = line.split(" ", 9)
        moment = datetime.strptime(time, "%Y-%m-%d-%H.%M.%S.%f").replace(tzinfo=UTC)
        rows.append((moment, node, level, " ".join(text), None, label, 0, 0, number))
    (folder / "assets/bgl").mkdir(parents=True)
    pl.DataFrame(rows, schema=EVENTS, orient="row").write_parquet(folder / "assets/bgl/events.parquet")
    Manifest(["bgl"], [Source(LOG.name, "text", "00", LOG.stat().st_size, len(raw))], []).write(folder)
    return PlantDataset(folder)


def test_a_line_takes_a_tenth_of_the_tokens_of_its_text_and_no_line_is_unknown(raw, plant):
    tokenizer = byte_tokenizer()
    vocabulary = LogVocabulary.fit(plant)
    vocabulary.add_to(tokenizer)
    stream = token_streams(plant, tokenizer, vocabulary)["bgl"]
    # any byte-level tokenizer that splits words as GPT-2 does takes at least one token for each
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    least = sum(len(words.pre_tokenize_str(line)) for line in raw)
    assert least >= 10 * len(stream) and len(stream) <= 4 * len(raw)
    assert stream.meta["counts"]["unknown"] == 0 and 50 < len(vocabulary.miner.templates) < 200


def test_a_thousand_random_tokens_know_their_lines_in_both_modes(raw, plant):
    tokenizer = byte_tokenizer()
    vocabulary = LogVocabulary.fit(plant)
    vocabulary.add_to(tokenizer)
    for mode in ("template", "text"):
        stream = token_streams(plant, tokenizer, vocabulary, mode=mode)["bgl"]
        for token in random.Random(0).choices(range(len(stream)), k=1000):
            place = stream.place(token)
            (part,) = place.lines
            line = raw[part.first - 1]
            assert place.origin == line.split(" ")[3] and any(token in r for r in stream.tokens(0, part.first))
            if place.span and place.span[0] < place.span[1]:
                begin, end = place.span
                text = line.split(" ", 9)[9]
                assert tokenizer.decode([stream.ids[token]]) == text[begin:end]
