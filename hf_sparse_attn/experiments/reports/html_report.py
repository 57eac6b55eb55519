"""Self-contained HTML reports, rendered from results alone."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ...system.files import write_text
from .figures import Rows, quality_plots, speed_plot, training_plot
from .rendering import render
from .study_figures import ablation_plot, answer_plot, budget_plot, distance_plot, noise_plot, share_plot
from .words import explained


def _write(path: str | Path, template: str, **values: Any) -> None:
    write_text(path, render(files(__package__).joinpath("templates", template), **values))


def write_report(path: str | Path, results: dict[str, Any]) -> None:
    """Write the HTML report of `results`: tables, plots, limits, environment; it needs no network."""
    table = results["quality"]["table"]
    plots = {
        **quality_plots(table),
        "training": training_plot(results["distill"]["log"]),
        "speed": speed_plot(results["speed"]) if results["speed"].get("model") else None,
        "answers": answer_plot(results["quality"]["answers"]) if "answers" in results["quality"] else None,
    }
    _write(path, "report.html", r=results, table_rows=table, words=_names(table), plots=plots, **_origin(results))


def write_task_report(path: str | Path, results: dict[str, Any]) -> None:
    """Write the HTML report of a task other than language modelling: its ``tables``, the distillation, environment."""
    plots = {"training": training_plot(results["distill"]["log"])}
    _write(path, "task.html", r=results, words=_first_cells(results), plots=plots, **_origin(results))


def write_evaluation_report(path: str | Path, results: dict[str, Any]) -> None:
    """Write the HTML report of what the verb ``eval`` measured:
    the table of the gaps, plots, limits, the command that gives it again.
    """
    documents = dict.fromkeys(window["document"] for window in results["windows"])
    table = results["table"]
    _write(
        path,
        "evaluation.html",
        r=results,
        table_rows=table,
        words=_names(table),
        plots=quality_plots(table),
        documents=documents,
    )


def write_harness_report(path: str | Path, results: dict[str, Any]) -> None:
    """Write the HTML report of what the verb ``lm-eval`` measured:
    scores by task, limits, the command that gives it again.
    """
    _write(path, "harness.html", r=results, words=_first_cells(results))


def write_calibration_report(path: str | Path, results: dict[str, Any]) -> None:
    """Write the HTML report of what the verb ``calibrate`` found:
    figures, budgets by layer and head, limits, the command.
    """
    calibration = results["calibration"]
    verified = calibration["verified"]
    words = explained(verified["losses"])
    _write(
        path, "calibration.html", r=results, c=calibration, v=verified, words=words, budgets=budget_plot(calibration)
    )


def write_longlink_report(path: str | Path, results: dict[str, Any]) -> None:
    """Write the HTML report of a LongLink study: answers, routing, distances, noise, limits, the command."""
    plots = {"distance": distance_plot(results["answers"]), "noise": noise_plot(results["noise"])}
    _write(path, "longlink.html", r=results, words=_names(results["answers"]), plots=plots)


def write_ablation_report(path: str | Path, results: dict[str, Any]) -> None:
    """Write the HTML report of an ablation: the table by factor, the plot of quality against time, limits,
    environment.
    """
    table = results["table"]
    factors = {
        factor: [row for row in table if row["factor"] == factor]
        for factor in dict.fromkeys(row["factor"] for row in table)
    }
    documents = dict.fromkeys(reading["document"] for reading in results["default-default"]["readings"])
    plots = {"table": ablation_plot(table)}
    _write(path, "ablation.html", r=results, factors=factors, documents=documents, plots=plots, **_origin(results))


def write_robustness_report(path: str | Path, results: dict[str, Any]) -> None:
    """Write the HTML report of a robustness run: shares by kind of text and by length, limits, environment."""
    plots = {"lengths": share_plot(results["lengths"])}
    words = _names([*results["domains"], *results["lengths"]])
    _write(path, "robustness.html", r=results, words=words, plots=plots, **_origin(results))


def _names(rows: Rows) -> list[tuple[str, str]]:
    """What the selections of a table mean."""
    return explained(row["selection"] for row in rows)


def _first_cells(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What the selections mean that the rows of a task's tables start with."""
    return explained(row[0] for table in results["tables"] for row in table["rows"])


def _origin(results: dict[str, Any]) -> dict[str, Any]:
    """What a report says of how it was made: the steps of the run, and the recipe."""
    # steps are what took seconds
    steps = {name: step for name, step in results.items() if isinstance(step, dict) and "seconds" in step}
    return {"steps": steps, "recipe": yaml.safe_dump(results["recipe"], sort_keys=False)}
