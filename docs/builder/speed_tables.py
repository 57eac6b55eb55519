"""Tables of speed and memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .quality_tables import Shown

LAYERS = ("attention", "backward", "decode")


def spread(row: dict[str, float] | None) -> str | None:
    """A ratio with its least and greatest value."""
    if row is None:
        return None
    ends = "" if row["min"] == row["max"] else f" ({row['min']:.2f}–{row['max']:.2f})"
    return f"{row['median']:.2f}×{ends}"


def seconds(row: dict[str, float]) -> str:
    value = row["median_s"]
    return f"{value:.1f} s" if value >= 10 else f"{1e3 * value:.3g} ms"


def layers(results: dict[str, Any]) -> Iterator[Shown]:
    """One attention layer, alone and with its router, against the best dense kernel."""
    rows = [row for row in results.get("rows", []) if row.get("benchmark") in LAYERS]
    rows += [results["speed"]["attention"]] if results.get("speed", {}).get("attention") else []
    if rows:
        yield (
            "One layer, in turn with the best dense attention: median, in brackets the least and the greatest. The "
            "ideal is dense pairs over kept pairs.",
            [
                "what",
                "tokens",
                "keys",
                "dtype",
                "over",
                "attention alone",
                "router included",
                "ideal",
                "n",
                "memory beyond inputs and output",
            ],
            [
                [
                    *(row["benchmark"], row["length"], row["keys"], row["dtype"], row["baseline"]),
                    *(spread(row.get("speedup")), spread(row["speedup_with_router"]), f"{row['ideal_speedup']:.2f}×"),
                    *(row["times"]["with router"]["n"], _megabytes(row.get("peak_memory_bytes"))),
                ]
                for row in rows
            ],
        )


def _megabytes(value: float | None) -> str | None:
    return None if value is None else f"{value / 2**20:.0f} MB"


def models(results: dict[str, Any]) -> Iterator[Shown]:
    """A whole model against stock, and against the best dense decode."""
    rows = [row for row in results.get("rows", []) if "decode_speedup" in row]
    rows += [results["speed"]["model"]] if results.get("speed", {}).get("model") else []
    if rows:
        yield (
            "A whole model, router included. Decode: one step, against the stock model and the best dense decode.",
            [
                "tokens",
                "keys",
                "dtype",
                "prefill",
                "stock",
                "over stock",
                "n",
                "decode step",
                "over stock",
                "over the best dense",
                "n",
            ],
            [
                [
                    *(
                        row["length"],
                        row["keys"],
                        row["dtype"],
                        seconds(row["prefill"]["sparse"]),
                        seconds(row["prefill"]["stock"]),
                    ),
                    *(
                        f"{row['prefill_speedup']:.2f}×",
                        row["prefill"]["sparse"]["n"],
                        seconds(row["decode"]["sparse"]),
                    ),
                    *(
                        f"{row['decode_speedup']:.2f}×",
                        f"{row['decode_speedup_over_best_dense']:.2f}×",
                        row["decode"]["sparse"]["n"],
                    ),
                ]
                for row in rows
            ],
        )


def training(results: dict[str, Any]) -> Iterator[Shown]:
    """Training steps against the stock model."""
    rows = [row for row in results.get("rows", []) if row.get("benchmark") == "training"]
    if rows:
        yield (
            "A training step of LoRA with gradient checkpointing and the loss in chunks, over stock SDPA. The recipe "
            "runs every fourth step dense. Memory: peak of a step over stock's.",
            [
                "tokens",
                "keys",
                "dtype",
                "sparse step",
                "recipe's average",
                "sparse step, memory",
                "dense step, memory",
                "n",
            ],
            [
                [
                    *(row["length"], row["budget"]["max_keys"], row["dtype"], spread(row["speedup"]["sparse"])),
                    *(spread(row["speedup"]["recipe"]), f"{row['memory_over_stock']['sparse']:.3f}×"),
                    *(f"{row['memory_over_stock']['dense step']:.3f}×", row["kinds"]["sparse"]["n"]),
                ]
                for row in rows
            ],
        )


def routers(results: dict[str, Any]) -> Iterator[Shown]:
    """Time of a router by rank, sampled queries and candidates."""
    rows = [row for row in results.get("rows", []) if row.get("benchmark") == "router"]
    if rows:
        yield (
            "Time of a layer's router, and its share of selection and attention together.",
            ["tokens", "dtype", "rank of stage 2", "sampled queries", "candidates", "router", "share"],
            [
                [
                    *(
                        row["length"],
                        row["dtype"],
                        row["index_dim"],
                        row["query_samples"],
                        f"{row['candidate_factor']:g}× the budget",
                    ),
                    *(seconds(row["times"]["router"]), f"{row['router_share']:.2f}"),
                ]
                for row in rows
            ],
        )


def run_times(results: dict[str, Any]) -> Iterator[Shown]:
    """How long the steps of a run took."""
    steps = {name: step for name, step in results.items() if isinstance(step, dict) and "seconds" in step}
    if "recipe" in results and "distill" in steps:
        rows = [
            [name, f"{step['seconds'] / 60:.1f} min", _megabytes(step.get("peak_process_bytes"))]
            for name, step in steps.items()
        ]
        yield (
            "Steps of the run, beside other jobs where LOG.md says so.",
            ["step", "time", "peak memory of the process"],
            rows,
        )


ALL = (layers, models, training, routers, run_times)
