"""Where this package, and the plugin that stands on it, keep what is made or fetched once."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

VARIABLE = "HF_SPARSE_ATTN_CACHE"


def cache_folder() -> Path:
    """``$HF_SPARSE_ATTN_CACHE`` with ``~`` for the home, else ``~/.cache/hf_sparse_attn``, or without a home a
    temporary folder; absolute.

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
    say_once(
        f"there is no home folder for ~/.cache/hf_sparse_attn: {temporary_folder()} is used; set {VARIABLE} to keep "
        "things for good"
    )
    return temporary_folder()


def temporary_folder() -> Path:
    """This user's place for what cannot be kept in the cache; not made."""
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""  # elsewhere each user has a temporary folder of their own
    return Path(tempfile.gettempdir()).absolute() / f"hf_sparse_attn{user}"


def places(name: str) -> Iterator[Path]:
    """Folders ``name`` for what will run as this user's code, best first: in the cache, in `temporary_folder`, of this
    process alone.

    Each is made, and only given where nobody else can write. Take the next one where writing fails; why is said once,
    when it is taken.
    """
    for root in (cache_folder(), temporary_folder()):
        folder, reason = root / name, None
        try:
            # nobody else may write where this user's code is loaded from
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _close_to_others(folder)
            reason = _open_to_others(root) or _open_to_others(folder)
        except OSError as error:
            reason = str(error)
        if reason is None:
            yield folder
            reason = f"{folder} cannot be written"
        say_once(
            f"{reason}: {name} are kept elsewhere, for a short time only; set {VARIABLE} to a folder that is yours "
            "alone"
        )
    alone = Path(tempfile.mkdtemp(prefix="hf_sparse_attn-"))
    atexit.register(shutil.rmtree, alone, ignore_errors=True)
    yield alone


def _close_to_others(folder: Path) -> None:
    """A folder of this user's may have been made where all new ones can be written by a group."""
    status = folder.stat()
    if status.st_uid == os.getuid() and status.st_mode & (stat.S_IWOTH | stat.S_IWGRP):
        folder.chmod(stat.S_IMODE(status.st_mode) & ~(stat.S_IWOTH | stat.S_IWGRP))


def _open_to_others(path: Path) -> str | None:
    """Why someone else could change what ``path`` holds, or None. This user's own group is not someone else."""
    status = path.stat()
    if status.st_uid not in (os.getuid(), 0):
        return f"{path} belongs to another user ({status.st_uid})"
    others = stat.S_IWOTH if status.st_gid == os.getgid() else stat.S_IWOTH | stat.S_IWGRP
    # with the sticky bit, as /tmp has it, others can add files but not replace ours
    if status.st_mode & others and not status.st_mode & stat.S_ISVTX:
        return f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def is_trusted(file: Path) -> bool:
    """Whether ``file`` is a plain file of this user's or root's that nobody else can write."""
    # lstat: a link is not followed, so it is never a plain file
    status = file.lstat()
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_uid in (os.getuid(), 0)
        and not status.st_mode & (stat.S_IWOTH | stat.S_IWGRP)
    )


@cache
def say_once(message: str) -> None:
    """One warning of a process for each message."""
    logger.warning("%s", message)
