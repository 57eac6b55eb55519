"""Texts from files and packages, and windows of tokens."""

from __future__ import annotations

import gzip
import re

import pytest
import torch
import zstandard

from hf_sparse_attn.data import sources
from hf_sparse_attn.data.file_check import survey
from hf_sparse_attn.data.formats import source_files
from hf_sparse_attn.data.sources import SourceError, free_bytes
from hf_sparse_attn.data.text_documents import Document, read_documents, read_text
from hf_sparse_attn.data.windows import batches, token_windows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SPARSE_ATTN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# -- files ----------------------------------------------------------------------------------------------------------


def test_documents_come_from_files_and_globs_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(f"text of {name}", encoding="utf-8")
    result = read_documents([str(tmp_path / "c.md"), str(tmp_path / "*.txt")])
    assert result == [Document(n, f"text of {n}") for n in ("c.md", "a.txt", "b.txt")]
    assert read_documents([]) == []


def test_a_glob_leaves_folders_out(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("a")
    assert [d.name for d in read_documents([str(tmp_path / "*")])] == ["a.txt"]


def test_a_glob_with_two_stars_enters_folders(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "a.txt").write_text("a")
    assert [d.name for d in read_documents([str(tmp_path / "**" / "*.txt")])] == ["a.txt"]


def test_html_loses_its_tags_scripts_and_entities(tmp_path):
    file = tmp_path / "page.html"
    file.write_text(
        "<html><head><title>no</title></head><body><script>var no = 1 < 2;</script><STYLE>no{}</STYLE>"
        "<h1>Title</h1>\n \n\n<p class='x'>a &lt;b&gt;   &amp; c</p><header>kept</header></body></html>"
    )
    text = read_text(file)
    assert "no" not in text and "class" not in text
    assert re.findall(r"\S+", text) == ["Title", "a", "<b>", "&", "c", "kept"]
    assert not re.search(r"[ \t]{2}|\n\n\n", text)


def test_tags_in_plain_text_stay(tmp_path):
    (tmp_path / "a.txt").write_text("if a < b and c > d: <tag>")
    assert read_text(tmp_path / "a.txt") == "if a < b and c > d: <tag>"


def test_text_that_is_not_utf_8_is_read_as_latin_1(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "utf.txt").write_bytes("café".encode())
    assert read_text(tmp_path / "latin.txt") == read_text(tmp_path / "utf.txt") == "café"


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".txt.gz"])
def test_damaged_utf_8_is_refused_and_not_read_as_latin_1(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_sparse_attn.data.file_check.CHUNK", 5)  # characters lie across parts
    raw = b"text\n" + "温度が高い".encode() + b"\xff" + "圧力".encode() + "\ufffd".encode() + b"\n"
    file = tmp_path / f"a{suffix}"
    file.write_bytes(gzip.compress(raw) if suffix.endswith(".gz") else raw)
    message = r"is UTF-8 but for 1 damaged characters, the first at byte 20: repair it, or drop them with `iconv -c"
    with pytest.raises(SourceError, match=message):
        survey(source_files([str(file)])[0])
    if suffix != ".csv":
        with pytest.raises(SourceError, match=message):
            read_text(file)
    whole = raw.replace(b"\xff", b"")
    file.write_bytes(gzip.compress(whole) if suffix.endswith(".gz") else whole)
    assert survey(source_files([str(file)])[0]).encoding == "utf-8"  # a replacement character of its own is no damage


def test_two_documents_of_one_name_are_refused(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text(folder)
    with pytest.raises(SourceError, match=r"distinct names, but same\.txt appear twice"):
        read_documents([str(tmp_path / "*" / "same.txt")])
    with pytest.raises(SourceError, match="appear twice"):
        read_documents([str(tmp_path / "x" / "same.txt")] * 2)


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.log").write_text("line")
    for source in ("~/a.log", "~/*.log"):
        assert read_documents([source]) == [Document("a.log", "line")]
        assert [file.path for file in source_files([source])] == [str(tmp_path / "a.log")]


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(SourceError, match=r"source '.*nothing\.txt': no such file; forms: pypi:NAME"):
        read_documents([str(tmp_path / "nothing.txt")])


@pytest.mark.parametrize(
    "source", ["pypi:", "pypi:name==1", "pypi::*.txt", "pypi:name==1:", "deb:", "deb:name", "hub:", "hub:a:b", "hub:a"]
)
def test_incomplete_sources_are_refused(source, monkeypatch):
    monkeypatch.setattr(sources, "_run", None)  # nothing is asked
    with pytest.raises(
        SourceError, match=rf"source '{re.escape(source)}' is incomplete; forms: pypi:NAME==VERSION:GLOB"
    ):
        read_documents([source])


# -- the Hub -----------------------------------------------------------------------------------------------------------


def test_hub_sources_give_one_document_a_row(monkeypatch):
    import datasets

    table = datasets.Dataset.from_dict({"text": ["one", "two"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    assert read_documents(["hub:org/set:test:text"]) == [
        Document(f"org/set/test/{i}", t) for i, t in enumerate(("one", "two"))
    ]
    with pytest.raises(SourceError, match=r"no column 'body'; columns: text"):
        read_documents(["hub:org/set:test:body"])

    def unreachable(name, split):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(SourceError, match=r"cannot load 'hub:org/set:test:text' from the Hub: offline"):
        read_documents(["hub:org/set:test:text"])


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path):
    assert free_bytes(tmp_path / "a" / "b") > 0


# -- windows --------------------------------------------------------------------------------------------------------


@pytest.fixture
def documents(random_words):
    return [Document(name, random_words(n, seed=n)) for name, n in (("a", 70), ("b", 40), ("c", 130))]


def test_windows_take_the_first_of_every_document_then_the_second(documents, word_tokenizer):
    result = token_windows(documents, word_tokenizer, 32, 7, 16)
    assert [w.document for w in result] == ["a[0]", "b[0]", "c[0]", "a[1]", "c[1]", "c[2]", "c[3]"]
    assert all(w.ids.shape == (1, 32) and w.ids.dtype == torch.long for w in result)
    assert [w.document for w in token_windows(documents, word_tokenizer, 32, 4, 16)] == ["a[0]", "b[0]", "c[0]", "a[1]"]


def test_windows_never_overlap_and_never_cross_documents(documents, word_tokenizer):
    text = {d.name: [int(w[1:]) for w in d.text.split()] for d in documents}
    parts = {}
    for window in token_windows(documents, word_tokenizer, 32, 7, 16):
        parts.setdefault(window.document[0], []).extend(window.ids[0].tolist())
    assert parts == {name: text[name][: 32 * count] for name, count in (("a", 2), ("b", 1), ("c", 4))}


def test_a_document_shorter_than_a_block_is_refused(documents, word_tokenizer):
    with pytest.raises(SourceError, match=r"document 'short' has 15 tokens, less than one block \(16\)"):
        token_windows([*documents, Document("short", "w5 " * 15)], word_tokenizer, 32, 2, 16)
    assert token_windows([*documents, Document("fits", "w5 " * 16)], word_tokenizer, 32, 2, 16)


@pytest.mark.parametrize("empty", ["", " \n "])
def test_an_empty_document_is_refused(empty, word_tokenizer):
    with pytest.raises(SourceError, match="'empty' has 0 tokens"):
        token_windows([Document("empty", empty)], word_tokenizer, 32, 1, 16)


def test_too_few_windows_are_refused(documents, word_tokenizer):
    with pytest.raises(SourceError, match="hold 7 windows of 32 tokens, 8 are asked for"):
        token_windows(documents, word_tokenizer, 32, 8, 16)
    with pytest.raises(SourceError, match="hold 0 windows"):
        token_windows([], word_tokenizer, 32, 1, 16)


def test_batches_hold_one_row_per_window(documents, word_tokenizer):
    result = token_windows(documents, word_tokenizer, 32, 3, 16)
    assert [list(b) for b in batches(result)] == [["input_ids"]] * 3
    assert all(torch.equal(b["input_ids"], w.ids) for b, w in zip(batches(result), result, strict=True))


@pytest.mark.parametrize(
    "pack", [gzip.compress, lambda raw: zstandard.ZstdCompressor().compress(raw)], ids=["gz", "zst"]
)
def test_a_packed_text_is_read_as_what_it_holds(tmp_path, pack):
    name = "log.txt.gz" if pack is gzip.compress else "log.txt.zst"
    (tmp_path / name).write_bytes(pack("Zürich läuft\n".encode() * 50))
    [document] = read_documents([str(tmp_path / name)])
    assert (document.name, document.text) == (name, "Zürich läuft\n" * 50)
    (tmp_path / name).write_bytes(pack(b"some text\n" * 5000)[:-20])
    with pytest.raises(SourceError):
        read_documents([str(tmp_path / name)])


def test_a_binary_file_is_no_text(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"abc\0def")
    with pytest.raises(SourceError, match=r"model.bin holds zero bytes"):
        read_documents([str(tmp_path / "model.bin")])
