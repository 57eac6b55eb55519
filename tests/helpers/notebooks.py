"""Notebooks as their readers run them: the code cells one after the other in one namespace, in a process of its own.

nbclient would need ipykernel and some thirty packages for the same: the notebooks have no magics and no widgets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RUN_CELLS = """
import json, sys
book = json.load(open(sys.argv[1], encoding="utf-8"))
namespace = {"__name__": "__main__"}
for cell in book["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), namespace)
"""


def run_notebook(path: Path, folder: Path, **environment: object) -> str:
    """What the code cells print; ``folder`` is where they run, ``environment`` what they find in os.environ."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_CELLS, path],
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
