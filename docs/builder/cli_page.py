"""``docs/cli.md``: every verb of the command line with its arguments and options, from the typer app."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .markdown import cell, table

PROGRAM = "hf-sparse-attn"
KINDS = {"int": "number", "float": "number", "Path": "path", "str": "text"}  # by what stands in the annotation
INTRODUCTION = f"""# Command line

`pip install 'hf_sparse_attn[cli]'` brings the program `{PROGRAM}`; `python -m hf_sparse_attn.cli` is the same.
This page is written by `python docs/generate.py` from the program itself.

* Every verb takes `--json PATH`. `-` is standard output.
* Options that take lists are comma-separated.
* An error is one paragraph on standard error, and the exit code 1. `HF_SPARSE_ATTN_DEBUG=1` shows the traceback.
* A stopped command continues when the same command is given again, where it says so below.
* Without a terminal, long work prints a line at its start, at its end, and twice a minute.
"""


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(verb, click command) of all verbs, by name; those of a group follow it."""
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def application() -> Any:
    """The click command of the whole program."""
    import typer

    from hf_sparse_attn.cli.commands import app

    return typer.main.get_command(app)


def page() -> str:
    """The page, of all verbs."""
    lines = INTRODUCTION.splitlines()
    verbs = list(commands(application()))
    lines += ["", *(f"* [{verb}](#{_anchor(verb)})" for verb, _ in verbs)]
    for verb, command in verbs:
        lines += ["", f"## {verb}", "", *_section(verb, command)]
    return "\n".join(lines).rstrip() + "\n"


def _anchor(verb: str) -> str:
    return verb.replace(" ", "-")


def _section(verb: str, command: Any) -> list[str]:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [
        parameter for parameter in command.params if parameter.param_type_name == "option" and not parameter.hidden
    ]
    usage = " ".join([PROGRAM, verb, *(_argument(parameter) for parameter in arguments), "[OPTIONS]"])
    lines = [*_text(command.help), "", "```sh", usage, "```", ""]
    rows = [[f"`{_argument(parameter)}`", "", "", _plain(parameter.help)] for parameter in arguments]
    rows += [
        [
            ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts)),
            _kind(parameter),
            "required" if parameter.required else _default(parameter),
            _plain(parameter.help),
        ]
        for parameter in options
        if parameter.name != "help"
    ]
    return [*lines, *table(["option", "value", "default", "what"], rows), ""]


def _argument(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name).strip("[]{}").upper()
    return name if parameter.required else f"[{name}]"


def _kind(parameter: Any) -> str:
    if parameter.is_flag:
        return "flag"
    shown = str(parameter.type_descriptor.annotation)
    kind = next(name for part, name in KINDS.items() if part in shown)
    return f"{kind}, repeatable" if parameter.multiple else kind


def _default(parameter: Any) -> str:
    value = parameter.default
    return "" if value in (None, False, "", ()) or callable(value) else f"`{value}`"


def _text(text: str | None) -> list[str]:
    paragraphs = (text or "").strip().split("\n\n")
    return "\n\n".join(_plain(paragraph) for paragraph in paragraphs).splitlines()


def _plain(text: str | None) -> str:
    """Help as Markdown: one line, single backquotes, and signs that Markdown reads as they are."""
    line = re.sub(r"``(.+?)``", r"`\1`", cell(text).replace("\\[", "["))
    return line.replace("*", r"\*").replace("<", "&lt;")
