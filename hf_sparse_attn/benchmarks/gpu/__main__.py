"""One stage: ``python -m hf_sparse_attn.benchmarks.gpu {machine,limits,models,causes,launches} OUT [--dry] [--seconds
S]``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ...system.files import write_json

STAGES = ("machine", "limits", "models", "causes", "launches")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hf_sparse_attn.benchmarks.gpu", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the results")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, the kernels in Triton's interpreter")
    parser.add_argument("--seconds", type=float, default=600, help="after which no row is begun")
    arguments = parser.parse_args()
    if arguments.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "machine":
        return machine(arguments.out / "machine.json", arguments.dry)
    return stage(arguments.stage, arguments.out / f"{arguments.stage}.json", arguments.dry, arguments.seconds)


def machine(path: Path, dry: bool) -> int:
    """Note the card and the software. Without a card and not dry nothing can be measured: exit code 2."""
    import torch

    from ...system.environment import environment

    known: dict[str, object] = {"dry": dry, "environment": environment(), "profiler": shutil.which("ncu")}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        known |= {
            "card": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
        listing = (
            subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
            if shutil.which("nvidia-smi")
            else None
        )
        known["nvidia_smi"] = None if listing is None else listing.stdout
    write_json(path, known)
    if dry or torch.cuda.is_available():
        return 0
    print(
        "there is no GPU here (torch.cuda.is_available() is False): nothing was measured. Try it with --dry",
        file=sys.stderr,
    )
    return 2


def stage(name: str, path: Path, dry: bool, seconds: float) -> int:
    """Run a stage; exit code 1 if a row failed."""
    from hf_sparse_attn_kernels.implementations import preferred

    from . import causes, launch_grid, limits, whole_models
    from .rows import run_entries

    entries = {"limits": limits, "models": whole_models, "causes": causes, "launches": launch_grid}[name].entries
    with preferred("triton"):
        result = run_entries(path, entries(dry), seconds, stage=name, dry=dry)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
