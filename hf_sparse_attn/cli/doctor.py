"""The verb doctor: what is installed and used here, and whether a model still finds what stands far back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from ..system.extras import extra_states, needs_extra
from .options import (
    DtypeOption,
    JsonOption,
    check_causal_model,
    command_line,
    console,
    emit,
    integers,
    load,
    sparse_options,
)

with needs_extra("cli", "the command line"):
    import typer
    from rich.markup import escape
    from rich.table import Table


def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Hub id or local folder of a stock or sparse model, for --needles.")
    ] = None,
    needles: Annotated[
        bool, typer.Option("--needles", help="Hide facts in long texts and say which of them the model still finds.")
    ] = False,
    lengths: Annotated[
        str | None,
        typer.Option(help="Comma-separated tokens of a text with its question; default two that the model can read."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text file to hide the facts in; default the manual that Python brings.")
    ] = None,
    facts: Annotated[int, typer.Option(help="Facts in a text of each length.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the facts.")] = 0,
    sparse: Annotated[
        str, typer.Option(help="Fields of SparseAttentionConfig to change, e.g. 'candidate_factor: 12'.")
    ] = "",
    dtype: DtypeOption = "auto",
    json_path: JsonOption = None,
) -> None:
    """What is installed, which extras are missing, which implementation and which dtype would be used, and why.

    With --needles: facts are hidden in texts and asked for under dense and under sparse attention, with the model's own
    settings. A verdict says how many of those that dense attention finds are lost, and what to raise.
    """
    if needles:
        if model is None:
            raise ValueError(
                "--needles asks a model, and none is given: hf-sparse-attn doctor MODEL --needles, where MODEL is a "
                "folder or a Hub id"
            )
        emit(_needles(model, lengths, text, facts, seed, sparse, dtype), json_path)
        return
    if model is not None:
        raise ValueError(
            f"doctor looks at a model only with --needles: hf-sparse-attn doctor {model} --needles, or doctor alone "
            "for what is installed"
        )
    result = _installation()
    for key, value in result.items():
        console.print(f"[bold]{key}[/]: {escape(str(value))}", highlight=False)
    emit(result, json_path)


def _needles(
    model: str, lengths: str | None, text: Path | None, facts: int, seed: int, sparse: str, dtype: str
) -> dict[str, Any]:
    """Result of the check, which is also shown."""
    from ..data.text_documents import read_text
    from ..evaluation.needle_check import needle_check
    from ..models.convert import set_sparse_attention
    from ..system.environment import Cost, environment
    from ..system.precision import resolve

    # what can be wrong without the model's weights comes first
    chosen = None if lengths is None else integers(lengths, "--lengths")
    if text is not None and not text.is_file():
        raise ValueError(f"--text is {text}: there is no such file; give a text to hide the facts in")
    haystack = None if text is None else read_text(text)
    check_causal_model(model)
    with Cost() as cost:
        loaded, tokenizer = load(model, resolve(dtype, "cpu"), "")
        config = set_sparse_attention(loaded, **sparse_options(sparse))
        report = needle_check(loaded, tokenizer, lengths=chosen, facts=facts, seed=seed, text=haystack)
    # one line, whatever the width of the terminal
    console.print(report.verdict(), markup=False, highlight=False, soft_wrap=True)
    table = Table("tokens", "depth", "log-loss dense", "sparse", "")
    for reading in report.readings:
        losses = (f"{reading.dense:.3f}", f"{reading.sparse:.3f}")
        table.add_row(str(reading.length), f"{reading.depth:.0%}", *losses, reading.outcome)
    console.print(table)
    document: dict[str, Any] = {"model": Path(model).name, "command": command_line(), "environment": environment()}
    document |= {"dtype": str(loaded.dtype).removeprefix("torch."), "seed": seed, **cost.figures}
    document |= {"text": "pydoc_data.topics" if text is None else text.name, "sparse_attention": config.to_dict()}
    return {**document, "needles": report.to_dict()}


def _installation() -> dict[str, Any]:
    import torch
    from hf_sparse_attn_kernels import IMPLEMENTATIONS, default_choice
    from hf_sparse_attn_kernels.caching import cache_folder

    from ..architectures import supported_types
    from ..architectures.versions import SUPPORTED_TRANSFORMERS
    from ..models.self_test import run_self_test
    from ..system.environment import environment
    from ..system.precision import choice, linear_rates

    device = "cuda" if torch.cuda.is_available() else "cpu"
    implementation, why = default_choice(device)
    dtype = choice(device)
    return {
        **environment(),
        "device": device,
        "dtype": str(dtype.dtype).removeprefix("torch."),
        "why_dtype": dtype.why,
        "linear_layer_gflops": {name: round(rate / 1e9, 1) for name, rate in linear_rates(device).items()},
        "implementation": implementation,
        "implementations": list(IMPLEMENTATIONS),
        "why": f"{why}; inputs that it does not support run on 'torch'",
        "supported_transformers": [str(v) for v in SUPPORTED_TRANSFORMERS],
        "self_test": run_self_test() or "passed",
        "model_types": supported_types(),
        "extras": extra_states(),
        "offline": os.environ.get("HF_HUB_OFFLINE", "0"),
        "cache": str(cache_folder()),
    }
