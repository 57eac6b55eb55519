"""Documents of every format in pieces: what is read, where it stands, and what is refused."""

from __future__ import annotations

import gzip
import json
import os

import pandas
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from hf_sparse_attn.data import document_chunks, file_check, tables
from hf_sparse_attn.data.document_chunks import PieceReader, cut, stretches
from hf_sparse_attn.data.formats import SourceFile, identity, source_files
from hf_sparse_attn.data.sources import SourceError

TEXTS = ["first é", "second\nline", "NA", "007", ""]
ROWS = [{"id": i, "text": text, "message": f"m{i}"} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SPARSE_ATTN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of at most 40 bytes."""
    monkeypatch.setattr(document_chunks, "PIECE", 40)


def table(suffix):
    """The bytes of ``ROWS`` in a format."""
    if suffix == ".json":
        return json.dumps(ROWS).encode()
    frame = pandas.DataFrame(ROWS)
    if suffix == ".parquet":
        return frame.to_parquet(row_group_size=2)
    return (
        frame.to_csv(index=False, sep="\t" if suffix == ".tsv" else ",").encode()
        if suffix in (".csv", ".tsv")
        else LINES
    )


def read(*sources):
    return list(PieceReader(source_files([str(source) for source in sources])))


def refused(match, *sources):
    with pytest.raises(SourceError, match=match):
        read(*sources)


# -- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_each_row_of_a_table_is_a_document(suffix, compression, tmp_path):
    file = tmp_path / f"rows{suffix}{compression}"
    file.write_bytes(COMPRESS[compression](table(suffix)))
    result = read(file)
    assert [piece.text for piece in result] == TEXTS
    assert [piece.document for piece in result] == [f"{file}:{i}" for i in range(5)]
    assert all((piece.first, piece.last, piece.offset, piece.line) == (True, True, 0, 1) for piece in result)
    assert [piece.text for piece in read(f"{file}#message")] == ["m0", "m1", "m2", "m3", "m4"]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".log", ".md", ".rst", "", ".unknown"])
def test_a_text_file_is_one_document(suffix, compression, tmp_path):
    file = tmp_path / f"notes{suffix}{compression}"
    file.write_bytes(COMPRESS[compression]("a < b & <i>c\nd é".encode()))
    assert read(file) == [document_chunks.Piece(str(file), "a < b & <i>c\nd é", True, True, 0, 1)]


@pytest.mark.parametrize("compression", COMPRESS)
def test_html_loses_its_tags(compression, tmp_path):
    file = tmp_path / f"page.html{compression}"
    file.write_bytes(COMPRESS[compression](b"<head>no</head><p>a &lt; b</p>"))
    assert [piece.text.strip() for piece in read(file)] == ["a < b"]


def test_several_members_and_frames_are_read_one_after_the_other(tmp_path):
    for suffix in (".gz", ".zst"):
        (tmp_path / f"a.log{suffix}").write_bytes(COMPRESS[suffix](b"one\n") + COMPRESS[suffix](b"two\n"))
    assert [piece.text for piece in read(tmp_path / "a.log*")] == ["one\ntwo\n"] * 2


def test_a_long_window_of_zstd_is_read(tmp_path):
    """As ``zstd --long=28`` makes it; the default of decoders ends at 27."""
    compressor = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=28)
    ).compressobj()
    (tmp_path / "a.log.zst").write_bytes(compressor.compress(b"line\n" * 9) + compressor.flush())
    assert [piece.text for piece in read(tmp_path / "a.log.zst")] == ["line\n" * 9]


def test_a_dataset_is_read_by_split_and_column(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(LINES)
    source = f"hub:{tmp_path / 'set'}:train:message"
    assert [piece.text for piece in read(source)] == ["m0", "m1", "m2", "m3", "m4"]
    refused(r"has no column 'x' but id, text, message", f"hub:{tmp_path / 'set'}:train:x")
    refused(r"cannot read .*set: .*test.*; check the name and the network", f"hub:{tmp_path / 'set'}:test:text")
    first = identity(*source_files([source]))
    (tmp_path / "set" / "train.jsonl").write_bytes(LINES * 2)
    assert identity(*source_files([source])) != first


def test_a_hash_in_a_file_name_is_no_column(tmp_path):
    (tmp_path / "a#b").write_text("text")
    assert [piece.text for piece in read(tmp_path / "a#b")] == ["text"]
    refused("is text and has no columns; tables are .jsonl", f"{tmp_path / 'a#b'}#text")
    refused("names no column after '#'", f"{tmp_path / 'c.jsonl'}#")


def test_a_missing_text_reads_as_an_empty_one(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"id": 3}\n')
    assert [piece.text for piece in read(tmp_path / "a.jsonl")] == ["a", "", ""]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_what_is_not_utf_8_is_latin_1_from_its_first_piece_on(suffix, tmp_path, small_pieces):
    text = "é" + " plain" * 50 + "\n" + "ü" * 30
    file = tmp_path / f"a{suffix}"
    content = {".jsonl": json.dumps({"text": text}, ensure_ascii=False), ".csv": f'text\n"{text}"\n', ".txt": text}[
        suffix
    ]
    for encoding in ("latin-1", "utf-8"):
        file.write_bytes(content.encode(encoding))
        assert "".join(piece.text for piece in read(file)) == text


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    assert [piece.text for piece in read(tmp_path / "a.txt")] == ["text"]


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_truncated_or_damaged_compressed_file_is_refused_by_name(suffix, compression, tmp_path):
    file, whole = tmp_path / f"a{suffix}{compression}", COMPRESS[compression](table(suffix) * 20)
    program = {".gz": "gzip", ".zst": "zstd"}[compression]
    for content in (whole[:-5], whole[: len(whole) // 2], b""):
        file.write_bytes(content)
        refused(rf"{file} is truncated: .*; fetch it again; `{program} -t {file}` tests it", file)
    file.write_bytes(b"not compressed at all")
    refused(rf"{file} is damaged \(.*\): fetch it again; `{program} -t {file}` tests it", file)


def test_a_truncated_table_is_refused_by_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES[:-5])
    refused(r"a\.jsonl is truncated: its last line is no JSON", tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_bytes(table(".parquet")[:-5])
    refused(r"cannot read .*a\.parquet: .*; check that it is a whole parquet file", tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\nno json\n{"text": "b"}\n')
    refused(
        r"cannot read .*b\.jsonl, line 2: no JSON \(Expecting value at column 1\); repair or remove it",
        tmp_path / "b.jsonl",
    )


def test_files_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\x7fELF\0\0\0")
    refused(r"a\.bin is not text, and its name tells no format that is read: \.txt, \.log", tmp_path / "a.bin")
    (tmp_path / "a.txt").write_bytes("wide".encode("utf-16"))
    refused(r"looks like UTF-16: convert it to UTF-8", tmp_path / "a.txt")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    file = SourceFile(str(tmp_path / "gone.txt"), "text")
    with pytest.raises(SourceError, match=r"cannot read .*gone\.txt: No such file"):
        list(PieceReader([file]))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_a_column_that_is_missing_or_no_text_is_refused(suffix, tmp_path):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(table(suffix))
    refused(rf"{file} has no column 'x' but id, text, message: write {file}#COLUMN", f"{file}#x")
    if suffix in (".csv", ".tsv"):
        assert [piece.text for piece in read(f"{file}#id")] == list("01234")
    else:
        refused(rf"{file}, row 0: column 'id' holds int, not text", f"{file}#id")


def test_what_must_be_read_as_a_whole_has_a_largest_size(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_bytes(table(".json"))
    (tmp_path / "a.html").write_text("<p>text</p>" * 10)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    monkeypatch.setattr(file_check, "LARGEST_WHOLE", 100)
    refused(
        r"a\.json is one JSON array of 0 MB, which can only be read as a whole: convert it to JSON lines",
        tmp_path / "a.json",
    )
    refused(r"a\.html is HTML of 0 MB, which can only be read as a whole: convert it to text", tmp_path / "a.html")
    assert len(read(tmp_path / "a.jsonl")) == 5


def test_no_source_a_missing_one_and_one_that_is_read_twice_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    refused("no source of texts is given")
    refused(r"source '.*b\.txt': no such file; forms: pypi:NAME", tmp_path / "b.txt")
    refused(r"a\.txt would be read twice; narrow the globs", tmp_path / "a.txt", tmp_path / "*")
    refused(r"a\.txt would be read twice", tmp_path / "a.txt", tmp_path / "." / ".." / tmp_path.name / "a.txt")
    for source in ("hub:", "hub:a:b", "hub:a::c", "pypi:name==1", "deb:"):
        refused("is incomplete; forms: pypi:NAME", source)


def test_a_file_that_a_glob_reaches_by_links_is_read_once(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("x", "y"):
        (tmp_path / "a" / name).write_text(name)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert [piece.document for piece in read(tmp_path / "*" / "*")] == [
        str(tmp_path / "a" / name) for name in ("x", "y")
    ]


# -- pieces ---------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from(["a", "é", "€", "😀", " ", "\n", "\r\n"]), max_size=400).map("".join), st.integers(1, 50)
)
def test_stretches_are_whole_characters_in_order_and_know_their_place(text, step):
    raw, before = text.encode(), document_chunks.PIECE
    document_chunks.PIECE = 40
    try:
        result = list(stretches(iter(raw[i : i + step] for i in range(0, len(raw), step))))
        again = [list(stretches(iter([raw[offset:]]), offset, line)) for _, offset, line, _ in result]
    finally:
        document_chunks.PIECE = before
    assert b"".join(part for part, *_ in result) == raw and [last for *_, last in result] == [False] * (
        len(result) - 1
    ) + [True]
    for i, (part, offset, line, _) in enumerate(result):
        part.decode()
        assert len(part) <= 40 and raw[offset : offset + len(part)] == part and line == 1 + raw[:offset].count(b"\n")
        assert again[i] == result[i:]  # from any place on, whatever came before


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"aaa\nbbb\nccc ddd", b"aaa\nbbb\n"),  # a single line end between letters
        (b"aaa\nbbb\n\n ddd", b"aaa\n"),  # rather than one beside white space
        (b"aaa\nb\n\ncc ddd", b"aaa\n"),
        (b"aaa\n\nbbb ccc", b"aaa\n\n"),  # behind the last of several
        (b"aaa bbb cccccc", b"aaa bbb"),  # before a space
        ("ééééééé".encode(), "éééé".encode()),  # between characters
        ("aéééééé".encode(), "aééé".encode()),
    ],
)
def test_where_a_text_is_cut(raw, expected):
    assert raw[: cut(raw, 8 if len(expected) < 9 else 9)] == expected


def test_the_tokens_of_pieces_are_those_of_the_whole(tmp_path, small_pieces):
    """With a tokenizer of bytes as GPT-2, SmolLM2 and many others have one."""
    text = "".join(f"line {i}, of words\n" + "\n" * (i % 5 == 0) for i in range(200))
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        [text], BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=ByteLevel.alphabet())
    )
    (tmp_path / "a.txt").write_text(text)
    result = read(tmp_path / "a.txt")
    assert len(result) > 90
    assert [i for piece in result for i in tokenizer.encode(piece.text).ids] == tokenizer.encode(text).ids


def test_the_last_piece_of_a_file_is_known_as_such(tmp_path, small_pieces):
    for size in (0, 1, 39, 40, 41, 80, 81):
        (tmp_path / "a.txt").write_text("x" * size)
        result = read(tmp_path / "a.txt")
        assert [piece.last for piece in result] == [False] * (len(result) - 1) + [True] and result[0].first
        assert len(result) == max(1, -(-size // 40)) and sum(len(piece.text) for piece in result) == size


@pytest.mark.parametrize(
    "name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.zst"]
)
def test_reading_is_taken_up_at_any_piece(name, tmp_path, small_pieces):
    _, suffix, *compression = name.split(".")
    text = "".join(f"line {i} é\n" for i in range(40))
    content = text.encode() if suffix == "txt" else table(f".{suffix}")
    (tmp_path / name).write_bytes(COMPRESS[".".join(["", *compression])](content))
    (tmp_path / "z.log").write_text(text)
    files = source_files([str(tmp_path / name), str(tmp_path / "z.log")])
    whole, count = list(PieceReader(files)), 0
    for stop in range(len(whole)):
        reader = PieceReader(files)
        some = iter(reader)
        for _ in range(stop):
            next(some)
        position = reader.position()
        some.close()
        if position is not None:
            count += 1
            assert list(PieceReader(files, json.loads(json.dumps(position)))) == whole[stop:]
    assert count >= len(whole) // 2


def test_a_row_of_a_table_is_taken_up_as_a_whole(tmp_path, small_pieces):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "word\n" * 30}) + "\n" + json.dumps({"text": "end"}) + "\n")
    reader = PieceReader(source_files([str(tmp_path / "a.jsonl")]))
    result = [(piece, reader.position()) for piece in reader]
    assert [position is None for _, position in result] == [True] * (len(result) - 2) + [False, False]
    assert result[1][0].document == result[0][0].document and (result[1][0].offset, result[1][0].line) == (40, 9)


def test_a_tilde_in_a_source_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a#1.txt").write_text("a text")
    (tmp_path / "b.csv").write_text("words\na text\n")
    result = source_files(["~/a#1.txt", "~/*.csv#words"])
    assert [(file.path, file.column) for file in result] == [
        (str(tmp_path / "a#1.txt"), "text"),
        (str(tmp_path / "b.csv"), "words"),
    ]


def test_a_place_in_a_parquet_file_is_found_by_row_group(tmp_path):
    """Rows before the group of the place are not read again."""
    pandas.DataFrame({"text": [f"row {i}" for i in range(100)]}).to_parquet(tmp_path / "a.parquet", row_group_size=10)
    rows = tables.TableRows(*source_files([str(tmp_path / "a.parquet")]))
    some = iter(rows)
    for _ in range(35):
        next(some)
    state = rows.state()
    some.close()
    assert state["row"] == 35 and state["rows"]["examples_iterable"]["shard_idx"] == 3, state


def test_a_table_without_rows_has_no_documents(tmp_path):
    pandas.DataFrame({"text": pandas.Series([], dtype=str)}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text\n")
    assert read(tmp_path / "a.*") == []


# -- the survey -----------------------------------------------------------------------------------------------------


def test_a_file_is_surveyed_once_until_it_changes(tmp_path, monkeypatch):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text"))
    file, passes = source_files([str(tmp_path / "a.txt.gz")])[0], []
    original = file_check._survey
    monkeypatch.setattr(file_check, "_survey", lambda file: passes.append(file) or original(file))
    assert file_check.survey(file) == file_check.survey(file) == file_check.Survey("utf-8", 4) and len(passes) == 1
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"caf\xe9 x"))
    assert file_check.survey(file) == file_check.Survey("latin-1", 6) and len(passes) == 2


@pytest.mark.parametrize("content", ["é" * 10, "x" * 19 + "é"])
def test_utf_8_is_told_across_chunks_and_at_the_end(content, tmp_path, monkeypatch):
    monkeypatch.setattr(file_check, "CHUNK", 3)
    raw = content.encode()
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.txt").write_bytes(raw[:-1])  # ends within a character
    assert file_check.survey(source_files([str(tmp_path / "a.txt")])[0]).encoding == "utf-8"
    (cut,) = source_files([str(tmp_path / "b.txt")])
    if content.count("é") == 1:
        assert file_check.survey(cut).encoding == "latin-1"
    else:  # the others are UTF-8
        with pytest.raises(SourceError, match=r"b\.txt is UTF-8 but for 1 damaged characters, the first at byte 18"):
            file_check.survey(cut)


def test_a_package_of_pypi_is_known_by_version_and_size(tmp_path):
    folder = tmp_path / "cache" / "pypi" / "name==1"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("text")
    (tmp_path / "a.txt").write_text("text")
    files = source_files([str(folder / "a.txt"), str(tmp_path / "a.txt")])
    before = [identity(file) for file in files]
    for file in files:
        os.utime(file.path, (1, 1))
    after = [identity(file) for file in files]
    assert before[0] == after[0] and before[1] != after[1]


@pytest.mark.parametrize(
    "text", ["id,text\n1,hello\n2,hello, world\n", "id,text\n1,hello, world\n", "text\nabc, def\n", "id,text\n1,a\n2\n"]
)
def test_a_row_with_other_fields_than_the_header_is_refused(tmp_path, text):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(SourceError, match=r"rows.csv, line \d: \d fields where the header has \d: quote the texts"):
        list(tables.TableRows(source_files([f"{tmp_path}/rows.csv#text"])[0]))
