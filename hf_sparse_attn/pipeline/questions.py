"""Task ``questions``: answers that need a passage far back, before and after the joint stage."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..data.questions import ask
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
        questions = ask(self._train_windows(settings["context"], count), self._tokenizer(), self.recipe.seed)
        return [{"input_ids": q.input_ids, "labels": q.labels} for q in questions]

    def _answers(self, model: PreTrainedModel) -> list[dict[str, Any]]:
        selectors, rows = standard_selectors(fresh_routers(model)), []
        for entry in self.recipe.quality:
            questions = ask(self._eval_windows(entry.length, entry.windows), self._tokenizer(), self.recipe.seed + 1)
            rows += evaluate_answers(model, questions, entry.budgets, {name: selectors[name] for name in entry.selections})
        return answer_table(rows)
