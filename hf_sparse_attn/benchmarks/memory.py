"""Peak memory of the steps of a training benchmark; on a CPU in a process of its own.

A heap keeps what it got: in a process that trained before, a step of SmolLM2-135M at 4096 tokens raised the resident
memory by 1274 MB (stock) and 1377 (sparse), the second time by other amounts; in a fresh process whose tensors are all
mapped by themselves by 924 and 950, within 1 % in every step and in any order.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..models.convert import sparse_attention_as
from ..training.config import AdaptationConfig
from .contenders import SPARSE, STOCK, Contender, make_contenders, verify_training
from .timing import BenchmarkError, PeakMemory

MAPPED_BYTES = 1 << 17  # tensors of so many bytes or more are mapped, and go back to the system when they are freed

Step = tuple[str, str, Mapping[str, Tensor]]  # label, contender, batch


def measure_peaks(contenders: Mapping[str, Contender], steps: Sequence[Step]) -> dict[str, int]:
    """Peak memory of each step above that at its start, in bytes, by label."""
    peaks = {}
    for label, name, batch in steps:
        with PeakMemory(str(contenders[name].model.device)) as memory:
            contenders[name].step(batch)
        peaks[label] = memory.bytes
    return peaks


@contextmanager
def trial(contenders: Iterable[Contender]) -> Iterator[None]:
    """Take back afterwards what steps within a ``with`` block changed:
    weights and the optimiser's states, to their start.
    """
    contenders = list(contenders)
    before = [[p.detach().clone() for p in contender.trainable] for contender in contenders]
    try:
        yield
    finally:
        for contender, weights in zip(contenders, before, strict=True):
            with torch.no_grad():
                for p, weight in zip(contender.trainable, weights, strict=True):
                    p.copy_(weight)
            contender.losses.clear()
            # the states' tensors stay: the next step does not pay for them again
            for state in contender.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()


def peaks_in_a_fresh_process(
    model: PreTrainedModel,
    names: tuple[str, ...],
    steps: Sequence[Step],
    budget: Mapping[str, Any],
    config: AdaptationConfig,
) -> dict[str, int]:
    """`measure_peaks` of a sparse ``model`` in a Python process of its own.

    Raises:
        BenchmarkError: the process failed; the message is the last line of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        model.save_pretrained(path / "model")
        request = {"names": names, "steps": list(steps), "budget": dict(budget), "config": config}
        torch.save(request, path / "asked.pt")
        # glibc maps what is at least that large by itself, so that freed tensors leave the resident memory at once
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MAPPED_BYTES), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-W", "ignore", "-m", __name__, folder, str(torch.get_num_threads())]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if run.returncode:
            last = (run.stderr.splitlines() or [f"exit code {run.returncode}"])[-1]
            raise BenchmarkError(f"the process that measures memory failed: {last}")
        peaks: dict[str, int] = torch.load(path / "peaks.pt")
        return peaks


def _main(folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    request = torch.load(folder / "asked.pt", weights_only=False)  # written by the process that started this one
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with sparse_attention_as(model, **request["budget"]):
        contenders = make_contenders(model, request["config"], request["names"])
        _, _, batch = request["steps"][0]
        verify_training(contenders[SPARSE], contenders[STOCK], batch)  # loads the kernels
        torch.save(measure_peaks(contenders, request["steps"]), folder / "peaks.pt")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
