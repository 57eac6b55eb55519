"""Writing files so that a kill or a full disk never costs what was there before."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?(?P<variant>\.\w+)?\.safetensors|model\.safetensors\.index(?P<index_variant>\.\w+)?\.json")


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path in the same folder, then rename it to ``path``; on failure remove it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        _sync(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON with a final newline. Raises ValueError for NaN or infinity, which JSON cannot hold."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """What a JSON file holds. Raises ValueError if it is cut off or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is not a whole JSON file ({error}): it was cut off or changed; write it anew") from error


@contextmanager
def replaced_folder(target: str | Path) -> Iterator[Path]:
    """A temporary folder whose files move into ``target`` when the block ends well; if it fails ``target`` stays as it was.

    Every file is complete on disk before the first one is renamed, so a kill during the renames leaves whole files.
    Weight files of the same variant that the new set does not have (another number of shards) are removed last.
    """
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        files = [f.relative_to(temporary) for f in temporary.rglob("*") if f.is_file()]
        for file in files:
            _sync(temporary / file)
        for file in files:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            (temporary / file).replace(target / file)
        variants = {_variant(file.name) for file in files} - {None}
        for old in target.iterdir():
            if _variant(old.name) in variants and old.relative_to(target) not in files:
                old.unlink()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copied_folder(source: Path, target: Path) -> None:
    """Copy the files of ``source`` into ``target`` as `replaced_folder` does."""
    with replaced_folder(target) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)


def _variant(name: str) -> str | None:
    """Variant of a weight file name ("" for the plain one), None for any other file."""
    found = WEIGHTS.fullmatch(name)
    return None if found is None else found["variant"] or found["index_variant"] or ""


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
