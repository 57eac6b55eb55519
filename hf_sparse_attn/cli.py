"""Command line ``hf-sparse-attn``: run, distill, eval, bench, doctor."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Learnable two-stage sparse attention for pretrained models.")
console = Console(stderr=True)

JsonOption = Annotated[str | None, typer.Option("--json", help="Write the result as JSON to this path ('-' = standard output).")]
TextOption = Annotated[str, typer.Option("--text", help="Comma-separated sources: files, globs, pypi:…, deb:… or hub:….")]


def _emit(result: dict[str, Any], target: str | None) -> None:
    if target is None:
        return
    if target == "-":
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        from .files import write_json

        write_json(target, result)


def _integers(text: str, option: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"{option} is {text!r}: must be integers separated by commas") from error
    if not values:
        raise ValueError(f"{option} is empty: give at least one integer")
    return values


def _sparse_options(text: str) -> dict[str, Any]:
    import yaml

    try:
        loaded: dict[str, Any] = yaml.safe_load("{" + text + "}")
    except yaml.YAMLError as error:
        raise ValueError(f"--sparse is {text!r}: must be fields like 'min_keys: 1024, max_keys: 1024'") from error
    return loaded


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/<recipe name>.")] = None,
    json_path: JsonOption = None,
) -> None:
    """Run a recipe: convert, distil, fine-tune, evaluate, measure, save, reload. Continues an interrupted run."""
    from .pipeline.recipe import load_recipe
    from .pipeline.run import run_recipe

    loaded = load_recipe(recipe)
    _emit(run_recipe(loaded, out or Path("runs") / loaded.name, console), json_path)


@app.command()
def distill(
    model: Annotated[str, typer.Argument(help="Hub id or local folder of a stock or sparse model.")],
    out: Annotated[Path, typer.Argument(help="Folder to save the sparse model in.")],
    text: TextOption,
    sparse: Annotated[str, typer.Option(help="Fields of SparseAttentionConfig, e.g. 'min_keys: 1024, max_keys: 1024'.")] = "",
    context: Annotated[int, typer.Option(help="Tokens of a training window.")] = 4096,
    batches: Annotated[int, typer.Option(help="Training windows.")] = 16,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    json_path: JsonOption = None,
) -> None:
    """Train the routers of a model on its own dense attention and save it; resumes from OUT/distill.pt."""
    from .data.windows import batches as to_batches
    from .training.distillation import distill as train

    loaded, tokenizer = _load(model, dtype, sparse)
    windows = _windows(text, tokenizer, context, batches, loaded)
    report = train(loaded, to_batches(windows), checkpoint=out / "distill.pt")
    loaded.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "distill.pt").unlink()
    _emit(report.to_dict(), json_path)


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id or local folder of a sparse model.")],
    text: TextOption,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 4096,
    windows: Annotated[int, typer.Option(help="Number of windows.")] = 4,
    budgets: Annotated[str, typer.Option(help="Comma-separated budgets in keys.")] = "512,1024",
    selections: Annotated[str, typer.Option(help="Comma-separated selections.")] = "oracle,two stages,stage 1 alone,window + sink",
    decode_tokens: Annotated[int, typer.Option(help="Tokens fed through the cache one query a tile; 0 = none.")] = 0,
    json_path: JsonOption = None,
) -> None:
    """Log-loss and kept mass of a model's routers against other selections at equal budget."""
    from .evaluation.quality import evaluate_windows
    from .evaluation.selectors import fresh_routers, standard_selectors
    from .evaluation.shares import quality_table
    from .pipeline.recipe import Quality

    names = tuple(name.strip() for name in selections.split(","))
    checked = Quality(length, windows, tuple(_integers(budgets, "--budgets")), decode_tokens, names)
    loaded, tokenizer = _load(model, None, "")
    known = standard_selectors(fresh_routers(loaded))
    found = _windows(text, tokenizer, length, windows, loaded)
    results = evaluate_windows(loaded, found, checked.budgets, {n: known[n] for n in names}, decode_tokens=decode_tokens, on_result=_show)
    table = quality_table(results)
    _print_quality(table)
    _emit({"table": table, "windows": [r.to_dict() for r in results]}, json_path)


