"""Where things are kept: the variable, the home, and neither."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

import pytest
from hf_sparse_attn_kernels import caching


@pytest.fixture
def home(monkeypatch, tmp_path):
    """The home folder of this test, and a working directory that is another."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.fixture
def nobody(monkeypatch):
    """A user without a home, as in a container with a user id that no file knows."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    caching.say_once.cache_clear()


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_variable_that_is_set_to_nothing_is_the_default(home, monkeypatch, value):
    monkeypatch.delenv(caching.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(caching.VARIABLE, value)
    assert caching.cache_folder() == home / ".cache/hf_sparse_attn"


@pytest.mark.parametrize(
    ("value", "found"), [("~/kept", "home/kept"), ("~", "home"), ("kept", "work/kept"), ("./a/~", "work/a/~")]
)
def test_a_named_folder_is_absolute_and_knows_the_home(home, monkeypatch, value, found):
    monkeypatch.setenv(caching.VARIABLE, value)
    assert caching.cache_folder() == home.parent / found
    assert os.listdir(home.parent / "work") == []


def test_a_home_that_does_not_exist_is_refused_by_name(monkeypatch):
    monkeypatch.setenv(caching.VARIABLE, "~no-such-user/kept")
    with pytest.raises(ValueError, match=r"HF_SPARSE_ATTN_CACHE='~no-such-user/kept': this home is not known"):
        caching.cache_folder()


def test_without_a_home_a_named_folder_is_used_and_else_a_temporary_one_which_is_said_once(
    nobody, monkeypatch, tmp_path, caplog
):
    monkeypatch.setenv(caching.VARIABLE, str(tmp_path))
    assert caching.cache_folder() == tmp_path and not caplog.records
    monkeypatch.delenv(caching.VARIABLE)
    assert {caching.cache_folder() for _ in range(2)} == {Path(tempfile.gettempdir()) / f"hf_sparse_attn-{os.getuid()}"}
    assert caplog.text.count("set HF_SPARSE_ATTN_CACHE") == 1
