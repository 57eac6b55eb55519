"""Verbs that measure a model: eval, lm-eval, calibrate."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from ..system.extras import needs_extra, require_extra
from .measured_tables import print_quality, print_tables, show_result, summary_of
from .options import (
    ImportOption,
    JsonOption,
    ReportOption,
    SavedDtypeOption,
    TextOption,
    command_line,
    console,
    emit,
    integers,
    load,
    load_uncalibrated,
    reserving,
    run_selector_file,
    sparse_options,
    windows_of,
)

with needs_extra("cli", "the command line"):
    import typer

SparseOption = Annotated[str, typer.Option(help="Fields of SparseAttentionConfig to change, e.g. 'query_samples: 32'.")]
SelectionsOption = Annotated[
    str | None,
    typer.Option(help="Comma-separated selections, with oracle and window + sink; default all that need no fit."),
]
HARNESS_SELECTIONS = "oracle, two stages, window + sink"
QUESTIONS = 4  # with a planted link, of each window that a calibration is checked on


def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id or local folder of a sparse model.")],
    text: TextOption,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 4096,
    windows: Annotated[int, typer.Option(help="Number of windows.")] = 4,
    budgets: Annotated[str, typer.Option(help="Comma-separated budgets in keys.")] = "512,1024",
    selections: SelectionsOption = None,
    selector_file: ImportOption = None,
    decode_tokens: Annotated[int, typer.Option(help="Tokens fed through the cache one query a tile; 0 = none.")] = 0,
    sparse: SparseOption = "",
    dtype: SavedDtypeOption = "auto",
    report: ReportOption = None,
    json_path: JsonOption = None,
) -> None:
    """Log-loss, kept mass and predictions of a model's routers against other selections at equal budget.

    The selection "two stages by threshold" is the model's own mass_threshold, at the budget that this was fitted for.
    """
    from ..evaluation.baselines import make_selectors, selector_names
    from ..evaluation.quality import evaluate_windows
    from ..evaluation.statistics import quality_table
    from ..experiments.recipe import Quality
    from ..experiments.reports.html_report import write_evaluation_report
    from ..experiments.scores.budget_allocation import fitted_selectors
    from ..models.convert import set_sparse_attention
    from ..system.environment import Cost, environment

    # first, as it may register names that are asked for
    run_selector_file(selector_file)
    names = selector_names() if selections is None else tuple(name.strip() for name in selections.split(","))
    checked = Quality(length, windows, tuple(integers(budgets, "--budgets")), decode_tokens, names)
    with Cost() as cost:
        loaded, tokenizer = load(model, dtype, "")
        config = set_sparse_attention(loaded, **sparse_options(sparse))
        fitted = fitted_selectors(config, names, checked.budgets)
        rows = windows_of(text, tokenizer, length, windows, loaded)
        # those fitted for this model join the known ones; the order is that of the names
        known = make_selectors(name for name in names if name not in fitted) | fitted
        chosen = {name: known[name] for name in names}
        results = evaluate_windows(
            loaded, rows, checked.budgets, chosen, decode_tokens=decode_tokens, on_result=show_result
        )
    table = quality_table(results)
    print_quality(table)
    document = {
        "model": Path(model).name,
        "command": command_line(),
        "environment": environment(),
        "sparse_attention": config.to_dict(),
    }
    measured = {**document, **cost.figures, "table": table, "windows": [r.to_dict() for r in results]}
    emit(measured, json_path, None if report is None else partial(write_evaluation_report, report, measured))


def harness(
    model: Annotated[str, typer.Argument(help="Hub id or local folder of a sparse model.")],
    tasks: Annotated[
        str, typer.Option(help="Comma-separated tasks, groups or tags of lm-eval, e.g. niah_single_1,ruler_vt.")
    ],
    limit: Annotated[int, typer.Option(help="Documents of a task.")] = 8,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a question, for tasks that make their own (RULER).")
    ] = None,
    budgets: Annotated[str, typer.Option(help="Comma-separated budgets in keys.")] = "512",
    selections: Annotated[
        str, typer.Option(help="Comma-separated selections beside dense attention.")
    ] = HARNESS_SELECTIONS,
    selector_file: ImportOption = None,
    sparse: SparseOption = "",
    dtype: SavedDtypeOption = "auto",
    seed: Annotated[int, typer.Option(help="Of the questions that tasks make.")] = 0,
    include: Annotated[Path | None, typer.Option(help="Folder of tasks of one's own, YAML as lm-eval has it.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of answers that are not made again when a run is continued.")
    ] = None,
    report: ReportOption = None,
    json_path: JsonOption = None,
) -> None:
    """Scores of the lm-evaluation-harness under dense attention and other selections; needs the extra [lm-eval]."""
    from importlib.metadata import version

    from ..evaluation.baselines import make_selectors
    from ..evaluation.lm_eval_harness import harness_rows, harness_table, harness_tables, load_tasks
    from ..experiments.reports.html_report import write_harness_report
    from ..models.convert import set_sparse_attention
    from ..system.environment import Cost, environment

    require_extra("lm-eval", "the verb lm-eval")
    keys = integers(budgets, "--budgets")
    if limit < 1:
        raise ValueError(f"--limit is {limit}: must be an integer >= 1")
    run_selector_file(selector_file)
    chosen = make_selectors(name.strip() for name in selections.split(","))
    with Cost() as cost:
        loaded, tokenizer = load(model, dtype, "")
        config = set_sparse_attention(loaded, **sparse_options(sparse))
        loaded_tasks = load_tasks([name.strip() for name in tasks.split(",")], model, length, seed, include)
        rows = harness_rows(loaded, tokenizer, loaded_tasks, limit, keys, chosen, cache=cache)
    scores = harness_table(rows)
    tables = harness_tables(scores)
    print_tables(tables)
    document: dict[str, Any] = {"model": Path(model).name, "command": command_line(), "environment": environment()}
    document |= {"lm_eval": version("lm_eval"), "sparse_attention": config.to_dict(), "seed": seed, **cost.figures}
    document |= {"tables": tables, "scores": scores, "rows": rows}
    emit(document, json_path, None if report is None else partial(write_harness_report, report, document))


@reserving("folder", creates=False)
def calibrate(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved sparse model; the calibration is written into it.")],
    text: TextOption,
    held_out: Annotated[str, typer.Option(help="Sources of other texts, on which the budgets are checked; as --text.")],
    preset: Annotated[
        str, typer.Option(help="fast, balanced or safe: 95 % of the tiles keep 0.95, 0.98 or 0.99 of their mass.")
    ] = "balanced",
    mass: Annotated[
        float | None, typer.Option(help="That share itself, in (0, 1], in place of a preset; 1 = dense.")
    ] = None,
    keys: Annotated[
        int | None, typer.Option(help="In place of both: an average budget, shared out over layers and KV heads.")
    ] = None,
    length: Annotated[
        int, typer.Option(help="Tokens of a window: the longest input that the budgets are found for.")
    ] = 8192,
    windows: Annotated[int, typer.Option(help="Windows on which the budgets are found.")] = 10,
    checked: Annotated[int, typer.Option(help="Windows on which they are checked.")] = 4,
    dtype: SavedDtypeOption = "auto",
    report: ReportOption = None,
    json_path: JsonOption = None,
) -> None:
    """Find the smallest safe budget of every layer, KV head and length, check it, and store it beside the model's
    config.

    Nothing is written into the folder if a check fails; what was found is stored there before it is reported.
    """
    from ..data.questions import ask
    from ..evaluation.calibrate import PRESETS, failures
    from ..evaluation.calibrate import calibrate as find
    from ..experiments.reports.html_report import write_calibration_report
    from ..models.calibration import FILE, CalibrationError, write_calibration
    from ..system.environment import Cost, environment
    from ..system.outputs import check_output

    if preset not in PRESETS:
        raise ValueError(f"--preset is {preset!r}: must be {', '.join(PRESETS)}")
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is no folder of a saved model: save the sparse model first, e.g. with hf-sparse-attn distill"
        )
    for file in (FILE, "config.json"):
        check_output(folder / file)
    with Cost() as cost:
        loaded, tokenizer = load_uncalibrated(folder, dtype)
        rows = windows_of(text, tokenizer, length, windows, loaded)
        others = windows_of(held_out, tokenizer, length, checked, loaded)
        # a preset is a name for a mass; a mass or keys of one's own have no name
        share, name = (PRESETS[preset], preset) if mass is None and keys is None else (mass, None)
        # several questions of each window: another passage by each seed
        questions = [question for seed in range(QUESTIONS) for question in ask(others, tokenizer, seed)]
        calibration = find(loaded, rows, others, questions, mass=share, keys=keys, preset=name, on_step=console.print)
    missed = failures(calibration)
    result: dict[str, Any] = {
        "model": folder.absolute().name,
        "command": command_line(),
        "environment": environment(),
        **cost.figures,
    }
    result |= {"calibration": calibration.to_dict(), "failures": missed}
    try:
        if not missed:
            write_calibration(folder, calibration)
            console.print(f"{summary_of(calibration)}: {folder}", highlight=False, markup=False)
    finally:
        # also where writing fails: what was found is reported
        emit(result, json_path, None if report is None else partial(write_calibration_report, report, result))
    if missed:
        raise CalibrationError(f"{folder} was not calibrated: {'; '.join(missed)}")
