"""Tables of quality: log-loss, KL, recovered share, answers, forecasts, planted links."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Shown = tuple[str, list[str], list[list[Any]]]  # what it shows, header, rows


def number(value: float | None, digits: int = 3) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def interval(row: dict[str, Any] | None, name: str, digits: int = 3) -> str | None:
    """A figure with its 95 % interval, if there is one."""
    if row is None or row.get(name) is None:
        return None
    low, high = row.get("low"), row.get("high")
    ends = "" if low is None or low == high else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{row[name]:.{digits}f}{ends}"


def selections(results: dict[str, Any]) -> Iterator[Shown]:
    """Selections at equal budget: the table of a run, of the verb ``eval``, or of several runs."""
    tables = [results.get("quality", results).get("table", [])] + [run["table"] for run in results.get("runs", [])]
    rows = [row for one in tables for row in one if "prefill" in row]
    if rows:
        header = [
            "tokens",
            "keys",
            "selection",
            "n",
            "log-loss",
            "share, window + sink to oracle",
            "KL from dense",
            "recovered share",
        ]
        header += ["recall", "5th percentile of kept mass"]
        yield (
            "Selections at equal budget. Log-loss and KL in nats a token, in brackets the 95 % interval over windows.",
            header,
            [[*_cell(row), *_closeness(row)] for row in rows],
        )


def _cell(row: dict[str, Any]) -> list[Any]:
    return [row["length"], row["keys"] or "all", row["selection"], row["n"], number(row["prefill"])]


def _closeness(row: dict[str, Any]) -> list[Any]:
    recovered = row.get("recovered_share")
    share = None if recovered is None else f"{recovered['share']:.3f} (worst layer {recovered['worst']:.3f})"
    return [
        interval(row.get("prefill_share"), "share"),
        number(row.get("kl")),
        share,
        number(row.get("recall")),
        number(row.get("low_mass")),
    ]


def comparison(results: dict[str, Any]) -> Iterator[Shown]:
    """Perplexity before and after the joint stage, over that of dense LoRA."""
    rows = results.get("comparison") or []
    if rows:
        yield (
            "Perplexity before and after the joint stage. The last columns divide by that of dense LoRA on the same "
            "rows.",
            [
                "tokens",
                "keys",
                "selection",
                "n",
                "before",
                "after",
                "over dense LoRA",
                "token by token, over dense LoRA",
            ],
            [
                [
                    *(row["length"], row["keys"] or "all", row["selection"], row["n"]),
                    *(number(row.get("perplexity_before")), number(row["perplexity_after"])),
                    *(
                        interval(row.get("over_reference"), "ratio"),
                        interval(row.get("decode_over_reference"), "ratio"),
                    ),
                ]
                for row in rows
            ],
        )


def answers(results: dict[str, Any]) -> Iterator[Shown]:
    """Answers that stand far back."""
    rows = results.get("quality", {}).get("answers") or []
    if rows:
        yield (
            "Answers, each task apart: log-loss above dense attention (nats a token, paired), share of right tokens, "
            "answers right in full.",
            ["task", "tokens", "keys", "selection", "n", "log-loss above dense", "right tokens", "right in full"],
            [
                [
                    *(row["task"], row["length"], row["keys"] or "all", row["selection"], row["n"]),
                    *(interval(row.get("loss_above_dense"), "mean"), number(row["accuracy"]), number(row["exact"], 2)),
                ]
                for row in rows
            ],
        )


def texts_and_lengths(results: dict[str, Any]) -> Iterator[Shown]:
    """Routers on kinds of text, and at lengths, that they were not trained on."""
    for name, what in (("domains", "Kinds of text"), ("lengths", "Lengths")):
        if results.get(name):
            yield (
                f"{what}: KL from dense attention (nats a token), and share of the way from window + sink to oracle.",
                ["text", "tokens", "keys", "selection", "n", "KL from dense", "share"],
                [
                    [
                        row["domain"],
                        row["length"],
                        row["keys"],
                        row["selection"],
                        row["n"],
                        number(row["kl"]),
                        interval(row["share"], "share"),
                    ]
                    for row in results[name]
                ],
            )


def fits(results: dict[str, Any]) -> Iterator[Shown]:
    """What thresholds on the estimated mass kept, and what they did to the log-loss."""
    rows = [(run, row) for run in results.get("runs", []) for row in run["table"] if "prefill_above_oracle" in row]
    if rows:
        yield (
            "Budgets that vary: keys kept on average, log-loss above that of the uniform oracle.",
            ["budget", "selection", "n", "keys kept", "log-loss above the oracle"],
            [
                [
                    run["budget"],
                    row["selection"],
                    row["n"],
                    number(row["kept"], 0),
                    interval(row["prefill_above_oracle"], "mean", 4),
                ]
                for run, row in rows
            ],
        )


def calibrated(results: dict[str, Any]) -> Iterator[Shown]:
    """What a calibration found and how it was checked."""
    table_rows = results.get("calibration")
    if table_rows:
        rows: list[list[Any]] = [["share of the keys that is kept", number(table_rows["fit"]["density"])]]
        rows += [
            [name.replace("_", " "), _value(value)] for name, value in table_rows["verified"].items() if _plain(value)
        ]
        rows += [["what the check says", failure] for failure in results["failures"] or ["passed"]]
        aim = (
            f"{table_rows['fit']['keys']} keys on average"
            if table_rows["mass"] is None
            else f"share {table_rows['mass']} of the mass"
        )
        yield (
            f"Found for {aim} at {table_rows['fit']['tokens']} tokens, checked on other texts.",
            ["", "figure"],
            rows,
        )


def _plain(value: Any) -> bool:
    return isinstance(value, int | float | str) or (isinstance(value, dict) and {"mean", "low", "high"} <= set(value))


def _value(value: Any) -> Any:
    return (
        interval(value, "mean", 4)
        if isinstance(value, dict)
        else number(value, 4)
        if isinstance(value, float)
        else value
    )


def tables_as_text(results: dict[str, Any]) -> Iterator[Shown]:
    """Tables that a task wrote as text itself."""
    for shown in results.get("tables", []):
        yield f"{shown['title']}. {shown['note']}", list(shown["columns"]), [list(row) for row in shown["rows"]]


def planted_links(results: dict[str, Any]) -> Iterator[Shown]:
    """Answers and routing of a LongLink study."""
    study = results.get("study", results)
    if "routing" not in study:
        return
    recall = study["routing"]["recall"]
    kept = f"{100 * study['density']:.1f} % of the visible keys kept"
    yield (
        f"Family {study['config']['family']}, {study['config']['length']} tokens, {kept}. Answers: 0 is chance, 1 the "
        "ceiling. Recall: of the blocks that hold the causes, above chance.",
        ["selection", "n", "answers", "recall"],
        [
            [
                row["selection"],
                row["n"],
                number(row["normalised"]),
                number(recall.get(row["selection"], {}).get("chance_adjusted_recall")),
            ]
            for row in study["answers"]
        ],
    )
    yield (
        "Average precision of the ranking, forced blocks aside.",
        ["queries", "router", "dense mass", "n"],
        [
            [name, number(row["average_precision"]), number(row["oracle_average_precision"]), row["n"]]
            for name, row in (("tiles", study["routing"]), ("single queries", study["routing_of_single_queries"]))
        ],
    )


def factors(results: dict[str, Any]) -> Iterator[Shown]:
    """One factor of the sparse attention at a time."""
    rows = [row for row in results.get("table", []) if "factor" in row]
    if rows:
        yield (
            "One factor at a time: KL from dense attention above the default's (nats a token), time over the "
            "default's.",
            ["factor", "level", "KL above the default's", "time over the default's", "verdict"],
            [
                [
                    row["factor"],
                    row["level"],
                    interval(row["kl_above"], "mean"),
                    interval(row.get("over_default"), "median", 2),
                    row["verdict"],
                ]
                for row in rows
            ],
        )


ALL = (selections, comparison, answers, texts_and_lengths, fits, calibrated, tables_as_text, planted_links, factors)
