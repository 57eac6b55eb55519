"""A run of a recipe: named steps, each leaving a file in the run's folder.

A step is skipped when its file is there, so an interrupted run continues where it stopped. A run folder belongs to one
recipe: with a changed recipe it is refused. Under ``accelerate launch`` training steps run on every process, the others
on the main one.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState

from ..data.sources import free_bytes
from ..system.environment import Cost, environment
from ..system.files import check_folder_output, finite_results, not_finite, write_json
from ..system.locks import sole_use
from ..system.outputs import check_output
from ..system.precision import resolve
from ..system.progress import step as working
from ..system.terminal import Terminal
from .recipe import Recipe, RecipeError

LEAST_FREE_BYTES = 3 << 30  # a run holds two copies of a small model and its checkpoints
WAIT = timedelta(hours=24)  # of the other processes for a step of the main one


class Step(NamedTuple):
    """One step of a run. ``everywhere``: on every process, not on the main one alone.
    ``then`` takes its result, old or new.
    """

    name: str
    run: Callable[[], dict[str, Any]]
    everywhere: bool = False
    then: Callable[[dict[str, Any]], None] | None = None


class Run:
    """One run of a recipe in ``folder``; call `main`. A task is a subclass with `steps` and `finish`."""

    def __init__(self, recipe: Recipe, folder: Path, console: Terminal) -> None:
        self.recipe, self.folder, self.console = recipe, folder, console
        self.state = folder / "state"
        self.processes = PartialState(timeout=WAIT)
        self.dtype = resolve(recipe.model["dtype"], warn=self.processes.is_main_process)

    def steps(self) -> list[Step]:
        """The steps of the task, in order."""
        raise NotImplementedError

    def finish(self, results: dict[str, Any]) -> None:
        """Write what is made from the results: report, card."""
        raise NotImplementedError

    def main(self) -> dict[str, Any]:
        """Run what is not done yet; returns the results, which are also in ``results.json``.

        There, NaN and infinity are null, and named under ``not_finite``.
        """
        if self.processes.is_main_process:
            self._check_room()
        with sole_use(self.folder, "give another --out") if self.processes.is_main_process else nullcontext():
            return self._main()

    def _main(self) -> dict[str, Any]:
        main = self.processes.is_main_process
        if main:
            self._claim_folder()
        # nobody starts before the folder is known to belong to this recipe
        self.processes.wait_for_everyone()
        torch.manual_seed(self.recipe.seed)
        started = time.monotonic()
        steps = self.steps()
        for step in steps:
            self._step(step)
            # from the file, whether the step ran just now or before: a continued run takes the same way
            if step.then is not None:
                step.then(self._load(step.name))
        results = {
            "recipe": self.recipe.raw,
            "smoke": self.recipe.smoke_run,
            "environment": environment(),
            "seed": self.recipe.seed,
        }
        results["dtype"] = str(self.dtype).removeprefix("torch.")
        results |= {step.name: self._load(step.name) for step in steps}
        if main:
            try:
                self.finish(results)
            finally:
                # also where a report fails: the figures are there
                write_json(self.folder / "results.json", finite_results(results))
            minutes = (time.monotonic() - started) / 60
            self.console.print(
                f"done in {minutes:.1f} min: {self.folder}/results.json and what lies beside it", style="bold"
            )
        return results

    def _check_room(self) -> None:
        if free_bytes(self.folder) < LEAST_FREE_BYTES:
            raise RecipeError(
                f"less than {LEAST_FREE_BYTES >> 30} GB are free for {self.folder}: free some space or give another "
                "--out"
            )

    def _claim_folder(self) -> None:
        known = self.state / "recipe.json"
        if known.exists() and json.loads(known.read_text()) != self.recipe.raw:
            raise RecipeError(
                f"{self.folder} holds a run of another recipe (or the recipe was changed): remove the folder or give "
                "another --out"
            )
        for name in ("results.json", "report.html"):
            check_output(self.folder / name)
        # lexists: a link to nothing is refused now, too
        if os.path.lexists(self.folder / "model"):
            check_folder_output(self.folder / "model")
        write_json(known, self.recipe.raw)

    def _step(self, step: Step) -> None:
        done, main = self.state / f"{step.name}.json", self.processes.is_main_process
        if done.exists():
            if main:
                self.console.print(f"{step.name}: done before", style="dim")
            return
        self.processes.wait_for_everyone()  # all have seen that it is not done
        if main:
            self.console.print(step.name, style="cyan")
        if main or step.everywhere:
            with Cost() as cost, working(step.name, main):
                result = step.run()
            if main:
                for bad in not_finite(result):
                    self.console.print(f"  step {step.name}: {bad}", style="red")
                write_json(done, {**cost.figures, **result}, finite=False)
        self.processes.wait_for_everyone()
        # the step's models go before the next one loads its own
        gc.collect()

    def _load(self, name: str) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.state / f"{name}.json").read_text())
        return loaded
