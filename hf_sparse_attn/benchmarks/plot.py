"""Speed-ups, rates and memory against length, drawn from the rows of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..system.extras import needs_extra
from ..system.files import write_atomically

COLOURS = {"bfloat16": "#0b6e4f", "float32": "#2f9fd0", "float16": "#b03060"}


def plot_speedups(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write an SVG: measured speed-ups with their spread, and the ratio of pairs that bounds them."""
    with needs_extra("report", "drawing figures"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.add_subplot()
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        some = sorted((row for row in rows if row["dtype"] == dtype), key=lambda row: row["length"])
        lengths = [row["length"] for row in some]
        for key, style, name in (("speedup", "--", "attention alone"), ("speedup_with_router", "-", "with router")):
            if all(key in row for row in some):
                middle = [row[key]["median"] for row in some]
                # lengths of the bars, as errorbar takes them
                below, above = ([abs(row[key][end] - row[key]["median"]) for row in some] for end in ("min", "max"))
                axis.errorbar(
                    lengths,
                    middle,
                    (below, above),
                    ls=style,
                    marker="o",
                    capsize=3,
                    color=COLOURS[dtype],
                    label=f"{dtype}, {name}",
                )
    ideal = sorted({(row["length"], row["ideal_speedup"]) for row in rows})
    axis.plot(*zip(*ideal, strict=True), color="#999999", lw=1, label="ratio of pairs")
    axis.axhline(1, color="#999999", lw=0.5)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks([length for length, _ in ideal], [f"{length:,}" for length, _ in ideal], minor=False)
    axis.set_xlabel("tokens")
    axis.set_ylabel(f"speed-up over {rows[0]['baseline']}")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="svg"))


KINDS = {  # of a training benchmark: colour, line
    "sparse": ("#0b6e4f", "-"),
    "sparse without KL": ("#0b6e4f", ":"),
    "dense step": ("#2f9fd0", "--"),
    "stock sdpa": ("#b03060", "-"),
    "stock eager": ("#b03060", ":"),
}


def plot_training(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write an SVG of two panels: tokens per second with their spread, and the memory of a step, both
    against length.
    """
    with needs_extra("report", "drawing figures"):
        from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: row["length"])
    figure = Figure(figsize=(10, 4), layout="constrained")
    rate, memory = figure.subplots(1, 2)
    for kind, (colour, style) in KINDS.items():
        some = [
            (row["length"], row["batch"] * row["length"], row["kinds"][kind]) for row in rows if kind in row["kinds"]
        ]
        if not some:
            continue
        lengths, options = [length for length, *_ in some], {"color": colour, "ls": style, "marker": "o"}
        middle = [tokens / figures["median_s"] for _, tokens, figures in some]
        # the longest time is the lowest rate
        below = [m - tokens / figures["max_s"] for m, (_, tokens, figures) in zip(middle, some, strict=True)]
        above = [tokens / figures["min_s"] - m for m, (_, tokens, figures) in zip(middle, some, strict=True)]
        rate.errorbar(lengths, middle, (below, above), capsize=3, label=kind, **options)
        memory.plot(
            lengths,
            [(figures["static_bytes"] + figures["peak_memory_bytes"]) / 2**30 for *_, figures in some],
            label=kind,
            **options,
        )
    lengths = [row["length"] for row in rows]
    for axis, label in ((rate, "tokens per second"), (memory, "weights, states and peak of a step, GiB")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
        axis.set_xlabel("tokens")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    rate.legend(frameon=False, fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="svg"))
