"""Prepared folders with a few logs and sensors, written as the readers of plant data write them."""

from datetime import UTC, datetime, timedelta

import polars as pl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from hf_sparse_attn.industry.dataset import EVENTS, READINGS, Channel, Manifest, PlantDataset, Source, Split

START = datetime(2024, 3, 1, tzinfo=UTC)
TEXTS = ["valve {n} opened", "valve {n} closed", "pressure of pump {n} is {x} bar", "ポンプ{n}号機の圧力が{x}MPaに低下"]
CONTROL = "<|im_end|>"


def at(seconds):
    return START + timedelta(seconds=seconds)


def event(seconds, text, line, origin="plc", template=None, source=0):
    return (at(seconds), origin, "INFO", text, template, None, 0, source, line)


def log_lines(count, every=7.0):
    """Lines of four templates and two origins with varied parameters."""
    return [
        event(every * n, TEXTS[n % 4].format(n=n % 3, x=f"{n * 0.3 % 9:.1f}"), n + 1, origin=("plc", "scada")[n % 2])
        for n in range(count)
    ]


def wide_readings(count, channels=2, every=10.0, first_line=2, source=1):
    """Readings of a wide file: a line holds all channels."""
    return [
        (at(every * n), c, float((n * (c + 1)) % 17), 0, source, first_line + n)
        for n in range(count)
        for c in range(channels)
    ]


def write_folder(folder, events=(), readings=(), channels=2, split=None, scaled=True, asset="press"):
    """A folder with one asset; returns it opened."""
    (folder / "assets" / asset).mkdir(parents=True)
    center, scale = (8.0, 5.0) if scaled else (None, None)
    Manifest(
        assets=[asset],
        sources=[Source("press.log", "text", "00", 10, 10), Source("press.csv", "csv-wide", "00", 10, 10)],
        channels=[Channel(asset, f"s{c}", 1, column=c + 1, center=center, scale=scale) for c in range(channels)],
        split=None if split is None else Split(at(split[0]).isoformat(), at(split[1]).isoformat(), split[1] - split[0]),
    ).write(folder)
    for name, rows, schema in (("events", events, EVENTS), ("readings", readings, READINGS)):
        if rows:
            frame = pl.DataFrame(rows, schema=schema, orient="row")
            frame.write_parquet(folder / "assets" / asset / f"{name}.parquet")
    return PlantDataset(folder)


def byte_tokenizer():
    """A byte-level BPE tokenizer with control tokens, as most models have one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<pad>", "<s>", CONTROL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for _, _, _, text, *_ in log_lines(40)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token=CONTROL)


def vocabulary_tokenizer(vocabulary):
    """A tokenizer with the tokens of the vocabulary, padding and an unknown token, for template mode alone."""
    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    vocabulary.add_to(tokenizer)
    return tokenizer
