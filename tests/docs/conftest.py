"""What tests of the pages share."""

from __future__ import annotations

import importlib
import sys

import pytest
from helpers.markdown_pages import ROOT


@pytest.fixture(scope="session")
def builder():
    """A module of docs/, by name: of ``docs/builder/``, or ``generate`` itself."""

    def load(name):
        before = list(sys.path)
        sys.path.insert(0, str(ROOT / "docs"))
        try:
            return importlib.import_module(name if name == "generate" else f"builder.{name}")
        finally:
            sys.path[:] = before

    return load
