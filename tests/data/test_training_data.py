"""From texts to the rows that a model is trained on: cached or streamed, shared out, shuffled, continued, refused."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import signal
import stat
import threading
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from datasets.distributed import split_dataset_by_node
from filelock import FileLock
from hf_sparse_attn_kernels.caching import cache_folder
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer, Trainer, TrainingArguments, default_data_collator

from hf_sparse_attn.data import row_stream, token_cache, tokenization
from hf_sparse_attn.data.formats import source_files
from hf_sparse_attn.data.packing import IGNORE_INDEX, PackingOptions, PackingReport
from hf_sparse_attn.data.row_stream import fingerprint
from hf_sparse_attn.data.sources import SourceError
from hf_sparse_attn.data.training_data import packing_report, share_of_rank, training_rows

LENGTH, BLOCK = 64, 16
WITH_BOS = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
SIZES = {"a.txt": 1000, "b.txt": 20, "c.txt": 333, "d.txt": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, but for the kernels, which take long to compile."""
    kernels, folder = cache_folder() / "kernels", tmp_path / "cache"
    kernels.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    (folder / "kernels").symlink_to(kernels)
    monkeypatch.setenv("HF_SPARSE_ATTN_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Pieces of 100 bytes, five of them tokenised at a time, so that small texts have many of both."""
    monkeypatch.setattr("hf_sparse_attn.data.document_chunks.PIECE", 100)
    monkeypatch.setattr(tokenization, "BATCH", 500)


@pytest.fixture
def tokenizer(word_tokenizer):
    """The words w4 … w96; w3 ends a text."""
    tokenizer = pickle.loads(pickle.dumps(word_tokenizer))
    tokenizer.eos_token = "w3"
    return tokenizer


@pytest.fixture
def texts(tmp_path, random_words):
    """Four text files and a table of 50 rows."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for seed, (name, size) in enumerate(SIZES.items()):
        (folder / name).write_text(random_words(size, seed).replace("w3 ", "w4 ").replace(" w7 ", "\n"))
    rows = [{"text": random_words(5 + i, 100 + i)} for i in range(50)]
    (folder / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "*")


@pytest.fixture
def rows_of(texts, tokenizer):
    def make(**options):
        return training_rows([texts], tokenizer, LENGTH, **{"block_size": BLOCK, "progress": False, **options})

    return make


def same(rows, others):
    rows, others = list(rows), list(others)
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert list(row) == list(other) and all(torch.equal(row[key], other[key]) for key in row)


def content(file):
    return Path(file.path).read_text(encoding="utf-8")


def ids(rows):
    return [tuple(row["input_ids"].tolist()) for row in rows]


# -- what the rows are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_stand_one_behind_the_other_each_with_an_end_of_text(streaming, rows_of, tokenizer, texts):
    rows = rows_of(streaming=streaming)
    result = list(rows)
    assert all(list(row) == ["input_ids", "position_ids", "labels"] for row in result)
    assert all(value.dtype == torch.int64 and value.shape == (LENGTH,) for row in result for value in row.values())
    files = source_files([texts])
    documents = [content(file) for file in files[:-1]] + [
        json.loads(line)["text"] for line in content(files[-1]).splitlines()
    ]
    expected = [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    kept = [
        token
        for row in result
        for token, label in zip(row["input_ids"].tolist(), row["labels"].tolist(), strict=True)
        if token
    ]
    report = packing_report(rows)
    assert kept == expected[: len(kept)] and len(expected) == report.tokens == len(kept) + report.dropped
    assert (report.documents, report.empty, report.rows) == (54, 0, len(result)) and report.dropped < LENGTH
    assert report.padding == sum(int((row["input_ids"] == 0).sum()) for row in result)


def test_a_document_does_not_predict_the_next_ones_first_token(rows_of):
    for row in rows_of():
        assert (row["labels"][row["position_ids"] == 0] == IGNORE_INDEX).all()
        learned = (row["position_ids"] > 0) & (row["input_ids"] != 0)
        assert torch.equal(row["labels"][learned], row["input_ids"][learned])


def test_a_stream_and_the_cache_hold_the_same_rows(rows_of):
    for pad in (False, True):
        same(rows_of(pad=pad, streaming=True), rows_of(pad=pad))


def test_documents_end_without_a_token_if_asked(rows_of, word_tokenizer, texts):
    rows = training_rows([texts], word_tokenizer, LENGTH, block_size=BLOCK, end_of_text=False, progress=False)
    assert packing_report(rows).tokens == packing_report(rows_of()).tokens - 54
    assert word_tokenizer.eos_token_id is None


def test_a_begin_of_text_token_stands_before_each_document_if_the_tokenizer_puts_it_before_texts(
    rows_of, texts, tokenizer
):
    plain = packing_report(rows_of())
    tokenizer.backend_tokenizer.post_processor = WITH_BOS
    rows = rows_of()
    assert packing_report(rows).tokens == plain.tokens + 54
    starts = [row["input_ids"][row["position_ids"] == 0].tolist() for row in rows]
    assert starts[0][0] == 1 and sum(token == 1 for row in rows for token in row["input_ids"].tolist()) > 45


def test_a_tokenizer_in_python_gives_the_same_kind_of_rows(texts):
    rows = training_rows([texts], ByT5Tokenizer(), LENGTH, block_size=BLOCK, progress=False)
    first = source_files([texts])[0]
    assert ids(rows)[0] == tuple(byte + 3 for byte in content(first).encode()[:LENGTH])
    assert packing_report(rows).tokens == sum(len(content(file)) for file in source_files([texts])[:-1]) + 4 + sum(
        len(json.loads(line)["text"]) + 1 for line in content(source_files([texts])[-1]).splitlines()
    )


def test_many_short_documents_are_tokenised_a_bounded_number_at_a_time(rows_of, monkeypatch):
    plain, counts, call = ids(rows_of(streaming=True)), [], tokenization.Encoder.__call__
    monkeypatch.setattr(tokenization, "BATCH", 1 << 20)
    monkeypatch.setattr(tokenization, "PIECES", 3)
    monkeypatch.setattr(
        tokenization.Encoder, "__call__", lambda self, texts: counts.append(len(texts)) or call(self, texts)
    )
    # three, the last of which may be a row of three pieces
    assert ids(rows_of(streaming=True)) == plain and max(counts) <= 5


def test_what_an_earlier_call_of_the_tokenizer_asked_for_is_not_applied(tmp_path, tokenizer):
    """Truncation, padding, special tokens as plain text."""
    tokenizer.bos_token = None  # otherwise the tokenizer is called to see whether it is put before a text
    (tmp_path / "a.txt").write_text("w5<unk>w6 " * 40)
    options = {"block_size": 1, "streaming": True}
    plain = ids(training_rows([str(tmp_path / "a.txt")], tokenizer, 121, **options))
    assert plain == [(*(5, 2, 6) * 40, 3)]
    for earlier in (
        {"truncation": True, "max_length": 2},
        {"padding": "max_length", "max_length": 500},
        {"split_special_tokens": True},
    ):
        tokenizer(["w5 w6 w7", "w8"], **earlier)
        assert ids(training_rows([str(tmp_path / "a.txt")], tokenizer, 121, **options)) == plain
    tokenizer.split_special_tokens = True
    assert ids(training_rows([str(tmp_path / "a.txt")], tokenizer, 41, **options)) == [(*(2,) * 40, 3)]


def test_empty_documents_are_left_out_and_counted(tmp_path, tokenizer, random_words):
    for name, text in {"a.txt": "", "b.txt": " \n ", "c.txt": random_words(200)}.items():
        (tmp_path / name).write_text(text)
    report = packing_report(
        training_rows([str(tmp_path / "*.txt")], tokenizer, LENGTH, block_size=BLOCK, progress=False)
    )
    assert report == PackingReport(documents=1, empty=2, tokens=201, rows=3, padding=7, dropped=16)


def test_padded_rows_hold_one_document_each(rows_of):
    rows = rows_of(pad=True)
    assert rows.column_names == ["input_ids", "attention_mask", "labels"]
    report = packing_report(rows)
    assert report.dropped == 0 and sum(int(row["attention_mask"].sum()) for row in rows) == report.tokens
    assert sum(int((row["input_ids"] == 3).sum()) for row in rows) >= 54


# -- the cache ------------------------------------------------------------------------------------------------------


def test_what_was_tokenised_is_not_tokenised_again(rows_of, monkeypatch, cache):
    first = rows_of()
    monkeypatch.setattr(tokenization.Encoder, "__call__", lambda *args: pytest.fail("the tokenizer was called"))
    again = rows_of()
    same(first, again)
    assert packing_report(again) == packing_report(first)
    assert len(list((cache / "tokens").iterdir())) == 1


def test_what_an_earlier_call_of_the_tokenizer_asked_for_does_not_make_the_cache_another(rows_of, tokenizer, cache):
    tokenizer.bos_token = None
    rows_of()
    for earlier in ({"truncation": True, "max_length": 2}, {"padding": "max_length", "max_length": 500}):
        tokenizer(["w5 w6 w7", "w8"], **earlier)
        rows_of()
        assert len(list((cache / "tokens").iterdir())) == 1
    tokenizer.split_special_tokens = True  # this decides about tokens
    rows_of()
    assert len(list((cache / "tokens").iterdir())) == 2


def test_the_cache_is_memory_mapped(rows_of, cache):
    rows = rows_of()
    assert [file["filename"] for file in rows.cache_files] == [str(next((cache / "tokens").iterdir()) / "rows.arrow")]


@pytest.mark.parametrize("change", ["length", "block", "pad", "eos", "text", "tokenizer", "version", "column"])
def test_other_data_or_settings_are_tokenised_anew(change, texts, tokenizer, cache, monkeypatch):
    options = {"length": LENGTH, "block_size": BLOCK, "progress": False}
    training_rows([texts], tokenizer, **options)
    if change == "text":
        with open(source_files([texts])[0].path, "a") as file:
            file.write(" w9")
    elif change == "tokenizer":
        tokenizer.add_tokens(["w97"])
    elif change == "version":
        monkeypatch.setattr(row_stream, "VERSION", 0)
    elif change == "column":
        (file,) = [file for file in source_files([texts]) if file.is_table]
        with open(file.path) as lines:
            rows = [{**json.loads(line), "other": "w5 w6"} for line in lines]
        with open(file.path, "w") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
        training_rows([file.path], tokenizer, 16, block_size=16, progress=False)
        training_rows([f"{file.path}#other"], tokenizer, 16, block_size=16, progress=False)
        assert len(list((cache / "tokens").iterdir())) == 3
        return
    else:
        options |= {
            "length": {"length": 2 * LENGTH},
            "block": {"block_size": 32},
            "pad": {"pad": True},
            "eos": {"end_of_text": False},
        }[change]
    training_rows([texts], tokenizer, **options)
    assert len(list((cache / "tokens").iterdir())) == 2


def test_an_interrupted_cache_is_made_again(rows_of, cache, monkeypatch):
    call, calls = tokenization.Encoder.__call__, itertools.count()

    def interrupted(self, texts):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return call(self, texts)

    monkeypatch.setattr(tokenization.Encoder, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rows_of()
    (folder,) = (cache / "tokens").iterdir()
    assert not list(folder.glob("*.arrow")) and not list(folder.glob(".*.arrow*"))
    if not (pid := os.fork()):
        monkeypatch.setattr(tokenization.Encoder, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        rows_of()
    os.waitpid(pid, 0)
    assert list(folder.glob(".rows.arrow.*"))
    same(rows_of(), rows_of(streaming=True))
    assert sorted(p.name for p in folder.iterdir()) == ["lock", "report.json", "rows.arrow"]


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 255]))


DAMAGES = {
    "cut": lambda folder: cut(folder / "rows.arrow"),
    "one byte": lambda folder: flip(folder / "rows.arrow"),
    "no report": lambda folder: (folder / "report.json").unlink(),
    "half a report": lambda folder: cut(folder / "report.json"),
    "writable by others": lambda folder: (folder / "rows.arrow").chmod(0o666),
    "a link": lambda folder: (
        (folder / "rows.arrow").rename(folder.parent / "x") and (folder / "rows.arrow").symlink_to("../x")
    ),
    "of another user": lambda folder: os.chown(folder / "rows.arrow", 65534, 65534),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_rows_that_are_not_those_that_were_written_are_made_again(rows_of, cache, damage):
    if damage == "of another user" and os.geteuid():
        pytest.skip("needs root")
    rows_of()
    (folder,) = (cache / "tokens").iterdir()
    DAMAGES[damage](folder)
    same(rows_of(), rows_of(streaming=True))
    result = (folder / "rows.arrow").lstat()
    assert stat.S_ISREG(result.st_mode) and result.st_uid == os.geteuid() and not result.st_mode & 0o022


def test_rows_that_were_only_copied_or_touched_are_used(rows_of, cache, monkeypatch):
    old = os.umask(0o002)  # as where every user has a group
    try:
        rows_of()
    finally:
        os.umask(old)
    (folder,) = (cache / "tokens").iterdir()
    assert not any(path.stat().st_mode & 0o022 for path in (folder, folder / "rows.arrow", folder / "report.json"))
    os.utime(folder / "rows.arrow", (1, 1))
    monkeypatch.setattr(token_cache, "_make", lambda *_: pytest.fail("made again"))
    rows_of()


@pytest.mark.parametrize("obstacle", ["a file", "another user's"])
def test_without_a_cache_rows_are_made_and_that_is_said_once(rows_of, cache, caplog, obstacle):
    if obstacle == "a file":
        (cache / "tokens").write_text("in the way")
    elif os.geteuid():
        pytest.skip("needs root")
    else:
        (cache / "tokens").mkdir()
        os.chown(cache / "tokens", 65534, 65534)
    same(rows_of(), rows_of(streaming=True))
    rows_of()
    assert caplog.text.count("Set HF_SPARSE_ATTN_CACHE to a folder of your own") == 1


def test_a_second_process_waits_for_the_first(texts, tokenizer, rows_of, cache):
    name = fingerprint(source_files([texts]), tokenization.Encoder(tokenizer), PackingOptions(LENGTH, BLOCK))
    folder, result = cache / "tokens" / name, []
    folder.mkdir(parents=True)
    with FileLock(folder / "lock"):
        other = threading.Thread(target=lambda: result.append(rows_of()))
        other.start()
        other.join(0.5)
        assert other.is_alive() and not result
    other.join()
    assert len(result) == 1 and [p.name for p in (cache / "tokens").iterdir()] == [name]


def test_a_full_disk_says_so(rows_of, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_cache, "_record_batch", full)
    with pytest.raises(SourceError, match=r"the disk of .* is full: rows need 12 bytes a token"):
        rows_of()


def test_a_cache_survives_selecting_shuffling_and_saving(rows_of, tmp_path):
    rows = rows_of()
    rows.shuffle(seed=3).select(range(5)).save_to_disk(tmp_path / "saved")
    saved = load_from_disk(str(tmp_path / "saved"))
    assert len(saved) == 5 and packing_report(saved) == packing_report(rows) and saved[0]["labels"].shape == (LENGTH,)


# -- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"pad": True}, {"seed": 5, "shuffle_window": 7}])
def test_a_stream_goes_on_exactly_where_it_was(options, rows_of, tokenizer):
    tokenizer.backend_tokenizer.post_processor = WITH_BOS
    complete = rows_of(streaming=True, **options)
    whole = list(complete)
    for stop in range(0, len(whole) + 1, 1 if not options else 5):
        stream = rows_of(streaming=True, **options)
        iterator = iter(stream)
        same([next(iterator) for _ in range(stop)], whole[:stop])
        state = json.loads(json.dumps(stream.state_dict()))
        other = rows_of(streaming=True, **options)
        other.load_state_dict(state)
        same(other, whole[stop:])
        assert packing_report(other) == packing_report(complete)


def test_going_on_reads_and_tokenises_only_what_comes_behind(rows_of, texts, tokenizer, monkeypatch):
    stream = rows_of(streaming=True)
    iterator = iter(stream)
    for _ in range(20):
        next(iterator)
    state, seen, call = stream.state_dict(), [], tokenization.Encoder.__call__
    other = rows_of(streaming=True)
    other.load_state_dict(state)
    monkeypatch.setattr(tokenization.Encoder, "__call__", lambda self, texts: seen.extend(texts) or call(self, texts))
    list(other)
    first, size = source_files([texts])[0], sum(map(len, seen))
    everything = "".join(content(file) for file in source_files([texts]))
    assert seen[0] in everything[len(content(first)) :] and size < len(everything) - len(content(first))


def test_a_state_of_other_data_or_settings_is_refused(rows_of, texts, tokenizer):
    stream = rows_of(streaming=True)
    next(iter(stream))
    for other in (
        rows_of(streaming=True, end_of_text=False),
        training_rows([texts], tokenizer, 32, block_size=BLOCK, streaming=True),
    ):
        other.load_state_dict(stream.state_dict())
        with pytest.raises(
            SourceError, match="the saved state of the data belongs to other files, another tokenizer or other settings"
        ):
            next(iter(other))


@pytest.mark.parametrize("change", [{"seed": 2}, {"shuffle_window": 5}])
def test_a_state_of_another_order_is_refused(rows_of, change):
    options = {"streaming": True, "seed": 1, "shuffle_window": 8}
    stream, other = rows_of(**options), rows_of(**{**options, **change})
    next(iter(stream))
    other.load_state_dict(stream.state_dict())
    with pytest.raises(SourceError, match="the saved state of the data"):
        next(iter(other))


# -- shuffling ------------------------------------------------------------------------------------------------------


def test_rows_keep_their_order_unless_a_seed_is_given(rows_of):
    plain, stream = rows_of(), rows_of(streaming=True)
    stream.set_epoch(1)
    same(plain, stream)
    shuffled, again, other = rows_of(seed=1), rows_of(seed=1), rows_of(seed=2)
    assert (
        ids(shuffled) == ids(again) != ids(other)
        and sorted(ids(shuffled)) == sorted(ids(plain))
        and ids(shuffled) != ids(plain)
    )


def test_a_stream_is_shuffled_anew_in_each_epoch(rows_of):
    options = {"streaming": True, "shuffle_window": 8}
    first, again, other = (ids(rows_of(seed=seed, **options)) for seed in (1, 1, 2))
    assert first == again != other
    stream = rows_of(seed=1, **options)
    stream.set_epoch(1)
    second = ids(stream)
    # files in another order drop another rest
    assert second != first and len(second) in range(len(first) - 1, len(first) + 2)


def test_files_and_rows_of_a_window_both_come_in_another_order_each_epoch(texts, tokenizer):
    first = source_files([texts])[0].path
    for sources, window in (([texts], 1), ([first], 8)):
        stream = training_rows(
            sources, tokenizer, LENGTH, block_size=BLOCK, streaming=True, seed=1, shuffle_window=window
        )
        epochs = []
        for epoch in range(4):
            stream.set_epoch(epoch)
            epochs.append(ids(stream))
        assert len({tuple(rows) for rows in epochs}) == 4


def test_a_window_is_a_permutation_of_consecutive_rows(texts, tokenizer):
    (first, *_) = source_files([texts])
    options = {"block_size": BLOCK, "streaming": True}
    plain = ids(training_rows([first.path], tokenizer, LENGTH, **options))
    shuffled = ids(training_rows([first.path], tokenizer, LENGTH, seed=0, shuffle_window=4, **options))
    assert shuffled != plain and len(plain) == 15
    for i in range(0, 15, 4):
        assert sorted(shuffled[i : i + 4]) == sorted(plain[i : i + 4])


# -- ranks and workers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_get_distinct_rows_and_all_of_them(world, streaming, rows_of):
    rows = rows_of(streaming=streaming)
    shares = [ids(split_dataset_by_node(rows, rank, world)) for rank in range(world)]
    assert sorted(itertools.chain(*shares)) == sorted(ids(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_ranks_with_files_of_their_own_read_only_these(rows_of, texts):
    rows = rows_of(streaming=True)  # five files
    shares = [list(split_dataset_by_node(rows, rank, 5)) for rank in range(5)]
    alone = [list(rows_of(streaming=True, pad=True)) and len(share) for share in shares]
    assert alone[0] == 15 and alone[1] == alone[3] == 0  # 1000 words; b and d are shorter than a row


@pytest.mark.parametrize("streaming", [False, True])
def test_equal_shares_leave_the_last_round_out_if_it_is_not_full(streaming, rows_of):
    rows = rows_of(streaming=streaming)
    whole = ids(rows)
    for world in (2, 3, 4, 7):
        shares = [ids(share_of_rank(rows, rank, world)) for rank in range(world)]
        assert {len(share) for share in shares} == {len(whole) // world}
        assert [row for turn in zip(*shares, strict=True) for row in turn] == whole[: len(whole) // world * world]
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank {rank} is not one of 2"):
            share_of_rank(rows, rank, 2)


@pytest.mark.parametrize("share", [share_of_rank, split_dataset_by_node])
def test_each_rank_goes_on_with_its_own_rows(share, rows_of):
    whole = ids(share(rows_of(streaming=True), 1, 3))
    stream = share(rows_of(streaming=True), 1, 3)
    iterator = iter(stream)
    for _ in range(4):
        next(iterator)
    other = share(rows_of(streaming=True), 1, 3)
    other.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert ids(other) == whole[4:]


@pytest.mark.parametrize("seed", [None, 1])
def test_workers_of_a_loader_share_the_files(seed, texts, tokenizer):
    files = [file.path for file in source_files([texts]) if "a.txt" in file.path or "c.txt" in file.path]
    rows = training_rows(files, tokenizer, LENGTH, block_size=BLOCK, streaming=True, seed=seed)
    loaded = [row for batch in DataLoader(rows, batch_size=4, num_workers=2) for row in batch["input_ids"]]
    each = [ids(training_rows([file], tokenizer, LENGTH, block_size=BLOCK, streaming=True)) for file in files]
    assert sorted(tuple(row.tolist()) for row in loaded) == sorted(itertools.chain(*each))


def test_ranks_with_workers_get_distinct_rows_and_as_many(texts, tokenizer):
    files = [file.path for file in source_files([texts]) if "a.txt" in file.path or "c.txt" in file.path]
    rows = training_rows(files, tokenizer, LENGTH, block_size=BLOCK, streaming=True)
    shares = [[], []]
    for rank, share in enumerate(shares):
        for batch in DataLoader(share_of_rank(rows, rank, 2), batch_size=None, num_workers=2):
            share.append(tuple(batch["input_ids"].tolist()))
    each = [len(ids(training_rows([file], tokenizer, LENGTH, block_size=BLOCK, streaming=True))) for file in files]
    assert [len(set(share)) for share in shares] == [sum(count // 2 for count in each)] * 2 and not set(
        shares[0]
    ) & set(shares[1])


# -- use ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("pad", [False, True])
def test_a_loader_batches_rows_as_they_are(streaming, pad, rows_of):
    rows = rows_of(streaming=streaming, pad=pad)
    batch = next(iter(DataLoader(rows, batch_size=3)))
    same([batch], [default_data_collator(list(itertools.islice(rows, 3)))])
    assert all(value.shape == (3, LENGTH) and value.dtype == torch.int64 for value in batch.values())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("pad", [False, True])
def test_trainer_takes_the_rows(streaming, pad, rows_of, sparse_llama, every_block, tmp_path):
    model = sparse_llama(every_block)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
    )
    rows = rows_of(streaming=streaming, pad=pad)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses)


@torch.no_grad()
def test_packed_documents_in_a_row_do_not_see_each_other(rows_of, sparse_llama, every_block):
    """The logits of each document in a row are those of the document alone."""
    model = sparse_llama(every_block)
    row = next(row for row in rows_of() if int((row["position_ids"] == 0).sum()) >= 3)
    together = model(input_ids=row["input_ids"][None], position_ids=row["position_ids"][None]).logits[0]
    starts = [*(row["position_ids"] == 0).nonzero()[:, 0].tolist(), LENGTH]
    for start, stop in itertools.pairwise(starts):
        alone = model(input_ids=row["input_ids"][None, start:stop]).logits[0]
        torch.testing.assert_close(together[start:stop], alone, atol=1e-4, rtol=1e-4)


def test_the_same_loss_is_learned_from_packed_and_from_padded_rows(texts, tokenizer, sparse_llama, every_block):
    """Summed over the labels of short documents, each of which is whole in both."""
    (file,) = [file.path for file in source_files([texts]) if file.is_table]
    model = sparse_llama(every_block)

    def losses(**options):
        rows = training_rows([file], tokenizer, 1024, block_size=BLOCK, progress=False, **options)
        result = []
        for row in rows:
            labels = row.pop("labels")
            with torch.no_grad():
                logits = model(**{key: value[None] for key, value in row.items()}).logits[0]
            loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="none")
            result += loss[labels[1:] != IGNORE_INDEX].tolist()
        return torch.tensor(result)

    packed, padded = losses(), losses(pad=True)
    assert len(packed) > 900
    torch.testing.assert_close(packed, padded[: len(packed)], atol=1e-4, rtol=1e-4)


# -- what is refused, before any row --------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_too_little_text_is_refused(streaming, tmp_path, tokenizer, random_words, cache):
    (tmp_path / "a.txt").write_text(random_words(50))
    options = {"block_size": BLOCK, "streaming": streaming, "progress": False}
    with pytest.raises(
        SourceError, match=r"yield no row: 51 tokens in all \(1 documents, 0 empty\), one row needs 64: add texts"
    ):
        training_rows([str(tmp_path / "a.txt")], tokenizer, LENGTH, **options)
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(SourceError, match=r"yield no row: 0 tokens in all \(0 documents, 1 empty\), one row needs 1"):
        training_rows([str(tmp_path / "a.txt")], tokenizer, LENGTH, pad=True, **options)
    assert not list(cache.rglob("*.arrow"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tokenizer_without_a_needed_token_is_refused(streaming, texts, word_tokenizer, tokenizer):
    options = {"block_size": BLOCK, "streaming": streaming, "progress": False}
    with pytest.raises(
        SourceError, match=r"no end-of-text token .*: set tokenizer\.eos_token, or ask for end_of_text=False"
    ):
        training_rows([texts], word_tokenizer, LENGTH, **options)
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(SourceError, match=r"neither a padding nor an end-of-text token .*: set tokenizer\.pad_token"):
        training_rows([texts], tokenizer, LENGTH, pad=True, end_of_text=False, **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_file_is_refused_before_the_files_before_it_are_tokenised(
    streaming, tmp_path, texts, tokenizer, monkeypatch
):
    monkeypatch.setattr(tokenization.Encoder, "__call__", lambda *args: pytest.fail("the tokenizer was called"))
    (tmp_path / "z.txt.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "z.jsonl").write_text('{"body": "a"}\n')
    for name, message in {
        "z.txt.gz": "is truncated",
        "z.jsonl": "has no column 'text' but body",
        "none.txt": "no such file",
    }.items():
        with pytest.raises(SourceError, match=message):
            training_rows([texts, str(tmp_path / name)], tokenizer, LENGTH, block_size=BLOCK, streaming=streaming)


def test_rows_that_do_not_hold_whole_blocks_are_refused(texts, tokenizer):
    with pytest.raises(SourceError, match="length 100 is no multiple of block_size 16"):
        training_rows([texts], tokenizer, 100)


def test_a_bad_row_in_the_middle_stops_the_cache_and_a_stream_by_name(tmp_path, tokenizer):
    lines = [json.dumps({"text": "w5 " * 40}) for _ in range(10)]
    lines[7] = '{"text": '
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    for streaming in (False, True):
        with pytest.raises(SourceError, match=r"cannot read .*a\.jsonl"):
            list(
                training_rows(
                    [str(tmp_path / "a.jsonl")],
                    tokenizer,
                    LENGTH,
                    block_size=BLOCK,
                    streaming=streaming,
                    progress=False,
                )
            )


def test_the_bar_is_shown_if_asked(rows_of, capfd):
    rows_of(progress=True)
    assert "tokenising, MB" in capfd.readouterr().err
    assert isinstance(rows_of(), Dataset) and capfd.readouterr().err == ""
