"""Task ``questions``: answers that need a passage far back, before and after the joint stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from ..data.questions import QUOTED_TASK, Question, ask
from ..data.ruler import ruler
from ..data.windows import Window
from ..evaluation.answers import answer_table, evaluate_answers
from ..evaluation.selectors import fresh_routers, standard_selectors
from .engine import Step
from .language import LanguageRun


class QuestionRun(LanguageRun):
    """The main job with questions as training rows, and their answers measured beside log-loss."""

    def steps(self) -> list[Step]:
        named = {step.name: step for step in super().steps()}
        named["quality"] = Step("quality", lambda: {**self._quality(), "answers": self._answers(self._model())})
        if "before" in named:
            named["before"] = Step("before", lambda: {**self._before(), "answers": self._answers(self._distilled())})
        return list(named.values())

    def _rows(self) -> Any:
        settings, adaptation = self.recipe.lora, self.recipe.adaptation
        count = settings["steps"] * adaptation.batch_size * adaptation.accumulation * self.processes.num_processes
        windows, tasks = self._train_windows(settings["context"], count), self.recipe.data["questions"]
        by_task = [self._ask(windows[at :: len(tasks)], task, self.recipe.seed) for at, task in enumerate(tasks)]  # in turn
        questions = [by_task[at % len(tasks)][at // len(tasks)] for at in range(count)]
        return [{"input_ids": q.input_ids, "labels": q.labels} for q in questions]

    def _ask(self, windows: Sequence[Window], task: str, seed: int) -> list[Question]:
        tokenizer = self._tokenizer()
        return ask(windows, tokenizer, seed) if task == QUOTED_TASK else ruler(windows, tokenizer, seed, task)

    def _answers(self, model: PreTrainedModel) -> list[dict[str, Any]]:
        selectors, rows = standard_selectors(fresh_routers(model)), []
        for entry in self.recipe.quality:
            windows = self._eval_windows(entry.length, entry.windows)
            questions = [question for task in self.recipe.data["questions"] for question in self._ask(windows, task, self.recipe.seed + 1)]
            rows += evaluate_answers(model, questions, entry.budgets, {name: selectors[name] for name in entry.selections})
        return answer_table(rows)
