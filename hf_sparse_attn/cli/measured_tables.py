"""What the verbs that measure a model print."""

from __future__ import annotations

from typing import Any

from ..system.extras import needs_extra
from .options import console

with needs_extra("cli", "the command line"):
    from rich.markup import escape
    from rich.table import Table


def summary_of(calibration: Any) -> str:
    verified = calibration.verified
    within = (
        ""
        if calibration.mass is None
        else f"{verified['heads_within']:.1%} of the heads within {calibration.mass} − 0.01, "
    )
    return f"{verified['density']:.1%} of the keys are kept, {within}log-loss {verified['added_loss']:+.2%}"


def show_result(result: Any) -> None:
    console.print(result.line(), markup=False)


def print_quality(rows: list[dict[str, Any]]) -> None:
    table = Table("tokens", "keys", "selection", "n", "log-loss", "share", "recovered share")
    for row in rows:
        share = f"{row['prefill_share']['share']:.2f}" if "prefill_share" in row else ""
        recovered = f"{row['recovered_share']['share']:.2f}" if "recovered_share" in row else ""
        table.add_row(
            str(row["length"]),
            # dense attention has no budget
            str(row["keys"] or "all"),
            row["selection"],
            str(row["n"]),
            f"{row['prefill']:.4f}",
            share,
            recovered,
        )
    console.print(table)


def print_tables(tables: list[dict[str, Any]]) -> None:
    for shown in tables:
        table = Table(*map(escape, shown["columns"]), title=escape(shown["title"]))
        for row in shown["rows"]:
            table.add_row(*map(escape, row))
        console.print(table)


def print_links(results: dict[str, Any]) -> None:
    table = Table("selection", "accuracy", "normalised", "D50", "D90", "recall above chance")
    for row in results["answers"]:
        recall = results["routing"]["recall"].get(row["selection"], {}).get("chance_adjusted_recall")
        figures = (
            f"{row['accuracy']:.3f} ± {row['error']:.3f}",
            "" if row["normalised"] is None else f"{row['normalised']:.3f}",
        )
        table.add_row(
            row["selection"], *figures, str(row["d50"]), str(row["d90"]), "" if recall is None else f"{recall:.3f}"
        )
    console.print(table)
