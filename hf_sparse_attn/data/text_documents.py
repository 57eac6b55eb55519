"""Sources as documents: whole texts of files, packages and datasets of the Hub."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path

from .package_cache import SourceError
from .sources import FORMS, local_files, package_files


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


def read_documents(sources: list[str]) -> list[Document]:
    """The documents of all sources, by name. Raises SourceError if one cannot be read or two have the same name."""
    documents: list[Document] = []
    for source in sources:
        if source.startswith("hub:"):
            documents += _hub_documents(source)
        else:
            files = package_files(source) if source.startswith(("pypi:", "deb:")) else local_files(source)
            if not files:
                raise SourceError(f"source {source!r}: no such file; forms: {FORMS}")
            documents += [Document(file.name, read_text(file)) for file in files]
    names = [d.name for d in documents]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise SourceError(
            f"documents must have distinct names, but {', '.join(twice[:3])} appear twice; narrow the globs"
        )
    return documents


def read_text(file: Path) -> str:
    """Text of a file in UTF-8 or, failing that, Latin-1, unpacked if it is .gz or .zst; HTML without its tags.

    Raises:
        SourceError: the file cannot be read, changes meanwhile, is packed and not whole, or is no text (see
            `EncodingCheck`).
    """
    from .decoding import EncodingCheck  # these stand on this module
    from .file_check import chunks
    from .formats import source_files

    raw = b"".join(part for source in source_files([str(file)]) for part in chunks(source))
    seen = EncodingCheck(str(file))
    seen.add(raw)
    text = raw.decode(seen.encoding()).removeprefix("\ufeff")
    return text_of_html(text) if file.suffix in (".html", ".htm") else text


def text_of_html(text: str) -> str:
    """HTML without tags, scripts and entities."""
    text = re.sub(r"(?is)<(script|style|head).*?</\1>", " ", text)
    text = html.unescape(re.sub(r"(?s)<[^>]+>", " ", text))
    return re.sub(r"[ \t]+", " ", re.sub(r"\n\s*\n\s*", "\n\n", text))


def _hub_documents(source: str) -> list[Document]:
    parts = source.split(":")
    if len(parts) != 4:
        raise SourceError(f"source {source!r} is incomplete; forms: {FORMS}")
    from datasets import load_dataset  # heavy, and needed for this kind of source only

    _, name, split, column = parts
    try:
        rows = load_dataset(name, split=split)
    except Exception as error:
        raise SourceError(f"cannot load {source!r} from the Hub: {error}") from error
    if column not in rows.column_names:
        raise SourceError(f"source {source!r}: no column {column!r}; columns: {', '.join(rows.column_names)}")
    return [Document(f"{name}/{split}/{i}", text) for i, text in enumerate(rows[column])]
