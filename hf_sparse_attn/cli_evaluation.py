"""Verbs that measure a model: eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .cli_options import JsonOption, TextOption, command_line, console, emit, integers, load, sparse_options, windows_of


def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id or local folder of a sparse model.")],
    text: TextOption,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 4096,
    windows: Annotated[int, typer.Option(help="Number of windows.")] = 4,
    budgets: Annotated[str, typer.Option(help="Comma-separated budgets in keys.")] = "512,1024",
    selections: Annotated[str | None, typer.Option(help="Comma-separated selections; default all that need no fit.")] = None,
    decode_tokens: Annotated[int, typer.Option(help="Tokens fed through the cache one query a tile; 0 = none.")] = 0,
    sparse: Annotated[str, typer.Option(help="Fields of SparseAttentionConfig to change, e.g. 'query_samples: 32'.")] = "",
    report: Annotated[Path | None, typer.Option(help="Write the result as one HTML page to this path.")] = None,
    json_path: JsonOption = None,
) -> None:
    """Log-loss, kept mass and predictions of a model's routers against other selections at equal budget.

    The selection "two stages by threshold" is the model's own mass_threshold, at the budget that this was fitted for.
    """
    from .conversion import set_sparse_attention
    from .environment import Cost, environment
    from .evaluation.allocations import fitted_selectors
    from .evaluation.quality import evaluate_windows
    from .evaluation.selectors import fresh_routers, standard_selectors
    from .evaluation.shares import quality_table
    from .pipeline.recipe import SELECTIONS, Quality
    from .pipeline.report import write_evaluation_report

    names = SELECTIONS if selections is None else tuple(name.strip() for name in selections.split(","))
    checked = Quality(length, windows, tuple(integers(budgets, "--budgets")), decode_tokens, names)
    with Cost() as cost:
        loaded, tokenizer = load(model, None, "")
        config = set_sparse_attention(loaded, **sparse_options(sparse))
        known = standard_selectors(fresh_routers(loaded)) | fitted_selectors(config, names, checked.budgets)
        found = windows_of(text, tokenizer, length, windows, loaded)
        chosen = {name: known[name] for name in names}
        results = evaluate_windows(loaded, found, checked.budgets, chosen, decode_tokens=decode_tokens, on_result=_show)
    table = quality_table(results)
    _print_quality(table)
    made = {"model": Path(model).name, "command": command_line(), "environment": environment(), "sparse_attention": config.to_dict()}
    measured = {**made, **cost.figures, "table": table, "windows": [r.to_dict() for r in results]}
    if report is not None:
        write_evaluation_report(report, measured)
    emit(measured, json_path)


def _show(result: Any) -> None:
    console.print(result.line(), markup=False)


def _print_quality(rows: list[dict[str, Any]]) -> None:
    table = Table("tokens", "keys", "selection", "n", "log-loss", "share", "recovered share")
    for row in rows:
        share = f"{row['prefill_share']['share']:.2f}" if "prefill_share" in row else ""
        recovered = f"{row['recovered_share']['share']:.2f}" if "recovered_share" in row else ""
        table.add_row(
            str(row["length"]), str(row["keys"] or "all"), row["selection"], str(row["n"]), f"{row['prefill']:.4f}", share, recovered
        )
    console.print(table)
