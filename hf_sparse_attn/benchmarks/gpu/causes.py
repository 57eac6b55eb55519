"""Why a kernel is as fast as it is: hardware counters of single launches, read by Nsight Compute."""

# letters: B batch, H query heads, G KV heads, N tokens, D head dim, n query tiles, nb key blocks

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from hf_sparse_attn_kernels import block_sparse_attention

from ..layer_shape import Layer, LayerShape
from .limits import shape
from .rows import Entry

LENGTH = 32768
WARM_UP = 2  # launches before the one that is read
SECONDS = 45  # that the profiler may take for one operation
KERNELS = {
    "forward": "forward_kernel",
    "backward": "dkv_kernel",
    "scores": "coarse_kernel|mass_kernel",
    "selection": "sort|topk|Sort",
}
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
    "launch__occupancy_limit_shared_mem",
)


def entries(dry: bool) -> Iterator[Entry]:
    for name in KERNELS:
        yield name, partial(counters, name, dry)


def counters(name: str, dry: bool) -> dict[str, Any]:
    """What the profiler read of the kernels of one operation, and the bytes that it has to move at least.

    Raises:
        RuntimeError: there is no profiler, or it failed.
    """
    row: dict[str, Any] = {
        "benchmark": "counters",
        "operation": name,
        "least_bytes": least_bytes(name, shape(LENGTH, dry=dry)),
    }
    if dry:
        operation(name, dry)()
        return row
    profiler = shutil.which("ncu")
    if profiler is None:
        raise RuntimeError("Nsight Compute (ncu) is not on the PATH")
    # ncu would fix the clocks otherwise, below those that the times were measured at
    command = [profiler, "--clock-control", "none", "--csv", "--page", "raw", "--metrics", ",".join(METRICS)]
    command += ["--kernel-name", f"regex:{KERNELS[name]}", "--launch-count", "12"]
    run = subprocess.run(
        [*command, sys.executable, "-m", __name__, name], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    kernels = read_counters(run.stdout)
    if not kernels:
        raise RuntimeError(f"ncu read no kernel (exit code {run.returncode}): {(run.stdout + run.stderr)[-400:]}")
    # the launches of the last run; those before it warm up
    return {**row, "kernels": kernels[-max(1, len(kernels) // (1 + WARM_UP)) :]}


def read_counters(text: str) -> list[dict[str, Any]]:
    """The kernels of a raw page that ncu printed as CSV:
    name, and value by metric in the unit of the second line, as ncu gives it.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    rows = list(csv.reader(io.StringIO("\n".join(lines[start:]))))
    names, units = rows[0], rows[1]
    kernels = []
    for values in rows[2:]:
        kernel: dict[str, Any] = {}
        for name, unit, value in zip(names, units, values, strict=False):
            if name == "Kernel Name":
                kernel["name"] = value.partition("(")[0]
            elif name in METRICS:
                kernel[name] = {"value": _number(value), "unit": unit}
        kernels.append(kernel)
    return kernels


def _number(value: str) -> float | None:
    try:
        return float(value.replace(",", ""))
    except ValueError:  # "n/a": this device does not count it
        return None


def least_bytes(name: str, sizes: LayerShape) -> int:
    """Bytes that an operation must move through the device's memory at least:
    its inputs read and its results written once.
    """
    # q and the output have B · H · N · D numbers, k and v B · G · N · D; scores are float32 [B, G, n, nb]
    width = getattr(torch, sizes.dtype).itemsize
    queries = sizes.batch * sizes.heads * sizes.length * sizes.head_dim * width
    keys = sizes.batch * sizes.groups * sizes.length * sizes.head_dim * width
    blocks, tiles = sizes.length // sizes.block_size, sizes.length // sizes.config.query_tile
    scores = 4 * sizes.batch * sizes.groups * tiles * blocks
    # forward: q, k, v, out; backward: q, k, v, dout and dq, dk, dv
    least = {
        "forward": 2 * queries + 2 * keys,
        "backward": 3 * queries + 4 * keys,
        "scores": queries + keys + scores,
        "selection": 2 * scores,
    }
    return int(least[name])


def operation(name: str, dry: bool) -> Callable[[], object]:
    """A call whose kernels include those of the operation ``name``."""
    layer = Layer(shape(LENGTH, dry=dry))
    selection = layer.select()
    if name in ("scores", "selection"):
        return layer.select
    if name == "forward":
        return lambda: layer.attend(selection)
    q, k, v = (x.detach().requires_grad_() for x in (layer.q, layer.k, layer.v))
    grad = layer.random_gradient()
    return lambda: block_sparse_attention(q, k, v, selection)[0].backward(grad)


if __name__ == "__main__":
    run_it = operation(sys.argv[1], dry=False)
    for _ in range(1 + WARM_UP):
        run_it()
    torch.cuda.synchronize()
