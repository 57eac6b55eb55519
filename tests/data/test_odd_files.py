"""Odd files as texts: each is read as it stands, or refused with its name, the place in it, and what to do."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os

import pyarrow
import pytest
from pyarrow import parquet

from hf_sparse_attn.data import document_chunks, file_check, line_rows
from hf_sparse_attn.data.document_chunks import PieceReader
from hf_sparse_attn.data.formats import source_files
from hf_sparse_attn.data.row_stream import content
from hf_sparse_attn.data.sources import SourceError
from hf_sparse_attn.data.tables import TableRows
from hf_sparse_attn.data.text_documents import read_documents
from hf_sparse_attn.data.training_data import training_rows
from hf_sparse_attn.experiments.rows.class_labels import read_labelled

# texts that readers of tables take for dates, numbers, truth values or nothing
ODD = [
    "007",
    "1e5",
    "1_000",
    "0x1F",
    "true",
    "NaN",
    "NA",
    "null",
    "None",
    "Infinity",
    "+49 170 1234567",
    "2024-01-02",
    "12:30",
    "-0",
    "1.0",
]
ODD += ["", " x ", "a\nb", 'he said "x", twice', "a;b|c\td", "é😀", "\u2028", "x\x85y", "{}"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SPARSE_ATTN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def texts_of(tmp_path):
    """The texts of a file with this content."""

    def make(name, content, column=""):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return [piece.text for piece in PieceReader(source_files([f"{tmp_path / name}{column}"]))]

    return make


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def separated(rows, separator=","):
    out = io.StringIO()
    csv.writer(out, delimiter=separator).writerows([["id", "text"], *enumerate(rows)])
    return out.getvalue()


# -- tables ---------------------------------------------------------------------------------------------------------


def test_texts_of_json_are_read_as_they_stand(texts_of):
    rows = [{"text": text} for text in ODD]
    assert texts_of("a.jsonl", lines(*rows)) == texts_of("b.json", json.dumps(rows)) == ODD
    assert texts_of("c.json", "\n".join(json.dumps(row, indent=2) for row in rows)) == ODD  # objects over several lines
    assert texts_of("d.jsonl", lines(*rows).replace("\n", "\r")) == ODD
    assert texts_of("e.jsonl", b"\xef\xbb\xbf\r\n" + lines(*rows).replace("\n", "\r\n\r\n").encode()) == ODD


@pytest.mark.parametrize("separator", ",;\t|")
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_texts_of_csv_are_read_as_they_stand_whatever_separates_them(separator, suffix, texts_of):
    assert texts_of(f"a.{suffix}", separated(ODD, separator)) == ODD
    assert texts_of(f"b.{suffix}", b"\xef\xbb\xbf" + separated(ODD, separator).encode()) == ODD


def test_other_fields_of_json_may_change_their_type_and_come_late(texts_of):
    late = [{"id": "x7", "text": "b"}, {"text": "c", "trace": {"a": [1]}}, {"text": "d", "trace": 5, "id": None}]
    assert texts_of("a.jsonl", lines({"id": 1, "text": "a"}, *late)) == list("abcd")
    assert texts_of("b.jsonl", lines({"id": 1}, {"text": "b"})) == ["", "b"]
    assert texts_of("c.jsonl", f'{{"text": "a", "n": {"9" * 6000}}}\n{{"text": "b", "n": NaN}}\n') == ["a", "b"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"text": "a"}\n{"text": 5}\n', r"a\.jsonl, row 1: column 'text' holds int, not text"),
        ('{"text": "a"}\n["b"]\n{"text": "c"}\n', r'a\.jsonl, line 2: a list in place of an object \{"text": …\}'),
        ('{"text": "a", "text": "b"}\n', r"a\.jsonl, line 1: the field 'text' stands twice in one object"),
        ('{"text": "a\\ud83d"}\n', r"a\.jsonl, row 0: column 'text' holds what is no UTF-8"),
        (
            '{"text": "a", "n": ' + "[" * 10**5 + "]" * 10**5 + "}\n",
            r"a\.jsonl, line 1: maximum recursion depth exceeded",
        ),
        ('no json\n{"text": "a"}\n', r"cannot read .*a\.jsonl, line 1: no JSON"),
        (
            '{"text": "a"}\n{"text":\n{"text": "c"}\n',
            r"cannot read .*a\.jsonl, line 2: no JSON \(Expecting value at column 9\)",
        ),
    ],
)
def test_rows_of_json_that_cannot_be_read_as_they_stand_are_refused(rows, message, texts_of):
    with pytest.raises(SourceError, match=message):
        texts_of("a.jsonl", rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            "1,a\n2,b\n",
            r"has no column 'text' but 1, a: write .*#COLUMN, or put a first line of column names if it has none",
        ),
        ("text,text\na,b\n", r"a\.csv has 2 columns 'text': name them apart"),
        ("", r"a\.csv is empty: a table starts with a line of column names"),
        ('id,text\n1,a\n2,"b\n', r"a\.csv, line 3: in the row that starts here, unexpected end of data"),
        ('id,text\n1,"a \\"b\\", c"\n', r"a\.csv, line 2: in the row that starts here, ',' expected after '\"'"),
    ],
)
def test_csv_that_does_not_tell_its_texts_is_refused(rows, message, texts_of):
    with pytest.raises(SourceError, match=message):
        texts_of("a.csv", rows)


def test_a_line_that_does_not_end_is_refused_before_it_fills_the_memory(texts_of, monkeypatch):
    monkeypatch.setattr(line_rows, "LARGEST_WHOLE", 1000)
    monkeypatch.setattr(file_check, "CHUNK", 100)
    assert len(texts_of("a.jsonl", lines(*[{"text": "x" * 500}] * 9))) == 9
    with pytest.raises(SourceError, match=r"a\.jsonl has a line of more than 0 MB: a row is read as a whole"):
        texts_of("a.jsonl", lines({"text": "x" * 2000}))
    with pytest.raises(
        SourceError, match=r"b\.csv, line 2: in the row that starts here, field larger than field limit"
    ):
        texts_of("b.csv", 'text\n"' + "word\n" * 300)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.csv.gz"])
def test_a_place_in_a_table_of_lines_is_found_without_reading_what_comes_before(name, tmp_path, monkeypatch):
    import gzip

    rows = (
        lines(*({"text": f"row {i}\né"} for i in range(100)))
        if "json" in name
        else separated([f"row {i}\né" for i in range(100)])
    )
    (tmp_path / name).write_bytes((gzip.compress if name.endswith("gz") else bytes)(rows.encode()))
    (file,) = source_files([str(tmp_path / name)])
    table, read = TableRows(file), []
    some = iter(table)
    for _ in range(60):
        next(some)
    state = json.loads(json.dumps(table.state()))
    some.close()
    again = TableRows(file, state)
    monkeypatch.setattr(
        line_rows, "chunks", lambda file, offset=0: read.append(offset) or file_check.chunks(file, offset)
    )
    assert list(again) == [(i, f"row {i}\né") for i in range(60, 100)] and read[0] > len(rows) / 2


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (pyarrow.array(["a", None, "007"], pyarrow.large_string()), ["a", "", "007"]),
        (pyarrow.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pyarrow.array(["é".encode(), b"NA"]), ["é", "NA"]),
        (pyarrow.array([b"a", b"\xff"]), r"row 1: column 'text' holds what is no UTF-8"),
        (
            pyarrow.array([datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)]),
            r"row 0: column 'text' holds datetime, not text",
        ),
    ],
)
def test_texts_of_parquet_are_of_any_kind_of_text(values, texts, tmp_path):
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    reader = PieceReader(source_files([str(tmp_path / "a.parquet")]))
    if isinstance(texts, list):
        assert [piece.text for piece in reader] == texts
    else:
        with pytest.raises(SourceError, match=rf"a\.parquet, {texts}"):
            list(reader)


def test_two_columns_of_one_name_are_refused_in_parquet(tmp_path):
    parquet.write_table(
        pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"]), tmp_path / "a.parquet"
    )
    with pytest.raises(SourceError, match=r"a\.parquet has 2 columns 'text': name them apart"):
        list(PieceReader(source_files([str(tmp_path / "a.parquet")])))


def test_classes_and_texts_of_tables_are_not_converted(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        lines({"text": "2024-01-02", "kind": "007"}, {"text": "5", "kind": 7}, {"text": "x", "kind": "1e5"})
    )
    result = read_labelled([str(tmp_path / "a.jsonl")], "kind")
    assert [(document.text, document.label) for document in result] == [("2024-01-02", "007"), ("5", "7"), ("x", "1e5")]
    (tmp_path / "a.jsonl").write_text(lines({"text": 5, "kind": "a"}))
    with pytest.raises(SourceError, match="row 0: column 'text' holds int, not text"):
        read_labelled([str(tmp_path / "a.jsonl")], "kind")


# -- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["", "one\n", "line\n" * 1000])
@pytest.mark.parametrize("name", ["a.log", "a.jsonl", "a.csv"])
def test_zero_bytes_are_told_wherever_they_stand(before, name, texts_of, tmp_path, monkeypatch):
    monkeypatch.setattr(file_check, "CHUNK", 7)
    message = (
        rf"{name} holds zero bytes \(NUL\), the first at byte {len(before)}, line "
        rf"{before.count(chr(10)) + 1}\. .*`tr -d '\\000' < .*{name}"
    )
    with pytest.raises(SourceError, match=message):
        texts_of(name, before.encode() + b"\0" * 500 + b"text\n" * 9)
    if name == "a.log":
        with pytest.raises(SourceError, match=message):
            read_documents([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("encoding", "text", "message"),
    [
        ("utf-16", "plain", r"looks like UTF-16: convert it to UTF-8, `iconv -f utf-16 -t utf-8 .*a\.txt`"),
        ("utf-16", "温度が高い", "looks like UTF-16"),
        ("utf-16-le", "a plain text", "`iconv -f utf-16le"),
        ("utf-16-be", "a plain text", "`iconv -f utf-16be"),
        ("utf-32", "plain", "looks like UTF-32"),
        (
            "windows-1252",
            "he said “x”",
            r"is neither UTF-8 nor Latin-1 \(byte 8 is 0x93\): convert it from its own encoding",
        ),
        ("shift-jis", "温度が高い", r"is neither UTF-8 nor Latin-1 \(byte 0 is 0x89\)"),
        ("koi8-r", "привет мир, " * 20 + "a plain text " * 99, "is neither UTF-8 nor Latin-1 .*another script"),
        ("euc-jp", "温度が高い" * 9, "is neither UTF-8 nor Latin-1 .*another script"),
    ],
)
def test_other_encodings_are_refused_and_not_read_as_latin_1(encoding, text, message, texts_of, tmp_path):
    with pytest.raises(SourceError, match=message):
        texts_of("a.txt", text.encode(encoding))
    with pytest.raises(SourceError, match=message):
        read_documents([str(tmp_path / "a.txt")])


def test_latin_1_of_many_accents_is_read(texts_of):
    text = "élève à côté, naïf, ÄÖÜ, 20 °C\n" * 50
    assert texts_of("a.txt", text.encode("latin-1")) == [text]


def test_a_mark_of_the_byte_order_is_no_part_of_a_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    assert read_documents([str(tmp_path / "a.txt")])[0].text == "text"


# -- files that change ----------------------------------------------------------------------------------------------


def test_a_content_is_told_although_its_size_and_time_are_the_old_ones(tmp_path, word_tokenizer):
    file, options = tmp_path / "a.txt", {"block_size": 16, "end_of_text": False, "progress": False}
    file.write_text("w11 " * 200)
    status, first = file.stat(), content(*source_files([str(file)]))
    rows = [training_rows([str(file)], word_tokenizer, 64, **options)[0]["input_ids"].tolist()]
    file.write_text("w22 " * 200)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert content(*source_files([str(file)])) != first
    assert training_rows([str(file)], word_tokenizer, 64, **options)[0]["input_ids"].tolist() != rows[0]


def test_a_content_is_the_same_under_another_name_and_time(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    os.utime(tmp_path / "b.txt", (1, 1))
    first, second = (content(file) for file in source_files([str(tmp_path / "*.txt")]))
    assert first == second


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_a_file_that_changes_while_it_is_read_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(file_check, "CHUNK", 1000)
    monkeypatch.setattr(document_chunks, "PIECE", 100)
    file, texts = tmp_path / name, [f"text {i}" for i in range(5000)]
    if name.endswith("parquet"):
        parquet.write_table(pyarrow.table({"text": texts}), file)
    else:
        file.write_text(lines(*({"text": text} for text in texts)) if name == "a.jsonl" else separated(texts))
    result = iter(PieceReader(source_files([str(file)])))
    next(result)
    status = file.stat()
    with file.open("r+b") as changed:
        changed.seek(-1, os.SEEK_END)
        changed.write(b"x")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(
        SourceError, match=rf"{name} changed while it was read: wait until it is written, or name a copy of it"
    ):
        list(result)


def test_a_file_that_changes_while_it_is_surveyed_or_tokenised_leaves_nothing_in_the_cache(
    tmp_path, word_tokenizer, monkeypatch
):
    file, survey_of, options = (
        tmp_path / "a.txt",
        file_check._survey,
        {"block_size": 16, "end_of_text": False, "progress": False},
    )
    file.write_text("w11 " * 200)

    def changed(source):
        result = survey_of(source)
        file.write_text("w22 " * 200)
        return result

    monkeypatch.setattr(file_check, "_survey", changed)
    with pytest.raises(SourceError, match=r"a\.txt changed while it was read"):
        training_rows([str(file)], word_tokenizer, 64, **options)
    monkeypatch.setattr(file_check, "_survey", survey_of)
    reader = PieceReader.__iter__

    def replaced(self):
        yield from reader(self)
        (tmp_path / "new").write_text("w33 " * 300)
        (tmp_path / "new").replace(file)

    monkeypatch.setattr(PieceReader, "__iter__", replaced)
    with pytest.raises(SourceError, match=r"a\.txt changed while it was read"):
        training_rows([str(file)], word_tokenizer, 64, **options)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_survey_that_was_cut_off_is_made_again(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (file,) = source_files([str(tmp_path / "a.txt")])
    result = file_check.survey(file)
    (kept,) = (tmp_path / "cache/surveys").iterdir()
    for left in ("", "{}", "[1]", '{"enc'):
        kept.write_text(left)
        assert file_check.survey(file) == result


# -- names ----------------------------------------------------------------------------------------------------------


def paths(*sources):
    return [file.path for file in source_files([str(source) for source in sources])]


def test_a_glob_goes_around_a_circle_of_links_once(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / ".hidden").mkdir()
    for name in ("a.log", "y/b.log", ".hidden/c.log"):
        (tmp_path / "x" / name).write_text("text")
    for at in range(12):  # a walk that follows each would have no end
        (tmp_path / "x" / "y" / f"up{at}").symlink_to(tmp_path / "x")
    expected = [str(tmp_path / "x/a.log"), str(tmp_path / "x/y/b.log")]
    assert paths(tmp_path / "**/*.log") == paths(tmp_path / "x/**/*.log") == paths(tmp_path / "x/**") == expected
    assert paths(tmp_path / "**/y/**/b.log") == expected[1:]
    assert [document.name for document in read_documents([str(tmp_path / "**/*.log")])] == ["a.log", "b.log"]


def test_a_glob_is_relative_and_the_home_folder_has_a_sign(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.jsonl").write_text(lines({"m": "text"}))
    monkeypatch.chdir(tmp_path)
    assert paths("**/*.jsonl#m") == paths("x/*.jsonl#m") == ["x/a.jsonl"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths("~/x/a.jsonl#m") == paths("~/**/*.jsonl#m") == [str(tmp_path / "x/a.jsonl")]
    assert read_documents(["~/x/*"])[0].text == lines({"m": "text"})
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "b.log").write_text("a folder of that name")
    assert paths("~/b.log") == ["~/b.log"]


def test_what_is_no_file_is_refused_by_its_kind(tmp_path):
    os.mkfifo(tmp_path / "p.log")
    (tmp_path / "gone.log").symlink_to(tmp_path / "nothing")
    for name, other in (("one", "two"), ("two", "one")):
        (tmp_path / name).symlink_to(tmp_path / other)
    messages = {
        "": "is a folder: name its files",
        "p.log": "is a pipe, which can be read once only",
        "gone.log": "is a link to nothing",
    }
    for name, message in {
        **messages,
        "one": "is a link to nothing, or one of a circle",
        "p*": "is a pipe",
        "g*": "a link to nothing",
    }.items():
        for read in (source_files, read_documents):
            with pytest.raises(SourceError, match=message):
                read([str(tmp_path / name)])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.log").write_text("text")
    (tmp_path / "x" / "a.log").chmod(0)
    for read in (lambda s: list(PieceReader(source_files(s))), read_documents):
        with pytest.raises(
            SourceError, match=r"cannot read .*a\.log: Permission denied; check the path and its permissions"
        ):
            read([str(tmp_path / "x" / "*")])
    (tmp_path / "x").chmod(0)
    try:
        with pytest.raises(SourceError, match=r"the folder .* cannot be read: check its permissions"):
            source_files([str(tmp_path / "x" / "*")])
    finally:
        (tmp_path / "x").chmod(0o700)
