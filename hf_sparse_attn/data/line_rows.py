"""Rows of JSON and CSV, every text as it stands, with a state that goes on at a row without reading those before it."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Generator, Iterator
from typing import Any

from .file_check import LARGEST_WHOLE, Survey, chunks, survey
from .formats import SourceFile
from .sources import SourceError

SEPARATORS = {"csv": ",;\t|", "tsv": "\t,;|"}  # its own first
LISTED = 20  # columns that an error names


def column_error(file: SourceFile, columns: list[str]) -> SourceError:
    """The error of a table without the column that is asked for."""
    names = ", ".join(name[:40] for name in columns[:LISTED]) + (", …" if len(columns) > LISTED else "")
    header = ", or put a first line of column names if it has none" if file.format in SEPARATORS else ""
    return SourceError(f"{file.path} has no column {file.column!r} but {names}: write {file.path}#COLUMN{header}")


class LineRows:
    """Rows {column: value} of a file, from a state on.

    Raises:
        SourceError: the file cannot be read or has no such column; while iterating, a row cannot be read.
    """

    def __init__(self, file: SourceFile) -> None:
        self.file, self.survey = file, survey(file)
        self._next = {"offset": 0, "line": 1}

    def state_dict(self) -> dict[str, int]:
        """Where the next row starts: its byte and line."""
        return dict(self._next)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = dict(state)

    def __iter__(self) -> Generator[dict[str, Any]]:
        raise NotImplementedError

    def _lines(self, offset: int) -> Generator[tuple[int, str]]:
        """(its bytes, the line with its end) of each line from ``offset`` on; a line ends in CR, LF or both."""
        for raw in _split(self.file, offset):
            text = raw.decode(self.survey.encoding)
            # a byte order mark stands at the start of a file only
            yield len(raw), text if offset else text.removeprefix("\ufeff")
            offset += len(raw)


def _split(file: SourceFile, offset: int) -> Generator[bytes]:
    held = bytearray()
    for part in chunks(file, offset):
        held += part
        if len(held) > LARGEST_WHOLE:
            raise SourceError(
                f"{file.path} has a line of more than {LARGEST_WHOLE >> 20} MB: a row is read as a whole; split it"
            )
        if b"\n" in part or b"\r" in part:
            lines = bytes(held).splitlines(keepends=True)
            held = bytearray(lines.pop())  # it may go on, and CR may be half of a line end
            yield from lines
    yield from bytes(held).splitlines(keepends=True)


# -- JSON -----------------------------------------------------------------------------------------------------------


class JsonLines(LineRows):
    """One object a line. Other fields may be of any type, change it, and come and go."""

    def __init__(self, file: SourceFile) -> None:
        super().__init__(file)
        _check_fields(file, (values for _, _, values in self._objects(0, 1)))

    def __iter__(self) -> Generator[dict[str, Any]]:
        for offset, line, values in self._objects(**self._next):
            self._next = {"offset": offset, "line": line}
            yield {self.file.column: values.get(self.file.column)}

    def _objects(self, offset: int, line: int) -> Generator[tuple[int, int, dict[str, Any]]]:
        """(byte behind it, line behind it, fields) of each row."""
        for size, text in self._lines(offset):
            offset, line = offset + size, line + 1
            if text.strip():
                yield offset, line, _object(self.file, f"line {line - 1}", text)


class WholeJson(LineRows):
    """An array of objects, or objects one behind the other, over any number of lines: read as a whole.
    A state counts rows.
    """

    def __init__(self, file: SourceFile) -> None:
        super().__init__(file)
        _check_whole(file, self.survey)
        text = b"".join(chunks(file)).decode(self.survey.encoding).removeprefix("\ufeff")
        self.rows = list(_values(file, text))
        for at, values in enumerate(self.rows):
            _check_object(file, f"row {at}", values)
        _check_fields(file, iter(self.rows))

    def __iter__(self) -> Generator[dict[str, Any]]:
        for at in range(self._next["offset"], len(self.rows)):
            self._next = {"offset": at + 1, "line": 1}
            yield {self.file.column: self.rows[at].get(self.file.column)}


def json_rows(file: SourceFile) -> LineRows:
    """JSON lines, unless the first line is the beginning of something longer."""
    encoding = survey(file).encoding
    with contextlib.closing(_split(file, 0)) as lines:
        texts = (raw.decode(encoding).removeprefix("\ufeff") for raw in lines)
        first = next((text for text in texts if text.strip()), "{}")
    try:
        whole = first.lstrip().startswith("{") and isinstance(DECODER.decode(first), dict)
    except json.JSONDecodeError:
        whole = False
    except (ValueError, RecursionError):  # reading it as a line says what is wrong
        whole = True
    return JsonLines(file) if whole else WholeJson(file)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 4000 else float(digits)  # Python refuses to read longer ones


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the field {next(name for name in names if names.count(name) > 1)!r} stands twice in one object"
        )
    return values


DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_int=_integer)


def _object(file: SourceFile, where: str, text: str) -> dict[str, Any]:
    try:
        values = DECODER.decode(text.rstrip())
    except json.JSONDecodeError as error:
        why = f"no JSON ({error.msg} at column {error.colno})"
        raise SourceError(f"cannot read {file.path}, {where}: {why}; repair or remove it") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"cannot read {file.path}, {where}: {error}; repair or remove it") from error
    _check_object(file, where, values)
    return values  # type: ignore[no-any-return]


def _check_object(file: SourceFile, where: str, values: Any) -> None:
    if not isinstance(values, dict):
        raise SourceError(
            f'{file.path}, {where}: a {type(values).__name__} in place of an object {{"{file.column}": …}}'
        )


def _values(file: SourceFile, text: str) -> Iterator[Any]:
    """The elements of arrays and the values beside them."""
    text, at = text.rstrip(), 0
    while at < len(text):
        try:
            # raw_decode takes no white space before a value
            value, at = DECODER.raw_decode(text, len(text) - len(text[at:].lstrip()) if text[at].isspace() else at)
        except json.JSONDecodeError as error:
            why = f"no JSON ({error.msg} at column {error.colno})"
            raise SourceError(
                f"cannot read {file.path}, line {error.lineno}: {why}; check that it is whole, repair it"
            ) from error
        except (ValueError, RecursionError) as error:
            raise SourceError(f"cannot read {file.path}: {error}; repair it") from error
        yield from value if isinstance(value, list) else [value]


def _check_whole(file: SourceFile, survey_result: Survey) -> None:
    if survey_result.size > LARGEST_WHOLE:
        what = f"JSON of {survey_result.size >> 20} MB over several lines, or its first line is no object"
        raise SourceError(
            f"{file.path} is {what}: so much is read line by line only; convert it, e.g. `jq -c .`, or repair the "
            "first line"
        )


def _check_fields(file: SourceFile, rows: Iterator[dict[str, Any]]) -> None:
    """Some row has the column: the first one, as a rule."""
    names: dict[str, None] = {}
    for values in rows:
        if file.column in values:
            return
        if len(names) <= LISTED:
            names.update(dict.fromkeys(values))
    if names:
        raise column_error(file, list(names))


# -- CSV ------------------------------------------------------------------------------------------------------------


class CsvRows(LineRows):
    """Every text as it stands (``NA`` is two letters, ``007`` three); a row with more or fewer fields than the header
    is refused.

    Fields are separated as the name says, or by what else among comma, semicolon, tab and bar gives a header with the
    column.
    """

    def __init__(self, file: SourceFile) -> None:
        super().__init__(file)
        # csv refuses fields beyond 128 KB by default
        csv.field_size_limit(LARGEST_WHOLE)
        self.separator, self.header = self._header()
        self.at = self.header.index(file.column)

    def _header(self) -> tuple[str, list[str]]:
        names: list[str] | csv.Error = []
        for separator in SEPARATORS[self.file.format]:
            try:
                header = next((row for _, row in self._rows(separator, 0, 1) if row), [])
            except csv.Error as error:
                names = names or error
                continue
            if (count := header.count(self.file.column)) > 1:
                raise SourceError(f"{self.file.path} has {count} columns {self.file.column!r}: name them apart")
            if count:
                return separator, header
            names = names or header
        if isinstance(names, csv.Error):
            raise self._refused(1, str(names)) from names
        if not names:
            raise SourceError(f"{self.file.path} is empty: a table starts with a line of column names; leave it out")
        raise column_error(self.file, names)

    def __iter__(self) -> Generator[dict[str, str]]:
        # reading from the start passes over the header, which is a row like others
        header = not self._next["offset"]
        place = self._next
        try:
            for place, row in self._rows(self.separator, **self._next):
                self._next = place
                if row and len(row) != len(self.header):
                    raise self._refused(place["line"] - 1, f"{len(row)} fields where the header has {len(self.header)}")
                if row and not header:
                    yield {self.file.column: row[self.at]}
                header = header and not row
        except csv.Error as error:
            raise self._refused(place["line"], f"in the row that starts here, {error}") from error

    def _refused(self, line: int, why: str) -> SourceError:
        return SourceError(
            f"{self.file.path}, line {line}: {why}: quote the texts that hold a separator or a line end, and double "
            "quotes in them"
        )

    def _rows(self, separator: str, offset: int, line: int) -> Generator[tuple[dict[str, int], list[str]]]:
        """(where the next row starts, fields) of each row."""

        def lines() -> Iterator[str]:
            nonlocal offset, line
            for size, text in self._lines(offset):
                offset, line = offset + size, line + 1
                yield text

        # a quoted text may hold line ends: a row takes as many lines as the reader asks for
        for row in csv.reader(lines(), delimiter=separator, strict=True):
            yield {"offset": offset, "line": line}, row
