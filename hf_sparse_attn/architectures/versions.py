"""The version of this package, and the versions of Transformers that it was tested with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import transformers
from packaging.version import InvalidVersion, Version

VERSION = "0.2.0"  # of this package; pyproject.toml reads it from here
# the oldest and the newest release that the tests run under, both included
SUPPORTED_TRANSFORMERS = (Version("5.17"), Version("5.24"))


def tested_range() -> str:
    return " to ".join(map(str, SUPPORTED_TRANSFORMERS))


def is_tested(version: str | None = None) -> bool:
    """Whether Transformers ``version`` (that installed) is a release of the tested range;
    before its release none is.
    """
    installed = _parsed(version or transformers.__version__)
    low, high = SUPPORTED_TRANSFORMERS
    return (
        installed is not None
        and not installed.is_prerelease
        and low <= installed
        # a patch release belongs to its minor one: 5.24.3 counts as 5.24
        and installed.release[: len(high.release)] <= high.release
    )


def check_transformers(version: str | None = None) -> None:
    """Raise ImportError if Transformers ``version`` (that installed) is too old; warn if it was not tested."""
    version = version or transformers.__version__
    installed, low = _parsed(version), SUPPORTED_TRANSFORMERS[0]
    # a development build comes before its release in order, but has its code
    if installed is not None and Version(installed.base_version) < low:
        raise ImportError(f"hf_sparse_attn supports transformers >= {low}, found {version}: {advice()}")
    if not is_tested(version):
        warnings.warn(
            f"hf_sparse_attn was tested with transformers {tested_range()}, found {version}: before the first sparse "
            "model is made a "
            "self-test of about a second tells whether it works there",
            stacklevel=3,
        )


@contextmanager
def checked_transformers() -> Iterator[None]:
    """Round the imports of this package: `check_transformers` before, and where an untested version lacks something,
    which one to install.

    Raises:
        ImportError: Transformers is too old, or has not what is imported from it.
    """
    check_transformers()
    try:
        yield
    except (ImportError, AttributeError) as error:
        if is_tested():
            raise
        raise ImportError(
            f"hf_sparse_attn was tested with transformers {tested_range()}; {transformers.__version__} lacks what it "
            "needs "
            f"({error}): {advice()}"
        ) from error


def advice(newest: str | None = None) -> str:
    """The command that installs the newest version that works, the newest tested one unless another is known."""
    return f"pip install 'transformers=={newest or f'{SUPPORTED_TRANSFORMERS[1]}.*'}'"


def _parsed(version: str) -> Version | None:
    """None for what is no version of Python packages, as of a build from a branch."""
    try:
        return Version(version)
    except InvalidVersion:
        return None


TESTED = transformers.__version__ if is_tested() else None  # the installed version, if the tests run under it
