"""Results of the self-test, kept by the versions and the code that they are of."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hf_sparse_attn_kernels
import torch
import transformers
from hf_sparse_attn_kernels.caching import VARIABLE, cache_folder, say_once
from packaging.version import Version

from ..architectures.versions import VERSION
from ..system.files import read_json, write_json

# of Transformers, for builds of a branch, which change under one version
SOURCES = (
    *("cache_utils.py", "masking_utils.py", "modeling_utils.py", "modeling_layers.py", "configuration_utils.py"),
    *("generation/utils.py", "models/llama", "models/auto", "integrations/sdpa_attention.py", "utils/generic.py"),
)


def kept_pass() -> bool:
    """Whether the self-test passed before, with these versions and this code."""
    return _read(_file()).get("differences") == []


def keep(differences: list[str]) -> None:
    """Keep a result: what differed, nothing for a pass.
    Where it cannot be kept that is said once, and the test runs in every process.
    """
    result = {**made_with(), "python": sys.version, "differences": differences}
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        write_json(_file(), result)
    except OSError as error:
        say_once(
            f"the result of the self-test cannot be kept in {_folder()} ({error}): set {VARIABLE} to a folder that "
            "can be written to"
        )


def newest_pass(tested: Version) -> str | None:
    """The newest version beyond the ``tested`` ones that passed with this code and torch, None if there is none."""
    here = made_with()
    passed = [
        Version(result["transformers"])
        for result in map(_read, _files())
        if result.get("differences") == []
        and all(result.get(name) == here[name] for name in ("torch", "hf_sparse_attn"))
    ]
    return str(max(passed)) if passed and max(passed) > tested else None


def made_with() -> dict[str, str]:
    """What a result depends on."""
    package = Path(__file__).parents[1]
    return {
        "transformers": transformers.__version__,
        "transformers_code": _digest(Path(transformers.__file__).parent, SOURCES),
        "torch": torch.__version__,
        # the code, too: a checkout changes under one version
        "hf_sparse_attn": f"{VERSION} {_digest(package, ('.',))} "
        f"{_digest(Path(hf_sparse_attn_kernels.__file__).parent, ('.',))}",
    }


@cache
def _digest(root: Path, names: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in names:
        for path in sorted((root / name).rglob("*.py") if (root / name).is_dir() else [root / name]):
            digest.update(f"\0{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:16]


def _folder() -> Path:
    return cache_folder() / "self_tests"


def _file() -> Path:
    # named by all that a result depends on: under other versions it is not even found
    return _folder() / f"{hashlib.sha256(repr(sorted(made_with().items())).encode()).hexdigest()[:32]}.json"


def _files() -> Iterator[Path]:
    try:
        yield from sorted(_folder().glob("*.json"))
    except OSError:
        return


def _read(path: Path) -> dict[str, Any]:
    """What was kept in ``path``; nothing if it is not there, not whole, or others than this user could have
    written it.
    """
    try:
        # a file that somebody else put into a shared folder could vouch for a version that fails
        status = path.lstat()
        is_ours = not hasattr(os, "getuid") or status.st_uid == os.getuid()
        if not (is_ours and stat.S_ISREG(status.st_mode) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
            return {}
        result = read_json(path)
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}
