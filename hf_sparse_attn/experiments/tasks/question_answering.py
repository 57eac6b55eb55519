"""Task ``questions``: answers that need a passage far back, before and after the joint stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from ...data.questions import QUOTED_TASK, Question, ask
from ...data.windows import Window
from ...evaluation.baselines import make_selectors
from ...system.files import write_json
from ...system.progress import bar
from ..recipe import Quality
from ..rows.ruler import ruler
from ..scores.answers import answer_table, evaluate_answers
from ..steps import Step
from .language_model import LanguageRun


class QuestionRun(LanguageRun):
    """The main job with questions as training rows, and their answers measured beside log-loss."""

    def steps(self) -> list[Step]:
        # the steps that measure answer the questions, too
        named = {step.name: step for step in super().steps()}
        named["quality"] = Step(
            "quality", lambda: {**self._quality(), "answers": self._answers(self._model(), "quality")}
        )
        if "before" in named:
            named["before"] = Step(
                "before", lambda: {**self._before(), "answers": self._answers(self._distilled(), "before")}
            )
        return list(named.values())

    def _rows(self) -> Any:
        settings, adaptation = self.recipe.lora, self.recipe.adaptation
        count = settings["steps"] * adaptation.batch_size * adaptation.accumulation * self.processes.num_processes
        windows, tasks = self._train_windows(settings["context"], count), self.recipe.data["questions"]
        # in turn
        by_task = [self._ask(windows[at :: len(tasks)], task, self.recipe.seed) for at, task in enumerate(tasks)]
        questions = [by_task[at % len(tasks)][at // len(tasks)] for at in range(count)]
        return [{"input_ids": q.input_ids, "labels": q.labels} for q in questions]

    def _ask(self, windows: Sequence[Window], task: str, seed: int) -> list[Question]:
        tokenizer = self._tokenizer()
        return ask(windows, tokenizer, seed) if task == QUOTED_TASK else ruler(windows, tokenizer, seed, task)

    def _answers(self, model: PreTrainedModel, name: str) -> list[dict[str, Any]]:
        """Every question under the selections of the recipe's quality entries; continues after a stop."""
        partial = self.state / f"{name}.answer_tokens.partial.json"
        done = json.loads(partial.read_text()) if partial.exists() else []
        rows: list[dict[str, Any]] = []
        per_length = [(entry, self._questions(entry)) for entry in self.recipe.quality]
        # every question once densely, and under every selection at every budget
        total = sum(
            len(questions) * (1 + len(entry.budgets) * len(entry.selections)) for entry, questions in per_length
        )
        with bar(self.processes.is_main_process) as shown:
            task = shown.add_task("answers", total=total, completed=len(done), info="")

            def note(row: dict[str, Any]) -> None:
                done.append(row)
                write_json(partial, done, finite=False)
                shown.update(task, advance=1, info=f"{row['task']}, {row['selection']}")

            for entry, questions in per_length:
                selectors = make_selectors(entry.selections)
                rows += evaluate_answers(model, questions, entry.budgets, selectors, done=list(done), on_row=note)
        return answer_table(rows)

    def _questions(self, entry: Quality) -> list[Question]:
        windows = self._eval_windows(entry.length, entry.windows)
        return [
            question
            for task in self.recipe.data["questions"]
            for question in self._ask(windows, task, self.recipe.seed + 1)
        ]
