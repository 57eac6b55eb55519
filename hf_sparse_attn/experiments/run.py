"""Running a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..system.extras import require_extra
from ..system.terminal import Terminal
from .recipe import Recipe
from .steps import Run
from .tasks.ablation_run import AblationRun
from .tasks.classification import ClassificationRun
from .tasks.forecasting import ForecastingRun
from .tasks.language_model import LanguageRun
from .tasks.planted_links import LongLinkRun
from .tasks.question_answering import QuestionRun
from .tasks.robustness_run import RobustnessRun

TASKS: dict[str, type[Run]] = {
    "causal_lm": LanguageRun,
    "questions": QuestionRun,
    "classification": ClassificationRun,
    "forecasting": ForecastingRun,
    "ablation": AblationRun,
    "robustness": RobustnessRun,
    "longlink": LongLinkRun,
}


def run_recipe(recipe: Recipe, folder: str | Path, console: Terminal | None = None) -> dict[str, Any]:
    """Run ``recipe`` in ``folder``, continuing an interrupted run; returns the results.

    Raises:
        RecipeError: the folder holds a run of another recipe, or the disk is nearly full.
        SourceError: a model or text cannot be read.
        MissingExtraError: there is nothing to draw the report with.
    """
    require_extra("report", "the report of a run")
    return TASKS[recipe.task](recipe, Path(folder), console or Terminal()).main()
