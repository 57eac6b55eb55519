"""The built wheel holds everything and works without the source tree."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile

import pytest
from helpers.paths import ROOT

import hf_sparse_attn

EARLIEST = 315532800  # seconds: where neither git nor SOURCE_DATE_EPOCH tells a time

CHECK = """
import sys
target, packages, results = sys.argv[1:]
sys.path[:0] = [target]
sys.path.append(packages)  # under -S no .pth file is read, so an editable install is not seen
import hf_sparse_attn, hf_sparse_attn_kernels
from importlib.metadata import distribution
from importlib.resources import files
for module in (hf_sparse_attn, hf_sparse_attn_kernels):
    assert module.__file__.startswith(target), module.__file__
import hf_sparse_attn.cli.commands, hf_sparse_attn.training.distillation, hf_sparse_attn.evaluation.statistics, hf_sparse_attn.data.windows
import json, hf_sparse_attn.experiments.reports.html_report
from hf_sparse_attn.experiments.reports.model_card import model_card
from transformers import LlamaConfig, LlamaForCausalLM
import torch
config = LlamaConfig(vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = hf_sparse_attn.sparsify(LlamaForCausalLM(config), {"dense_below": 0})
assert model(torch.arange(18)[None]).logits.isfinite().all()
assert "<html" in files("hf_sparse_attn.experiments.reports").joinpath("templates", "report.html").read_text()
assert "## Limits" in str(model_card(json.load(open(results)), "demo"))
assert [e.value for e in distribution("hf_sparse_attn").entry_points] == ["hf_sparse_attn.cli:main"]
import pathlib
from hf_sparse_attn.experiments.recipe import load_recipe
from hf_sparse_attn.experiments.recipe_values import recipe_names, shipped_recipes
assert str(shipped_recipes()).startswith(target) and len(recipe_names()) > 10
assert load_recipe("demo").name == "demo"
pathlib.Path("own.yaml").write_text("name: own\\nmodel: {source: x}\\ndata: {train: [a.txt], split: 0.5}\\n")
assert load_recipe("own.yaml", smoke=True).name == "own"
from hf_sparse_attn_kernels import default_choice
assert default_choice("cpu")[0] == "cpp", default_choice("cpu")
print("works", distribution("hf_sparse_attn").version == hf_sparse_attn.__version__)
"""


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
        shutil.copytree(ROOT / name, source / name, ignore=leave, copy_function=shutil.copyfile)  # modes and times of this copy
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
    assert {name: path.read_bytes() for name, path in built.items()} == {name: path.read_bytes() for name, path in again.items()}


def test_archives_hold_the_time_of_the_source(built):
    sdist = next(path for name, path in built.items() if name.endswith(".tar.gz"))
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert {member.mtime for member in members} == {EARLIEST} and {(member.uid, member.uname) for member in members} == {(0, "")}
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


def test_the_installed_wheel_works_without_the_source_tree(wheel, tmp_path):
    target = tmp_path / "site"
    run(
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-index",
        "--no-deps",
        "--target",
        target,
        wheel,
        cwd=tmp_path,
    )
    results = ROOT / "recipes" / "results" / "demo.json"
    assert "works True" in run("-S", "-E", "-c", CHECK, target, sysconfig.get_paths()["purelib"], results, cwd=tmp_path)


def test_the_source_tree_does_not_shadow_the_kernels_package():
    assert not (ROOT / "kernels" / "__init__.py").exists() and not (ROOT / "kernels" / "torch-ext" / "__init__.py").exists()
