"""Where this package, and the plugin that stands on it, keep what is made or fetched once."""

from __future__ import annotations

import logging
import os
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

VARIABLE = "HF_SPARSE_ATTN_CACHE"


def cache_folder() -> Path:
    """``$HF_SPARSE_ATTN_CACHE`` with ``~`` for the home, else ``~/.cache/hf_sparse_attn``, or without a home a temporary folder; absolute.

    A variable that is set to nothing counts as not set. The folder is not made.

    Raises:
        ValueError: the variable names a home that does not exist.
    """
    named = os.environ.get(VARIABLE, "").strip()
    try:
        return Path(named or "~/.cache/hf_sparse_attn").expanduser().absolute()
    except RuntimeError as error:
        if named:
            raise ValueError(f"{VARIABLE}={named!r}: this home is not known here; name the folder without ~") from error
    say_once(f"there is no home folder for ~/.cache/hf_sparse_attn: {temporary_folder()} is used; set {VARIABLE} to keep things for good")
    return temporary_folder()


def temporary_folder() -> Path:
    """This user's place for what cannot be kept in the cache; not made."""
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""  # elsewhere each user has a temporary folder of their own
    return Path(tempfile.gettempdir()).absolute() / f"hf_sparse_attn{user}"


@cache
def say_once(message: str) -> None:
    """One warning of a process for each message."""
    logger.warning("%s", message)
