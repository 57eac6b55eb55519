"""Plots of results as inline SVG, which a page without a network shows."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...system.extras import needs_extra

Rows = Sequence[dict[str, Any]]  # of `quality_table`

# a pixel of a page is 0.75 pt: text of 14 pixels, written as text, and the same bytes for the same figures
STYLE: Any = {"font.size": 10.5, "axes.titlesize": 10.5, "svg.fonttype": "none", "svg.hashsalt": "hf_sparse_attn"}
OTHER = "#808080"
COLOURS = {  # each at least 3:1 against white
    "oracle": "#444444",
    "two stages": "#0b6e4f",
    "stage 1 alone": "#1f86b8",
    "untrained": "#b3760a",
    "mean-pool": "#c06030",
    "min-max": "#7a5aa8",
    "mean-std": "#b07ac8",
    "window + sink": "#b03060",
    "random": "#8a8a8a",
}
MAPPED = ("window + sink", "two stages", "oracle")  # selections whose kept mass is drawn by layer and head


def figure(draw: Callable[..., None], width: float = 7.5, height: float = 3.6, columns: int = 1) -> str:
    """What ``draw`` puts on its axes, ``columns`` of them side by side, as an inline SVG data URI.

    Sizes are in inches, of 96 pixels each.
    """
    with needs_extra("report", "drawing figures"):
        import matplotlib
        from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        # without pyplot: no display is asked for, and no figure stays open
        drawing = Figure(figsize=(width, height), layout="constrained")
        axes = drawing.subplots(1, columns, squeeze=False)[0]
        draw(*axes)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
        # no date: the same figures give the same bytes
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def legend(axis: Any, columns: int = 5) -> None:
    """What the lines or bars of ``axis`` are, above the figure, where it hides nothing."""
    drawing = axis.figure
    drawing.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=columns, frameon=False)


def loss_plot(table: Rows) -> str:
    """Log-loss above dense, a group of bars for every length and budget."""
    cells = sorted({(r["length"], r["keys"]) for r in table if r["keys"] is not None})

    def draw(axis: Any) -> None:
        for i, cell in enumerate(cells):
            rows = [r for r in table if (r["length"], r["keys"]) == cell]
            # the dense row of that length, which has no budget
            dense = next(r["prefill"] for r in table if r["length"] == cell[0] and r["keys"] is None)
            width = 0.8 / len(rows)
            for j, row in enumerate(rows):
                label = row["selection"] if i == 0 else None
                # bars of a group side by side, with its tick in the middle
                at = i + (j - (len(rows) - 1) / 2) * width
                axis.bar(
                    at, row["prefill"] - dense, 0.92 * width, color=COLOURS.get(row["selection"], OTHER), label=label
                )
        axis.set_xticks(range(len(cells)), [f"{keys} of\n{length} keys" for length, keys in cells])
        axis.set_ylabel("log-loss above dense (nats)")
        legend(axis)

    return figure(draw)


def _first_cell(table: Rows, name: str) -> Rows:
    """The rows of the first length and budget that have a figure ``name``."""
    cells = [row for row in table if row["keys"] is not None and row.get(name)]
    return [row for row in cells if (row["length"], row["keys"]) == (cells[0]["length"], cells[0]["keys"])]


def _lines(
    rows: Rows, values: Callable[[dict[str, Any]], tuple[Sequence[float], Sequence[float]]], x: str, y: str
) -> str:
    def draw(axis: Any) -> None:
        for row in rows:
            axis.plot(*values(row), label=row["selection"], color=COLOURS.get(row["selection"], OTHER), lw=1.6)
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.set_title(f"{rows[0]['keys']} of {rows[0]['length']} keys")
        legend(axis)

    return figure(draw)


def mass_plot(table: Rows) -> str | None:
    """Kept mass by layer, None if it was not measured."""
    rows = _first_cell(table, "kept_mass")

    def by_layer(row: dict[str, Any]) -> tuple[list[float], list[float]]:
        layers = {int(k): v for k, v in row["kept_mass"]["by_layer"].items()}
        return list(layers), list(layers.values())

    return _lines(rows, by_layer, "layer", "kept softmax mass") if rows else None


def position_plot(table: Rows) -> str | None:
    """Log-loss above dense along the window, None if it was not measured."""
    rows = _first_cell(table, "by_position")
    if not rows:
        return None
    length = rows[0]["length"]
    dense = np.array(next(r["by_position"] for r in table if r["keys"] is None and r["length"] == length))

    def above(row: dict[str, Any]) -> tuple[list[float], list[float]]:
        parts = len(dense)
        # each part is drawn in its middle
        return [(i + 0.5) * length / parts for i in range(parts)], (np.array(row["by_position"]) - dense).tolist()

    return _lines(rows, above, "position (tokens)", "log-loss above dense (nats)")


def head_plot(table: Rows) -> str | None:
    """Kept mass by layer and KV head of window + sink, this model and the oracle; None if it was not measured."""
    rows = {row["selection"]: row for row in _first_cell(table, "head_mass")}
    shown = [rows[name] for name in MAPPED if name in rows]
    if not shown:
        return None

    def draw(*axes: Any) -> None:
        for axis, row in zip(axes, shown, strict=True):
            layers = [int(layer) for layer in row["head_mass"]]
            image = axis.imshow(
                np.array(list(row["head_mass"].values())).T, vmin=0, vmax=1, aspect="auto", cmap="viridis"
            )
            axis.set_title(f"{row['selection']},\n{row['keys']} of {row['length']} keys")
            ticks = range(0, len(layers), max(1, len(layers) // 6))
            axis.set_xticks(list(ticks), [str(layers[at]) for at in ticks])
            axis.set_yticks(range(len(next(iter(row["head_mass"].values())))))
            axis.set_xlabel("layer")
        axes[0].set_ylabel("KV head")
        axes[-1].figure.colorbar(image, ax=axes[-1], label="kept mass")

    return figure(draw, width=9, height=2.8, columns=len(shown))


def training_plot(log: Sequence[dict[str, Any]]) -> str:
    """What distillation logged, by batch."""

    def draw(axis: Any) -> None:
        x = [row["batch"] for row in log]
        axis.plot(x, [row["kl_coarse"] for row in log], label="KL stage 1", color=COLOURS["stage 1 alone"])
        axis.plot(x, [row["kl_fine"] for row in log], label="KL stage 2", color=COLOURS["two stages"])
        axis.plot(x, [row["recovered_share"] for row in log], label="recovered share", color="#b03060", ls="--")
        axis.set_xlabel("batch")
        legend(axis)

    return figure(draw, height=3)


def speed_plot(speed: dict[str, Any]) -> str:
    """Tokens a second of prefill and decode, against stock attention."""
    model = speed["model"]
    names = [
        ("prefill", "stock"),
        ("prefill", "sparse"),
        ("decode", "stock"),
        ("decode", "best_dense"),
        ("decode", "sparse"),
    ]

    def draw(axis: Any) -> None:
        for i, (kind, name) in enumerate(names):
            value = model[kind][name]["tokens_per_s"] / model[kind]["stock"]["tokens_per_s"]
            axis.bar(i, value, color="#0b6e4f" if name == "sparse" else "#999999")
            axis.text(i, value, f"{value:.2f}×", ha="center", va="bottom")
        axis.set_xticks(range(len(names)), [f"{kind}\n{name.replace('_', ' ')}" for kind, name in names])
        axis.set_ylabel("tokens/s against stock")

    return figure(draw, height=2.8)


def quality_plots(table: Rows) -> dict[str, str | None]:
    """The plots of a quality table that its template shows."""
    return {
        "loss": loss_plot(table),
        "mass": mass_plot(table),
        "position": position_plot(table),
        "heads": head_plot(table),
    }
