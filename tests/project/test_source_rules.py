"""Rules about the source itself: the order of the layers, lazy imports, names, sizes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib

import pytest
from helpers.paths import ROOT

PACKAGE, KERNELS = ROOT / "hf_sparse_attn", ROOT / "kernels/torch-ext/hf_sparse_attn_kernels"

# the rooms of the package: each may import from those above it only
LAYERS = (
    ("config",),
    ("system",),
    ("architectures",),
    ("router",),
    ("attention",),
    ("models",),
    ("data",),
    ("training",),
    ("benchmarks",),
    ("evaluation",),
    ("industry",),
    ("experiments",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))
KERNEL_MODULES = sorted(KERNELS.rglob("*.py"))


def label(path):
    return str(path.relative_to(ROOT))


def imported(path, package):
    """Full dotted names of what a file imports anywhere, relative imports resolved."""
    here = [package, *path.relative_to(PACKAGE if package == "hf_sparse_attn" else KERNELS).with_suffix("").parts][:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [] if node.level == 0 else here[: len(here) - node.level + 1]
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import x` names a module, `from .x import y` may name one
            yield from (f"{module}.{alias.name}" for alias in node.names)


def top(path):
    """Name of the top-level module or subpackage that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_there_is_something_to_check():
    assert {"attention", "models", "training"} <= {top(path) for path in MODULES} and len(KERNEL_MODULES) >= 5


def test_every_module_has_its_place_in_the_order():
    unknown = {top(path) for path in MODULES} - set(LEVEL) - {"__init__"}
    assert not unknown, f"give {sorted(unknown)} a place in LAYERS"


@pytest.mark.parametrize("path", [p for p in MODULES if p != PACKAGE / "__init__.py"], ids=label)
def test_a_module_imports_only_from_layers_above_it(path):
    mine = top(path)
    for name in imported(path, "hf_sparse_attn"):
        parts = name.split(".")
        if parts[0] != "hf_sparse_attn":
            continue
        other = parts[1]
        assert other in LEVEL, (
            f"{label(path)} imports {name}, which has no place in the order (import it from its module)"
        )
        assert other == mine or LEVEL[other] < LEVEL[mine], f"{label(path)} imports {name}: {other} is not above {mine}"


def test_the_package_holds_its_rooms_and_nothing_else():
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries == {*LEVEL, "__init__", "py.typed"}


def test_no_two_rooms_share_a_name():
    rooms = {}
    for path in MODULES:
        name = path.stem if path.stem != "__init__" else path.parent.name
        if path.parent != PACKAGE and not path.stem.startswith("__"):
            rooms.setdefault(name, set()).add(top(path))
    assert not {
        name: sorted(found) for name, found in rooms.items() if len(found) > 1 or (name in LEVEL and name != "config")
    }


def test_no_circle_is_hidden_by_an_import_inside_a_function():
    """Modules import each other one way, whether at the top or inside of a function."""
    names = {".".join(["hf_sparse_attn", *path.relative_to(PACKAGE).with_suffix("").parts]): path for path in MODULES}
    imports = {}
    for name, path in names.items():
        targets = set()
        for full in imported(path, "hf_sparse_attn"):
            targets |= {at for at in (full, full.rpartition(".")[0]) if at in names and at != name}
        imports[name] = targets
    done, circles = set(), []

    def walk(name, way):
        if name in way:
            circles.append([*way[way.index(name) :], name])
        elif name not in done:
            for target in sorted(imports[name]):
                walk(target, [*way, name])
            done.add(name)

    for name in sorted(imports):
        walk(name, [])
    assert not circles


@pytest.mark.parametrize("path", KERNEL_MODULES, ids=label)
def test_kernels_import_only_the_standard_library_torch_triton_and_themselves(path):
    allowed = {*sys.stdlib_module_names, "torch", "triton", "hf_sparse_attn_kernels"}
    for name in imported(path, "hf_sparse_attn_kernels"):
        assert name.split(".")[0] in allowed, f"{label(path)} imports {name}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] != "hf_sparse_attn_kernels", (
                f"{label(path)} must import its own package relatively"
            )


def test_no_module_has_the_name_of_a_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [r for group in project["optional-dependencies"].values() for r in group]
    names = {
        "".join(c if c.isalnum() or c in "-_" else " " for c in r).split()[0]
        for r in (*project["dependencies"], *extras)
    }
    names = {name.lower().replace("-", "_") for name in names} | {"yaml", "kernels", "flash_attn"}
    assert {"torch", "datasets", "peft", "triton"} <= names
    ours = {part for path in (*MODULES, *KERNEL_MODULES) for part in path.relative_to(ROOT).with_suffix("").parts[1:]}
    assert not ours & names
    tests = {path.stem for path in (ROOT / "tests").iterdir()}
    assert not tests & names


def test_importing_the_plugin_stays_cheap():
    heavy = ("datasets", "peft", "matplotlib", "evaluate", "typer", "gguf")
    # Transformers reaches torch._dynamo, which imports triton where it is installed: only the kernels can be held to it
    code = "import sys, hf_sparse_attn_kernels; print(*[m for m in ('triton', 'transformers') if m in sys.modules]); "
    code += f"import hf_sparse_attn; print(*[m for m in {heavy!r} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_importing_a_stock_model_beside_the_plugin_prints_nothing():
    code = "import hf_sparse_attn; from transformers import BertForMaskedLM, GPT2LMHeadModel"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_neither_the_kernels_folder_nor_those_of_the_tests_are_packages():
    assert not (ROOT / "kernels/__init__.py").exists()  # it would shadow the package `kernels` of the Hub
    assert not list((ROOT / "tests").rglob("__init__.py")) and not (ROOT / "tests/kernels").exists()


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "kernels").rglob("*.py"))], ids=label)
def test_no_file_is_longer_than_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300


# what torch makes in the default dtype on the default device, which are the user's, unless they are named
MAKERS = (
    "zeros",
    "ones",
    "empty",
    "full",
    "eye",
    "arange",
    "range",
    "linspace",
    "logspace",
    "tensor",
    "scalar_tensor",
    "rand",
    "randn",
)
MAKERS += (
    "randint",
    "randperm",
    "normal",
    "empty_strided",
    "tril_indices",
    "triu_indices",
    "sparse_coo_tensor",
    "frombuffer",
)
NAMED = {
    **{name: {"dtype", "device"} for name in MAKERS},
    "as_tensor": {"device"},
    "asarray": {"device"},
    "Generator": {"device"},
}


def unnamed(tree):
    """The calls of a module that leave a tensor's dtype or device to torch's defaults."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            yield from (
                f"line {node.lineno}: import {alias.name} as torch.{alias.name}"
                for alias in node.names
                if alias.name in NAMED
            )
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func.value) == "torch"
        ):
            missing = NAMED.get(node.func.attr, set()) - {keyword.arg for keyword in node.keywords}
            if missing:
                yield f"line {node.lineno}: torch.{node.func.attr} names no {' and no '.join(sorted(missing))}"


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "kernels").rglob("*.py"))], ids=label)
def test_every_tensor_names_its_dtype_and_device(path):
    assert not list(unnamed(ast.parse(path.read_text())))


def test_a_tensor_of_the_defaults_is_found():
    result = list(
        unnamed(
            ast.parse(
                "import torch\nx = torch.zeros(3, dtype=torch.int64)\ny = torch.arange(3)\nfrom torch import ones"
            )
        )
    )
    assert result == [
        "line 4: import ones as torch.ones",
        "line 2: torch.zeros names no device",
        "line 3: torch.arange names no device and no dtype",
    ]
