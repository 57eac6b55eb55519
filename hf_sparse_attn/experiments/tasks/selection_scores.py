"""Runs of tasks other than language modelling: scores of every selection before and after, and tables of them."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedModel

from ...evaluation.baselines import make_selectors
from ..recipe import RecipeError
from ..reports.html_report import write_task_report
from ..reports.model_card import write_card
from ..scores.task_scores import Row, Score, evaluate_rows
from ..steps import Step
from .distil_and_adapt import TrainingRun


class TaskRun(TrainingRun):
    """A run whose results are scores of rows. A task says which rows, which score and how they are tabulated."""

    task_type: str | None = None
    model_class: Any  # with from_pretrained
    score: Score

    def steps(self) -> list[Step]:
        return [
            *self._training_steps(),
            Step("evaluation", lambda: self._evaluate(self._model())),
        ]

    def _evaluation_rows(self) -> list[tuple[str, Row]]:
        raise NotImplementedError

    def tables(self, results: dict[str, Any]) -> list[dict[str, Any]]:
        """What the report and the card show: each with ``title``, ``note``, ``columns`` and ``rows`` of text."""
        raise NotImplementedError

    def finish(self, results: dict[str, Any]) -> None:
        results["sparse_attention"] = AutoConfig.from_pretrained(self.folder / "model").sparse_attention
        results["tables"] = self.tables(results)
        write_task_report(self.folder / "report.html", results)
        write_card(self.folder / "model" / "README.md", results)

    def _base(self) -> PreTrainedModel:
        options = {"sparse_attention": self.recipe.sparse_attention, "dtype": self.dtype}
        return self.model_class.from_pretrained(self.state / "base", **options).eval()  # type: ignore[no-any-return]

    def _model(self) -> PreTrainedModel:
        return self.model_class.from_pretrained(self.folder / "model").eval()  # type: ignore[no-any-return]

    def _evaluate(self, model: PreTrainedModel) -> dict[str, Any]:
        scores: list[dict[str, Any]] = []
        for entry in self.recipe.quality:
            selectors = make_selectors(entry.selections)
            scores += evaluate_rows(model, self._evaluation_rows(), type(self).score, entry.budgets, selectors)
        return {"scores": scores}

    def _before(self) -> dict[str, Any]:
        return self._evaluate(self._distilled())

    def _reference(self) -> dict[str, Any]:
        model, log = self._adapted_densely()
        # the other processes only train
        rows = self._evaluation_rows() if self.processes.is_main_process else []
        return {"log": log, "scores": evaluate_rows(model, rows, type(self).score, (), {})}

    def _lora(self) -> dict[str, Any]:
        settings = self.recipe.lora
        model, log = self._adapted("lora", self.recipe.adaptation) if settings["steps"] else (self._distilled(), [])
        if self.processes.is_main_process:
            self._save(model)
        return {"steps": settings["steps"], "context": settings["context"], "log": log}

    def _one_length(self) -> int:
        """The tokens of every row, which the recipe must give alike everywhere."""
        recipe = self.recipe
        lengths = {recipe.distill["context"], recipe.lora["context"], *(entry.length for entry in recipe.quality)}
        if len(lengths) != 1 or len(recipe.quality) != 1:
            raise RecipeError(
                f"rows of task {recipe.task} have one length: distill.context, lora.context and quality[0].length, "
                f"got {sorted(lengths)}"
            )
        return int(lengths.pop())
