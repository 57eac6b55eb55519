"""The built wheel holds everything, and works with its hard dependencies and nothing else."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import pytest
from helpers.dependencies import closure, normalised
from helpers.paths import RESULTS, ROOT

import hf_sparse_attn
from hf_sparse_attn.system.extras import EXTRAS

EARLIEST = 315532800  # seconds: where neither git nor SOURCE_DATE_EPOCH tells a time


def run(*command, **options):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def build(folder):
    """sdist and wheel of a copy of the source tree in ``folder``."""
    source, out = folder / "tree", folder / "dist"
    source.mkdir(parents=True)
    leave = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in (".ci", "hf_sparse_attn", "kernels", "model_cards", "recipes"):
        # modes and times of this copy
        shutil.copytree(ROOT / name, source / name, ignore=leave, copy_function=shutil.copyfile)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    run("-m", "build", "--no-isolation", "--outdir", out, source, cwd=folder)
    return {path.name: path for path in out.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def wheel(built):
    return next(path for name, path in built.items() if name.endswith(".whl"))


def test_two_builds_have_the_same_bytes(built, tmp_path):
    former = os.umask(0o077)  # another user's habits, another place and another time
    try:
        again = build(tmp_path / "elsewhere")
    finally:
        os.umask(former)
    assert set(built) == set(again) and len(built) == 2
    assert {name: path.read_bytes() for name, path in built.items()} == {
        name: path.read_bytes() for name, path in again.items()
    }


def test_archives_hold_the_time_of_the_source(built):
    sdist = next(path for name, path in built.items() if name.endswith(".tar.gz"))
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert {member.mtime for member in members} == {EARLIEST} and {
        (member.uid, member.uname) for member in members
    } == {(0, "")}
    assert any(member.name.endswith(".ci/build_backend.py") for member in members), "the sdist cannot build itself"


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    module, name = project["tool"]["setuptools"]["dynamic"]["version"]["attr"].rsplit(".", 1)
    assert getattr(importlib.import_module(module), name) == hf_sparse_attn.__version__


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names} == {
        "hf_sparse_attn",
        "hf_sparse_attn_kernels",
        f"hf_sparse_attn-{hf_sparse_attn.__version__}.dist-info",
    }
    for folder, package in ((ROOT, "hf_sparse_attn"), (ROOT / "kernels" / "torch-ext", "hf_sparse_attn_kernels")):
        code = {str(p.relative_to(folder)) for p in (folder / package).rglob("*.py")}
        if package == "hf_sparse_attn":
            code |= {f"hf_sparse_attn/recipes/{p.name}" for p in (ROOT / "recipes").glob("*.py")}
        assert code == {n for n in names if n.startswith(f"{package}/") and n.endswith(".py")}
        assert f"{package}/py.typed" in names
    sources = ROOT / "kernels" / "torch-ext" / "hf_sparse_attn_kernels" / "cpp_kernels" / "source"
    assert {f"hf_sparse_attn_kernels/cpp_kernels/source/{p.name}" for p in sources.iterdir()} <= set(names)
    assert {
        "hf_sparse_attn/experiments/reports/templates/report.html",
        "hf_sparse_attn/model_cards/template.md.jinja",
    } <= set(names)
    shipped = {f"hf_sparse_attn/recipes/{p.relative_to(ROOT / 'recipes')}" for p in (ROOT / "recipes").rglob("*.yaml")}
    assert shipped <= set(names) and "hf_sparse_attn/recipes/defaults.yaml" in shipped
    assert not any("recipes/results" in n for n in names)
    assert any(n.endswith("licenses/LICENSE") for n in names)


def link_distribution(distribution: Distribution, site: Path) -> None:
    """Make an installed distribution importable from ``site``."""
    for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
        if not (site / name).exists():
            (site / name).symlink_to(distribution.locate_file(name))


def test_the_wheel_alone_loads_trains_generates_and_saves(wheel, tmp_path):
    site, options = tmp_path / "site", ("--no-index", "--no-deps", "--disable-pip-version-check", "--quiet")
    run("-m", "pip", "install", *options, "--target", site, wheel, cwd=tmp_path)
    (metadata,) = site.glob("hf_sparse_attn-*.dist-info")
    required = [text for text in PathDistribution(metadata).requires if "extra ==" not in text]
    absent = [module for modules in EXTRAS.values() for module in modules]
    # Transformers brings typer and rich today: left out as well, so that nothing rests on that
    for name, distribution in closure(required).items():
        if name not in map(normalised, absent):
            link_distribution(distribution, site)
    shutil.copy(RESULTS / "demo.json", tmp_path / "results.json")
    script = ROOT / "tests" / "project" / "plain_install.py"
    assert run("-I", "-S", script, site, "pytest", "hypothesis", *absent, cwd=tmp_path).endswith("works\n")


def test_the_source_tree_does_not_shadow_the_kernels_package():
    assert (
        not (ROOT / "kernels" / "__init__.py").exists()
        and not (ROOT / "kernels" / "torch-ext" / "__init__.py").exists()
    )
