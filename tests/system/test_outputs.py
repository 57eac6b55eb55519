"""A result goes where its path leads, and whether it can is known before the work."""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys

import pytest

from hf_sparse_attn.system import files, outputs
from hf_sparse_attn.system.files import write_json, write_text
from hf_sparse_attn.system.locks import LOCK, FolderInUseError, sole_use
from hf_sparse_attn.system.outputs import OutputError, check_output


@pytest.fixture
def as_nobody(tmp_path):
    """Run something as somebody who is not root; its error, or None."""
    if os.geteuid():
        pytest.skip("needs root, to be somebody else")
    for parent in tmp_path.parents[: len(tmp_path.parents) - 2]:
        parent.chmod(parent.stat().st_mode | 0o055)
    tmp_path.chmod(0o755)

    def run(work):
        os.seteuid(65534)
        try:
            work()
        except OSError as error:
            return str(error)
        finally:
            os.seteuid(0)
        return None

    return run


# -- links, pipes, devices -----------------------------------------------------------------------------------------


def test_a_link_stays_and_what_it_leads_to_gets_the_text(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "deep" / "b").symlink_to("../real.json")
    (tmp_path / "a").symlink_to("deep/b")
    check_output(tmp_path / "a")
    write_text(tmp_path / "a", "new")
    assert (
        (tmp_path / "a").is_symlink()
        and (tmp_path / "deep" / "b").is_symlink()
        and (tmp_path / "real.json").read_text() == "new"
    )
    (tmp_path / "fresh").symlink_to("made.json")  # whose folder is there
    write_text(tmp_path / "fresh", "new")
    assert (tmp_path / "fresh").is_symlink() and (tmp_path / "made.json").read_text() == "new"


def test_links_that_lead_nowhere_are_named(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("not/mounted")
    for name, said in (
        ("loop", "in a circle"),
        ("gone", "a link to what is not there"),
        ("gone/x.json", "gone is a link to what is not"),
    ):
        for use in (check_output, lambda path: write_text(path, "new")):
            with pytest.raises(OutputError, match=said):
                use(tmp_path / name)
    assert not (tmp_path / "not").exists()


def test_a_pipe_gets_the_text_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_output(pipe)  # does not wait for a reader, and gives it no end of the text
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, {"a": 1})
    assert os.read(reader, 100) == b'{\n  "a": 1\n}\n' and stat.S_ISFIFO(pipe.lstat().st_mode)
    os.close(reader)
    assert [f.name for f in tmp_path.iterdir()] == ["pipe"]


def test_devices_and_descriptors_are_written_to(tmp_path, monkeypatch):
    check_output("/dev/null")
    write_text("/dev/null", "new")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with (tmp_path / "log").open("wb", buffering=0) as file:  # as `> log` makes it
        file.write(b"before ")
        for path in (f"/dev/fd/{file.fileno()}", f"/proc/self/fd/{file.fileno()}"):
            check_output(path)
            write_text(path, "json ")
        file.write(b"after")
        number = file.fileno()
    assert (tmp_path / "log").read_text() == "before json json after"
    with pytest.raises(OutputError, match="cannot write /dev/fd"):
        check_output(f"/dev/fd/{number}")


def test_standard_output_by_its_name(tmp_path):
    pid = os.fork()
    if not pid:
        os.dup2(os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT), 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        print("before")
        write_text("/dev/stdout", "json\n")
        print("after", flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
    assert (tmp_path / "out").read_text() == "before\njson\nafter\n"


# -- modes ---------------------------------------------------------------------------------------------------------


def test_the_umask_holds_for_a_new_file_and_the_old_mode_for_a_replaced_one(tmp_path):
    old = os.umask(0o077)
    try:
        write_text(tmp_path / "new", "one")
        write_text(tmp_path / "old", "one")
        (tmp_path / "old").chmod(0o640)
        write_text(tmp_path / "old", "two")
    finally:
        os.umask(old)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "old")] == [0o600, 0o640]


