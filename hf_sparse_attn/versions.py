"""The version of this package, and the range of Transformers versions that it supports."""

from __future__ import annotations

import transformers
from packaging.version import Version

VERSION = "0.1.0"  # of this package
SUPPORTED_TRANSFORMERS = (Version("5.17"), Version("5.24"))  # from, up to but not including


def check_transformers(version: str = transformers.__version__) -> None:
    """Raise ImportError if Transformers ``version`` is outside the supported range."""
    low, high = SUPPORTED_TRANSFORMERS
    if not low <= Version(Version(version).base_version) < high:
        raise ImportError(
            f"hf_sparse_attn supports transformers >= {low} and < {high}, found {version}: pip install 'transformers>={low},<{high}'"
        )
