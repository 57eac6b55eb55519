"""The compiled library: kept under its content's hash, loaded only if whole and nobody else's, and made once."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import threading
import time

import pytest
from hf_sparse_attn_kernels import caching, implementations
from hf_sparse_attn_kernels.cpp_kernels import compiling

COMPILER = """#!/bin/sh
echo run >> "{runs}"
for last; do :; done
head -c 60000 /dev/zero > "$last"
{more}
"""


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, and a temporary folder of this test."""
    monkeypatch.setenv(caching.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv(compiling.LEVEL_VARIABLE, raising=False)
    caching.say_once.cache_clear()
    for function in (compiling._load, implementations._decide):
        function.cache_clear()
    yield tmp_path / "cache/kernels"
    for function in (compiling._load, implementations._decide):
        function.cache_clear()


@pytest.fixture
def compiler(tmp_path):
    """Makes a compiler that counts its runs and writes a file of zeros: (command, number of runs so far)."""

    def make(more="", name="c++"):
        program = tmp_path / name
        program.write_text(COMPILER.format(runs=tmp_path / "runs", more=more))
        program.chmod(0o755)
        return str(program)

    make.runs = lambda: len((tmp_path / "runs").read_text().split()) if (tmp_path / "runs").exists() else 0
    return make


def test_a_library_is_named_by_its_content_and_compiled_once(cache, compiler):
    program = compiler()
    first = compiling.library(program, ("-a",))
    assert first == compiling.library(program, ("-a",)) and compiler.runs() == 1
    assert first.parent == cache and first.stem.endswith(hashlib.sha256(first.read_bytes()).hexdigest()[:32])
    assert compiling.library(program, ("-b",)) != first and compiler.runs() == 2
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700 and not first.stat().st_mode & 0o022


@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_a_library_that_was_cut_off_is_made_again_and_the_rest_removed(cache, compiler, share, caplog):
    program = compiler()
    first = compiling.library(program, ())
    os.truncate(first, int(share * 60000))
    assert compiling.library(program, ()) == first and first.stat().st_size == 60000 and compiler.runs() == 2
    assert "is damaged" in caplog.text and list(cache.glob("*.so")) == [first]


def test_a_changed_library_is_not_loaded(cache, compiler):
    first = compiling.library(compiler(), ())
    first.write_bytes(b"\x7fELF" + bytes(59996))
    assert compiling.library(compiler(), ()).read_bytes() == bytes(60000)


@pytest.mark.skipif(os.name == "nt" or os.getuid() != 0, reason="gives files to another user")
@pytest.mark.parametrize("what", ["file", "folder", "root"])
def test_what_another_user_owns_is_not_loaded(cache, compiler, what, caplog):
    first = compiling.library(compiler(), ())
    os.chown({"file": first, "folder": cache, "root": cache.parent}[what], 65534, 65534)
    again = compiling.library(compiler(), ())
    assert compiler.runs() == 2 and again.stat().st_uid == 0
    assert (again.parent == cache) == (what == "file")
    if what != "file":
        assert caplog.text.count("set HF_SPARSE_ATTN_CACHE to a folder that is yours alone") == 1


@pytest.mark.parametrize("what", ["file", "link", "root"])
def test_what_others_can_write_is_not_loaded(cache, compiler, what, tmp_path):
    first = compiling.library(compiler(), ())
    if what == "file":
        first.chmod(0o666)
    elif what == "root":
        cache.parent.chmod(0o777)
    else:
        (tmp_path / "elsewhere.so").write_bytes(first.read_bytes())
        first.unlink()
        first.symlink_to(tmp_path / "elsewhere.so")
    again = compiling.library(compiler(), ())
    assert compiler.runs() == 2 and caching.is_trusted(again) and (again.parent == cache) == (what != "root")


def test_a_folder_of_this_user_that_a_group_may_write_is_closed_to_it(cache, compiler):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert compiling.library(compiler(), ()).parent == cache and stat.S_IMODE(cache.stat().st_mode) == 0o755


@pytest.mark.parametrize("value", ["/proc/nothing", "/dev/null", "/dev/null/cache"])
def test_without_a_place_in_the_cache_a_temporary_one_is_used_and_said_once(
    cache, compiler, monkeypatch, tmp_path, value, caplog
):
    monkeypatch.setenv(caching.VARIABLE, value)
    program = compiler()
    created = {compiling.library(program, ()) for _ in range(3)}
    assert {path.parent for path in created} == {
        tmp_path / f"hf_sparse_attn-{os.getuid()}/kernels"
    } and compiler.runs() == 1
    assert caplog.text.count("set HF_SPARSE_ATTN_CACHE") == 1
    assert stat.S_IMODE(next(iter(created)).parent.stat().st_mode) == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="gives files to another user")
