"""One self-contained HTML report, rendered from results alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
import yaml

from ..files import write_text
from .rendering import render

matplotlib.use("agg")  # no display is needed

COLOURS = {
    "oracle": "#444444",
    "two stages": "#0b6e4f",
    "stage 1 alone": "#2f9fd0",
    "untrained": "#e0a030",
    "mean-pool": "#c06030",
    "window + sink": "#b03060",
}


def _figure(draw: Callable[[Any], None], width: float = 7.5, height: float = 3.2) -> str:
    """A drawing on one axis as an inline SVG data URI."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.add_subplot()
    draw(axis)
    axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _loss_plot(table: list[dict[str, Any]]) -> str:
    cells = [(r["length"], r["keys"]) for r in table if r["keys"] is not None]
    cells = sorted(set(cells))

    def draw(axis: Any) -> None:
        for i, cell in enumerate(cells):
            rows = [r for r in table if (r["length"], r["keys"]) == cell]
            dense = next(r["prefill"] for r in table if r["length"] == cell[0] and r["keys"] is None)
            for j, row in enumerate(rows):
                label = row["selection"] if i == 0 else None
                axis.bar(i + j * 0.13 - 0.33, row["prefill"] - dense, 0.12, color=COLOURS.get(row["selection"], "#888888"), label=label)
        axis.set_xticks(range(len(cells)), [f"{keys} of {length} keys" for length, keys in cells])
        axis.set_ylabel("log-loss above dense (nats)")
        axis.legend(frameon=False, fontsize=8)

    return _figure(draw)


def _mass_plot(table: list[dict[str, Any]]) -> str | None:
    rows = [r for r in table if "kept_mass" in r]
    if not rows:
        return None
    first = (rows[0]["length"], rows[0]["keys"])

    def draw(axis: Any) -> None:
        for row in rows:
            if (row["length"], row["keys"]) == first:
                layers = {int(k): v for k, v in row["kept_mass"]["by_layer"].items()}
                axis.plot(
                    list(layers), list(layers.values()), label=row["selection"], color=COLOURS.get(row["selection"], "#888888"), lw=1.6
                )
        axis.set_xlabel("layer")
        axis.set_ylabel("kept softmax mass")
        axis.set_title(f"{first[1]} of {first[0]} keys", fontsize=9)
        axis.legend(frameon=False, fontsize=8)

    return _figure(draw)


def _training_plot(log: list[dict[str, Any]]) -> str:
    def draw(axis: Any) -> None:
        x = [row["batch"] for row in log]
        axis.plot(x, [row["kl_coarse"] for row in log], label="KL stage 1", color="#2f9fd0")
        axis.plot(x, [row["kl_fine"] for row in log], label="KL stage 2", color="#0b6e4f")
        axis.plot(x, [row["recovered_share"] for row in log], label="recovered share", color="#b03060", ls="--")
        axis.set_xlabel("batch")
        axis.legend(frameon=False, fontsize=8)

    return _figure(draw, height=2.6)


def _speed_plot(speed: dict[str, Any]) -> str:
    model = speed["model"]
    names = [("prefill", "stock"), ("prefill", "sparse"), ("decode", "stock"), ("decode", "best_dense"), ("decode", "sparse")]

    def draw(axis: Any) -> None:
        for i, (kind, name) in enumerate(names):
            value = model[kind][name]["tokens_per_s"] / model[kind]["stock"]["tokens_per_s"]
            axis.bar(i, value, color="#0b6e4f" if name == "sparse" else "#999999")
            axis.text(i, value, f"{value:.2f}×", ha="center", va="bottom", fontsize=8)
        axis.set_xticks(range(len(names)), [f"{kind}\n{name.replace('_', ' ')}" for kind, name in names], fontsize=8)
        axis.set_ylabel("tokens/s against stock")

    return _figure(draw, height=2.8)


def write_report(path: str | Path, results: dict[str, Any]) -> None:
    """Write the HTML report of `results`: tables, plots, limits, environment; it needs no network."""
    table = results["quality"]["table"]
    plots = {
        "loss": _loss_plot(table),
        "mass": _mass_plot(table),
        "training": _training_plot(results["distill"]["log"]),
        "speed": _speed_plot(results["speed"]) if results["speed"].get("model") else None,
    }
    template = files("hf_sparse_attn").joinpath("templates", "report.html")
    write_text(path, render(template, r=results, table=table, plots=plots, **_origin(results)))


def write_task_report(path: str | Path, results: dict[str, Any]) -> None:
    """Write the HTML report of a task other than language modelling: its ``tables``, the distillation, environment."""
    template = files("hf_sparse_attn").joinpath("templates", "task.html")
    write_text(path, render(template, r=results, training=_training_plot(results["distill"]["log"]), **_origin(results)))


def _origin(results: dict[str, Any]) -> dict[str, Any]:
    """What a report says of how it was made: the steps of the run, and the recipe."""
    steps = {name: step for name, step in results.items() if isinstance(step, dict) and "seconds" in step}
    return {"steps": steps, "recipe": yaml.safe_dump(results["recipe"], sort_keys=False)}
