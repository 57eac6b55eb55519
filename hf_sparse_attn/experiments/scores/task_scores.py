"""Scores of tasks other than language modelling, of every selection on the same rows: forecasts and classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...attention.call import Selector, SparseCall
from ...config import fixed_budget
from ...evaluation.statistics import RESAMPLES
from ...models.convert import sparse_attention_as
from ...system.progress import bar

Row = Mapping[str, Tensor]
Score = Callable[[Any, Row], dict[str, Any]]  # (output of the model, its inputs) -> figures
Scores = list[dict[str, Any]]


@torch.no_grad()
def evaluate_rows(
    model: PreTrainedModel,
    rows: Sequence[tuple[str, Row]],
    score: Score,
    budgets: Sequence[int],
    selectors: Mapping[str, Selector],
) -> Scores:
    """``score`` of every named row (inputs without the batch dimension), dense and under every selector at every budget
    (keys).
    """
    scores: Scores = []

    def add(name: str, row: Row, keys: int | None, selection: str, call: SparseCall) -> None:
        batch = {key: value[None].to(model.device) for key, value in row.items()}
        scores.append(
            {"row": name, "keys": keys, "selection": selection, **score(model(**batch, sparse_call=call), batch)}
        )

    with bar(True) as shown:
        task = shown.add_task("evaluating", total=len(rows), info="")
        for name, row in rows:
            add(name, row, None, "dense", SparseCall(dense=True))
            for keys in budgets:
                with sparse_attention_as(model, **fixed_budget(keys)):
                    for selection, selector in selectors.items():
                        add(name, row, keys, selection, SparseCall(selector=selector))
            shown.update(task, advance=1)
    return scores


def forecast_errors(prediction: Tensor, truth: Tensor) -> dict[str, float]:
    """Mean squared and absolute error of normalised channels."""
    off = prediction.float() - truth.float()
    return {"mse": float(off.square().mean()), "mae": float(off.abs().mean())}


def forecast_score(output: Any, row: Row) -> dict[str, float]:
    """Errors of a PatchTSTForPrediction's output."""
    return forecast_errors(output.prediction_outputs, row["future_values"])


def class_score(output: Any, row: Row) -> dict[str, Any]:
    """Log-loss (nats), the class found, and the true one, of one document."""
    logits, label = output.logits.float()[0], int(row["labels"][0])
    return {"loss": float(-logits.log_softmax(-1)[label]), "found": int(logits.argmax()), "label": label}


def forecast_table(scores: Scores, reference: Scores | None = None) -> list[dict[str, Any]]:
    """Means by budget and selection; ``over_reference``:
    mean squared error over that of dense fine-tuning, 95 % paired interval.
    """
    yardstick = {s["row"]: s["mse"] for s in reference or ()}
    table = []
    for (keys, selection), cell_scores in _cells(scores).items():
        row: dict[str, Any] = {
            "keys": keys,
            "selection": selection,
            "n": len(cell_scores),
            "mse": _mean(cell_scores, "mse"),
            "mae": _mean(cell_scores, "mae"),
        }
        if yardstick:
            # a row's both errors are drawn together; the ratio is that of the means
            pairs = np.array([(s["mse"], yardstick[s["row"]]) for s in cell_scores])
            picked = pairs[np.random.default_rng(0).integers(0, len(pairs), (RESAMPLES, len(pairs)))].mean(1)
            low, high = np.quantile(picked[:, 0] / picked[:, 1], [0.025, 0.975])
            row["over_reference"] = {
                "ratio": float(pairs[:, 0].mean() / pairs[:, 1].mean()),
                "low": float(low),
                "high": float(high),
            }
        table.append(row)
    return table


def class_table(scores: Scores, classes: int) -> list[dict[str, Any]]:
    """Mean log-loss, accuracy with its standard error, and macro F1 by budget and selection."""
    table = []
    for (keys, selection), cell_scores in _cells(scores).items():
        predicted, label = (np.array([s[name] for s in cell_scores]) for name in ("found", "label"))
        right = predicted == label
        table.append(
            {
                **{
                    "keys": keys,
                    "selection": selection,
                    "n": len(cell_scores),
                    "loss": _mean(cell_scores, "loss"),
                    "accuracy": float(right.mean()),
                },
                # √(p (1 − p) / n)
                "accuracy_error": float(right.std() / len(cell_scores) ** 0.5),
                "macro_f1": macro_f1(predicted, label, classes),
            }
        )
    return table


# F1 = 2 TP / (2 TP + FP + FN); classes found are TP + FP, true ones TP + FN
def macro_f1(predicted: Any, label: Any, classes: int) -> float:
    """Mean over the classes that occur of 2·hits / (found + true)."""
    scores = []
    for c in range(classes):
        total = int((predicted == c).sum() + (label == c).sum())
        if total:
            scores.append(2 * int(((predicted == c) & (label == c)).sum()) / total)
    return float(np.mean(scores))


def _cells(scores: Scores) -> dict[tuple[int | None, str], Scores]:
    cells: dict[tuple[int | None, str], Scores] = {}
    for score in scores:
        cells.setdefault((score["keys"], score["selection"]), []).append(score)
    return cells


def _mean(scores: Scores, name: str) -> float:
    return float(np.mean([s[name] for s in scores]))
