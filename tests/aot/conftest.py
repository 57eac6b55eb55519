"""Compiles kernels for GPUs that are not there. Run apart from the other tests: make test-aot."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton: pip install -c constraints.txt -e '.[dev,triton]'")
if os.environ.get("TRITON_INTERPRET"):
    pytest.exit("TRITON_INTERPRET is set: ahead-of-time compilation needs it unset", 2)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BASELINE = Path(__file__).with_name(f"baseline-{'.'.join(triton.__version__.split('.')[:2])}.json")  # compilers differ
TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    "*fp32": ("lse", "delta", "dlse", "part", "part_lse", "sinks", "mass", "scores", "queries", "router_keys"),
    "*i32": ("list", "tile", "bin", "work", "slot", "popular"),
    "*i64": ("docs", "blocks", "tiles", "reps"),
    "*i1": ("real",),
}
TYPES = {f"{name}_ptr": kind for kind, names in POINTERS.items() for name in names}
NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@dataclass(frozen=True)
class Compiled:
    """What one kernel became on one target: registers and spilled bytes a thread, bytes of shared memory, matrix
    instructions.
    """

    registers: int
    spills: int
    shared: int
    matrix: str
    assembly: str


def resources(binary, tmp_path):
    """(registers, bytes of stack) of an NVIDIA binary."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def amd_resources(text):
    """(vector registers, spilled registers) of AMD assembly."""
    return int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]), int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])


MATRIX = (("wgmma", "wgmma.mma_async"), ("tcgen05", "tcgen05.mma"), ("mma.sync", "mma.sync"), ("mfma", "v_mfma"))


@pytest.fixture(scope="session")
def compile_kernel(tmp_path_factory):
    """Compile a kernel as the launcher would: pointers and strides divisible by 16."""
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    folder = tmp_path_factory.mktemp("binary")

    def run(kernel, target, dtype, constants, launch):
        signature, attributes = {}, {}
        for position, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name] = "constexpr"
                continue
            signature[name] = (
                TYPES.get(name, NAMES[dtype])
                if name.endswith("_ptr")
                else "fp32"
                if name in ("scale", "softcap")
                else "i32"
            )
            if name.endswith(("_ptr", "_sb", "_sh", "_sn")):
                attributes[(position,)] = [["tt.divisibility", 16]]
        built = triton.compile(
            ASTSource(kernel, signature, constants, attributes), target=TARGETS[target], options=launch.options
        )
        assembly = built.asm["amdgcn" if target.startswith("gfx") else "ptx"]
        registers, spills = (
            amd_resources(assembly) if target.startswith("gfx") else resources(built.asm["cubin"], folder)
        )
        matrix = next((name for name, mark in MATRIX if mark in assembly), "-")
        return Compiled(registers, spills, built.metadata.shared, matrix, assembly)

    return run


@pytest.fixture(scope="session")
def baseline():
    """Recorded registers, spills and shared memory by case and target; HF_SPARSE_ATTN_RECORD=1 writes them anew.

    None for a version of Triton that none were recorded with: the absolute limits hold.
    """
    recording = os.environ.get("HF_SPARSE_ATTN_RECORD") == "1"
    known = json.loads(BASELINE.read_text()) if BASELINE.exists() else {} if recording else None
    yield known
    if recording:
        BASELINE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


ROWS = []


@pytest.fixture(scope="session")
def table():
    """Rows (kernel, target, registers, spills, shared, matrix) that the end of the run prints."""
    return ROWS


def pytest_terminal_summary(terminalreporter):
    if ROWS:
        terminalreporter.section("compiled kernels")
        terminalreporter.write_line(
            f"{'kernel':36}{'target':8}{'registers':>10}{'spills':>8}{'shared':>9}  matrix unit"
        )
        for kernel, target, got in ROWS:
            terminalreporter.write_line(
                f"{kernel:36}{target:8}{got.registers:10}{got.spills:8}{got.shared:9}  {got.matrix}"
            )
