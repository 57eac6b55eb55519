"""Which files of the package a call goes through: what a reader has to open to follow it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import hf_sparse_attn

PACKAGE = Path(hf_sparse_attn.__file__).parent
# importing, being asked where a module is, and looking for names that a module lacks, as `inspect` does
UNCOUNTED = ("<module>", "find_spec", "__getattr__")


def entries(function: Callable[[], Any], package: Path = PACKAGE) -> dict[str, int]:
    """Files of ``package`` in the order in which ``function()`` first calls something in them -> how often it enters
    them.

    A file is entered where a function of it is called and the call before it was of another file.
    """
    root, entered, last = f"{package}/", {}, None

    def count(frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal last
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(root) or frame.f_code.co_name in UNCOUNTED:
            return
        if file != last:
            name = file.removeprefix(root)
            entered[name] = entered.get(name, 0) + 1
        last = file

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return entered


def files_entered(function: Callable[[], Any], package: Path = PACKAGE) -> list[str]:
    """Files of ``package`` that ``function()`` goes through, in the order of their first call."""
    return list(entries(function, package))