def test_a_file_of_somebody_else_stays_theirs(tmp_path, as_nobody):
    write_text(tmp_path / "theirs", "old")
    (tmp_path / "theirs").chmod(0o600)
    os.chown(tmp_path / "theirs", 65534, 65534)
    write_text(tmp_path / "theirs", "new")
    assert as_nobody(lambda: (tmp_path / "theirs").read_text()) is None


def test_a_file_that_may_only_be_read_is_not_replaced(tmp_path, as_nobody):
    os.chown(tmp_path, 65534, 65534)
    write_text(tmp_path / "kept", "old")
    (tmp_path / "kept").chmod(0o444)
    os.chown(tmp_path / "kept", 65534, 65534)
    for use in (check_output, lambda path: write_text(path, "new")):
        assert "Permission denied" in as_nobody(lambda use=use: use(tmp_path / "kept"))
    assert (tmp_path / "kept").read_text() == "old"


def test_a_file_in_a_folder_that_is_not_writable_is_written_in_place(tmp_path, as_nobody):
    write_text(tmp_path / "theirs", "something longer")
    os.chown(tmp_path / "theirs", 65534, 65534)

    def work():
        check_output(tmp_path / "theirs")
        write_text(tmp_path / "theirs", "new")

    assert as_nobody(work) is None and (tmp_path / "theirs").read_text() == "new"
    assert "Permission denied" in as_nobody(lambda: check_output(tmp_path / "another"))
    assert [f.name for f in tmp_path.iterdir()] == ["theirs"]


def test_a_file_that_cannot_be_renamed_over_is_written_in_place(tmp_path, monkeypatch):
    """As one that a container mounts by itself."""
    write_text(tmp_path / "mounted", "something longer")

    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(files.os, "replace", busy)
    write_text(tmp_path / "mounted", "new")
    assert (tmp_path / "mounted").read_text() == "new" and [f.name for f in tmp_path.iterdir()] == ["mounted"]


# -- known before --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("folder", "it is a folder"),
        ("file/x.json", "Not a directory|File exists"),
        ("n" * 300, "File name too long"),
        ("a\0b", "null byte"),
    ],
)
def test_what_cannot_be_written_is_said_before(tmp_path, name, said):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(OutputError, match=f"cannot write .*(?:{said})"):
        check_output(tmp_path / name)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "folder"]


def test_a_full_disk_is_noticed_before(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outputs.os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        check_output(tmp_path / "x.json")


def test_a_check_makes_missing_folders_and_leaves_nothing_else(tmp_path):
    write_text(tmp_path / "old", "old")
    before = (tmp_path / "old").stat().st_mtime_ns
    check_output(tmp_path / "old")
    check_output(tmp_path / "a" / "b" / "new")
    assert (tmp_path / "old").stat().st_mtime_ns == before
    assert sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*")) == ["a", "a/b", "old"]


# -- one at a time -------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_with_the_process_that_has_it_and_free_afterwards(tmp_path):
    with sole_use(tmp_path / "run"):
        (tmp_path / "link").symlink_to("run")
        for name in ("run", "link"):
            with pytest.raises(
                FolderInUseError, match=rf"in use by process {os.getpid()} on .* since 20.*or give another"
            ):
                sole_use(tmp_path / name).__enter__()
        assert [f.name for f in (tmp_path / "run").iterdir()] == [LOCK]
    assert not list((tmp_path / "run").iterdir())
    with sole_use(tmp_path / "run"):
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    ready, options = os.pipe()
    pid = os.fork()
    if not pid:
        with sole_use(tmp_path):
            os.write(options, b"x")
            signal.pause()
        os._exit(0)
    os.read(ready, 1)
    try:
        with pytest.raises(FolderInUseError, match=f"process {pid} "):
            sole_use(tmp_path).__enter__()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with sole_use(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