@app.command()
def bench(
    lengths: Annotated[str, typer.Option(help="Comma-separated numbers of tokens.")] = "16384",
    keys: Annotated[int, typer.Option(help="Keys kept.")] = 1024,
    dtypes: Annotated[str, typer.Option(help="Comma-separated: bfloat16, float32, float16.")] = "bfloat16",
    repeats: Annotated[int, typer.Option(help="Alternating runs of dense and sparse.")] = 5,
    model: Annotated[str | None, typer.Option(help="Also measure this sparse model end to end (needs --text).")] = None,
    text: Annotated[str | None, typer.Option("--text", help="Comma-separated sources for --model.")] = None,
    json_path: JsonOption = None,
) -> None:
    """Speed and memory against dense attention in one run, router included, output verified first."""
    import torch

    from .pipeline.environment import environment
    from .profiling import bench_attention, bench_model

    result: dict[str, Any] = {"environment": environment(), "attention": [], "model": []}
    table = Table("tokens", "dtype", "speed-up", "min–max", "ideal", "extra MB")
    for length in _integers(lengths, "--lengths"):
        for dtype in dtypes.split(","):
            row = bench_attention(length, keys, _dtype(dtype), repeats=repeats)
            result["attention"].append(row)
            s = row["speedup"]
            extra = f"{row['extra_bytes'] / 2**20:.0f}"
            table.add_row(str(length), dtype, f"{s['median']:.2f}", f"{s['min']:.2f}–{s['max']:.2f}", f"{row['ideal_speedup']:.2f}", extra)
        if model is not None:
            if text is None:
                raise ValueError("--model needs --text: name the text that the model reads")
            loaded, tokenizer = _load(model, None, "")
            ids = torch.cat([w.ids for w in _windows(text, tokenizer, 1024, -(-(length + 16) // 1024), loaded)], 1)[:, : length + 16]
            result["model"].append(bench_model(loaded, ids, keys))
    console.print(table)
    _emit(result, json_path)


@app.command()
def doctor(json_path: JsonOption = None) -> None:
    """What is installed, which implementation would be used, and why."""
    import torch
    from hf_sparse_attn_kernels import IMPLEMENTATIONS, default_implementation

    from .data.sources import cache_folder
    from .pipeline.environment import environment
    from .registration import SUPPORTED_MODEL_TYPES
    from .versions import SUPPORTED_TRANSFORMERS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    reasons = {
        "triton": "a GPU, and triton is installed; inputs that its kernels do not support run on 'torch'",
        "torch": "bounded memory on every torch device; 'triton' needs a GPU and its package, 'reference' is the slow specification",
    }
    result = {
        **environment(),
        "device": device,
        "implementation": default_implementation(device),
        "implementations": list(IMPLEMENTATIONS),
        "why": reasons[default_implementation(device)],
        "supported_transformers": [str(v) for v in SUPPORTED_TRANSFORMERS],
        "model_types": list(SUPPORTED_MODEL_TYPES),
        "offline": os.environ.get("HF_HUB_OFFLINE", "0"),
        "cache": str(cache_folder()),
    }
    for key, value in result.items():
        console.print(f"[bold]{key}[/]: {value}", highlight=False)
    _emit(result, json_path)


def _dtype(name: str) -> Any:
    import torch

    from .pipeline.recipe import DTYPES

    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return getattr(torch, name)


def _load(model: str, dtype: str | None, sparse: str) -> tuple[Any, Any]:
    """(sparse model in eval mode, tokenizer); a stock model gets fresh routers with ``sparse`` fields."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {} if dtype is None else {"dtype": _dtype(dtype)}
    if getattr(AutoConfig.from_pretrained(model), "sparse_attention", None) is None or sparse:
        options["sparse_attention"] = {"min_keys": 512, **_sparse_options(sparse)}
    return AutoModelForCausalLM.from_pretrained(model, **options).eval(), AutoTokenizer.from_pretrained(model)


def _windows(text: str, tokenizer: Any, length: int, count: int, model: Any) -> Any:
    from .config import SparseAttentionConfig
    from .data.sources import read_documents
    from .data.windows import token_windows

    block_size = SparseAttentionConfig.coerce(model.config.sparse_attention).block_size
    return token_windows(read_documents([part.strip() for part in text.split(",")]), tokenizer, length, count, block_size)


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


def guarded(command: Callable[[], Any]) -> int:
    """Run ``command``; a user's mistake becomes one paragraph on standard error and exit code 1."""
    try:
        command()
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        if os.environ.get("HF_SPARSE_ATTN_DEBUG"):
            raise
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; run the same command again to continue")
        return 130
    return 0


def main() -> None:
    """Entry point of ``hf-sparse-attn``."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.exit(guarded(app))


if __name__ == "__main__":
    main()
