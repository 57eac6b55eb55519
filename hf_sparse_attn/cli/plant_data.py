"""The verb prep: files of a plant -> a prepared folder and a report on its health."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

from ..system.extras import needs_extra
from .options import JsonOption, command_line, console, emit, reserving

with needs_extra("cli", "the command line"):
    import typer

LANGUAGES = ("en", "ja")


@reserving("out")
def prep(
    files: Annotated[list[str], typer.Argument(help="Files and quoted globs: CSV, Parquet, JSON lines, logs.")],
    out: Annotated[Path, typer.Option(help="Folder for the prepared data and the report; replaced as a whole.")],
    zone: Annotated[
        str | None, typer.Option(help="Zone of times without an offset, such as Europe/Berlin; default UTC.")
    ] = None,
    day_first: Annotated[
        bool | None,
        typer.Option("--day-first/--month-first", help="How 05/06/2024 is read; default told from all dates."),
    ] = None,
    time_format: Annotated[
        str | None,
        typer.Option(
            help="Format of strftime, or epoch-s, epoch-ms, epoch-us, epoch-ns, excel, filetime, ticks, compact."
        ),
    ] = None,
    year: Annotated[
        int | None, typer.Option(help="Year of the first line of logs without one; default by the file's last change.")
    ] = None,
    asset: Annotated[
        list[str] | None,
        typer.Option(help="NAME=GLOB: files of one machine; default a machine a file. Can be repeated."),
    ] = None,
    asset_column: Annotated[str | None, typer.Option(help="Column that names the machine of each row.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="ROLE=NAME of time, channel, value, unit, text, level or origin. Can be repeated."),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(help="csv-wide, csv-long, csv-events, parquet-wide, parquet-long, jsonl, text or otel."),
    ] = None,
    encoding: Annotated[str | None, typer.Option(help="Such as utf-8, cp932 or cp1252; default told.")] = None,
    max_bad_share: Annotated[float, typer.Option(help="Share of lines that may be unreadable.")] = 0.01,
    language: Annotated[str, typer.Option(help="Of the report: en or ja.")] = "en",
    json_path: JsonOption = None,
) -> None:
    """Read logs and sensor records of a plant, check them, and write a tidy dataset with a report on its health.

    Every row keeps its file and line. Exit code 0: fine, 1: warnings, 2: unusable. An interrupted call continues.
    """
    from ..industry.preparation.ingest_settings import Form, IngestSettings
    from ..industry.preparation.prepare import prepare, refuse_other_folder

    if language not in LANGUAGES:
        raise ValueError(f"--language is {language!r}: give one of {', '.join(LANGUAGES)}")
    settings = IngestSettings(
        zone=zone,
        day_first=day_first,
        time_format=time_format,
        year=year,
        assets=_globs(asset or []),
        asset_column=asset_column,
        columns=dict(_pair(text, "--column") for text in column or []),
        form=cast(Form | None, form),
        encoding=encoding,
        max_bad_share=max_bad_share,
    )
    refuse_other_folder(out)
    health = prepare(files, out, settings, cast(Literal["ja", "en"], language), shown=True)
    console.print(f"{out / 'health.html'}: {STATES[health.status]}", highlight=False, markup=False, soft_wrap=True)
    emit(_result(out, health), json_path)
    raise typer.Exit(health.status)


STATES = ("fine", "usable with warnings", "unusable")


def _result(out: Path, health: Any) -> dict[str, Any]:
    from ..system.files import read_json

    return {"command": command_line(), "out": str(out), "status": health.status, **read_json(out / "health.json")}


def _globs(texts: list[str]) -> dict[str, tuple[str, ...]]:
    globs: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, glob = _pair(text, "--asset")
        globs[name] = (*globs.get(name, ()), glob)
    return globs


def _pair(text: str, option: str) -> tuple[str, str]:
    name, mark, value = text.partition("=")
    if not mark or not name.strip() or not value.strip():
        raise ValueError(f"{option} is {text!r}: write NAME=VALUE, such as {option} {EXAMPLES[option]}")
    return name.strip(), value.strip()


EXAMPLES = {"--asset": "'press=press_*.csv'", "--column": "time=Zeitstempel"}
