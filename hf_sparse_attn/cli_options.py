"""What the verbs of the command line share: options, parsing, loading, output."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console(stderr=True)

JsonOption = Annotated[str | None, typer.Option("--json", help="Write the result as JSON to this path ('-' = standard output).")]
TextOption = Annotated[str, typer.Option("--text", help="Comma-separated sources: files, globs, pypi:…, deb:… or hub:….")]


def emit(result: dict[str, Any], target: str | None) -> None:
    """Write ``result`` as JSON where ``--json`` says."""
    if target is None:
        return
    if target == "-":
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        from .files import write_json

        write_json(target, result)


def command_line() -> str:
    """The command that this process was called with, as one would type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def integers(text: str, option: str) -> list[int]:
    """The integers of a comma-separated option, at least one."""
    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"{option} is {text!r}: must be integers separated by commas") from error
    if not values:
        raise ValueError(f"{option} is empty: give at least one integer")
    return values


def sparse_options(text: str) -> dict[str, Any]:
    """Fields of a `SparseAttentionConfig`, as ``--sparse`` gives them."""
    return yaml_fields(text, "--sparse")


def yaml_fields(text: str, option: str) -> dict[str, Any]:
    """Fields of a configuration, as written inside the braces of a YAML mapping."""
    import yaml

    try:
        loaded: dict[str, Any] = yaml.safe_load("{" + text + "}")
    except yaml.YAMLError as error:
        raise ValueError(f"{option} is {text!r}: must be fields like 'min_keys: 1024, max_keys: 1024'") from error
    return loaded


def dtype_of(name: str) -> Any:
    """The torch dtype of that name."""
    import torch

    from .pipeline.recipe import DTYPES

    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return getattr(torch, name)


def load(model: str, dtype: str | None, sparse: str) -> tuple[Any, Any]:
    """(sparse model in eval mode, tokenizer); a stock model gets fresh routers with ``sparse`` fields."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype_of(dtype)}
    if getattr(AutoConfig.from_pretrained(model), "sparse_attention", None) is None or sparse:
        options["sparse_attention"] = {"min_keys": 512, **sparse_options(sparse)}
    return AutoModelForCausalLM.from_pretrained(model, **options).eval(), AutoTokenizer.from_pretrained(model)


def load_uncalibrated(folder: Path) -> tuple[Any, Any]:
    """(sparse model of a folder in eval mode, without a calibration that it may have, tokenizer)."""
    from dataclasses import replace

    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from .config import SparseAttentionConfig

    values = getattr(AutoConfig.from_pretrained(folder), "sparse_attention", None)
    if values is None:
        raise ValueError(f"{folder} holds no sparse model: its config.json has no sparse_attention")
    config = SparseAttentionConfig.coerce(values)
    config = replace(config, bookkeeping=replace(config.bookkeeping, calibration=None))
    loaded = AutoModelForCausalLM.from_pretrained(folder, sparse_attention=config)
    return loaded.eval(), AutoTokenizer.from_pretrained(folder)


def windows_of(text: str, tokenizer: Any, length: int, count: int, model: Any) -> Any:
    """``count`` windows of ``length`` tokens of the sources ``text``, whole blocks of ``model``."""
    from .config import SparseAttentionConfig
    from .data.sources import read_documents
    from .data.windows import token_windows

    block_size = SparseAttentionConfig.coerce(model.config.sparse_attention).block_size
    return token_windows(read_documents([part.strip() for part in text.split(",")]), tokenizer, length, count, block_size)