def test_a_temporary_folder_that_another_user_made_first_is_not_used(cache, compiler, monkeypatch, tmp_path):
    monkeypatch.setenv(caching.VARIABLE, "/proc/nothing")
    taken = tmp_path / f"hf_sparse_attn-{os.getuid()}"
    taken.mkdir(mode=0o777)
    os.chown(taken, 65534, 65534)
    created = compiling.library(compiler(), ())
    assert taken not in created.parents and created.parent.stat().st_uid == 0


def test_a_full_disk_is_left_for_the_next_place(cache, compiler, tmp_path):
    program = compiler(f'case "$last" in {cache}/*) echo "No space left on device" >&2; exit 1;; esac')
    assert compiling.library(program, ()).parent == tmp_path / f"hf_sparse_attn-{os.getuid()}/kernels"


def test_folders_of_killed_compilations_are_cleared(cache, compiler, tmp_path):
    program = compiler(f'[ -e "{tmp_path}/fast" ] || exec sleep 30')
    for number in range(2):
        if not (process := os.fork()):
            os.setsid()
            compiling.library(program, ())
            os._exit(0)
        while len(list(cache.glob("tmp*/*.so"))) <= number:
            time.sleep(0.02)
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
    (tmp_path / "fast").touch()
    compiling.library(program, ())
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_threads_and_processes_that_come_at_once_compile_once(cache, compiler):
    program, result = compiler("sleep 0.3"), []
    child = os.fork()
    if not child:
        compiling.library(program, ())
        os._exit(0)
    threads = [threading.Thread(target=lambda: result.append(compiling.library(program, ()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.waitpid(child, 0)
    assert len(result) == 4 and len(set(result)) == 1 and compiler.runs() == 1


def test_threads_load_once(cache, monkeypatch):
    loaded = []
    monkeypatch.setattr(compiling, "library", lambda program, flags: time.sleep(0.1) or cache / "cpu.so")
    monkeypatch.setattr(compiling.torch.ops, "load_library", loaded.append)
    monkeypatch.setattr("hf_sparse_attn_kernels.cpp_kernels.attention.register", lambda: None)
    monkeypatch.setattr("hf_sparse_attn_kernels.cpp_kernels.routing.register", lambda: None)
    threads = [threading.Thread(target=compiling.unavailable) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == [cache / "cpu.so"]


@pytest.mark.parametrize("wrap", ["{0} {1}", "{1} -m64", "'{1}' -m64", "{1}"])
def test_a_compiler_may_be_a_command_with_options(cache, compiler, monkeypatch, tmp_path, wrap):
    compiler(name="my c++" if "'" in wrap else "c++")
    wrapper = tmp_path / "ccache"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", wrap.format(wrapper, tmp_path / ("my c++" if "'" in wrap else "c++")))
    assert compiling.lacking() is None
    compiling.library(compiling.compiler(), ())
    assert compiler.runs() == 1


@pytest.mark.parametrize("value", ["no-such-compiler", "'unended", "no-such-wrapper g++"])
def test_a_compiler_that_is_none_is_named(cache, monkeypatch, value):
    monkeypatch.setenv("CXX", value)
    assert compiling.compiler() is None and repr(value) in compiling.unavailable()


def test_a_compiler_that_fails_leaves_nothing_and_says_what_it_printed(cache, compiler, monkeypatch):
    monkeypatch.setenv("CXX", compiler('echo "out of registers" >&2; exit 1'))
    assert "out of registers" in compiling.unavailable()
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_a_compiler_that_does_not_end_is_ended(cache, compiler, monkeypatch):
    monkeypatch.setattr(compiling, "COMPILER_SECONDS", 0.3)
    monkeypatch.setenv("CXX", compiler("exec sleep 30"))
    assert "took more than 0.3 s" in compiling.unavailable()
