"""The verb prep: files of a plant -> a prepared folder and a report on its health."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

from ..system.extras import needs_extra
from .options import JsonOption, command_line, console, emit, reserving, yaml_fields

with needs_extra("cli", "the command line"):
    import typer

LANGUAGES = ("en", "ja")
STATES = ("fine", "usable with warnings", "unusable")  # by exit code
EXAMPLES = {"--asset": "'press=press_*.csv'", "--column": "time=Zeitstempel"}


ZoneOption = Annotated[
    str | None, typer.Option(help="Zone of times without an offset, such as Europe/Berlin; default UTC.")
]
DayFirstOption = Annotated[
    bool | None,
    typer.Option("--day-first/--month-first", help="How 05/06/2024 is read; default told from all dates."),
]
TimeFormatOption = Annotated[
    str | None,
    typer.Option(help="Format of strftime, or epoch-s, epoch-ms, epoch-us, epoch-ns, excel, filetime, ticks, compact."),
]
YearOption = Annotated[
    int | None, typer.Option(help="Year of the first line of logs without one; default by the file's last change.")
]
AssetOption = Annotated[
    list[str] | None,
    typer.Option(help="NAME=GLOB: files of one machine; default a machine a file. Can be repeated."),
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(help="ROLE=NAME of time, channel, value, unit, text, level or origin. Can be repeated."),
]
FormOption = Annotated[
    str | None, typer.Option(help="csv-wide, csv-long, csv-events, the same of parquet, jsonl, text or otel.")
]
AnalysisOption = Annotated[
    str,
    typer.Option(
        help="Fields of AnalysisSettings, such as 'context: 86400, correct_clocks: true, state_names: {load: running}'."
    ),
]


@reserving("out")
def prep(
    files: Annotated[list[str], typer.Argument(help="Files and quoted globs: CSV, Parquet, JSON lines, logs.")],
    out: Annotated[Path, typer.Option(help="Folder for the prepared data and the report; replaced as a whole.")],
    zone: ZoneOption = None,
    day_first: DayFirstOption = None,
    time_format: TimeFormatOption = None,
    year: YearOption = None,
    asset: AssetOption = None,
    asset_column: Annotated[str | None, typer.Option(help="Column that names the machine of each row.")] = None,
    column: ColumnOption = None,
    form: FormOption = None,
    encoding: Annotated[str | None, typer.Option(help="Such as utf-8, cp932 or cp1252; default told.")] = None,
    max_bad_share: Annotated[float, typer.Option(help="Share of lines that may be unreadable.")] = 0.01,
    analysis: AnalysisOption = "",
    language: Annotated[str, typer.Option(help="Of the report: en or ja.")] = "en",
    json_path: JsonOption = None,
) -> None:
    """Read logs and sensor records of a plant, check them, and write a tidy dataset with a report on its health.

    Every row keeps its file and line. Exit code 0: fine, 1: warnings, 2: unusable. An interrupted call continues.
    """
    from ..industry.preparation.analysis import AnalysisSettings
    from ..industry.preparation.ingest_settings import IngestSettings
    from ..industry.preparation.prepare import prepare

    if language not in LANGUAGES:
        raise ValueError(f"--language is {language!r}: give one of {', '.join(LANGUAGES)}")
    options = {"zone": zone, "day_first": day_first, "time_format": time_format, "year": year, "form": form}
    columns = dict(_pair(text, "--column") for text in column or [])
    settings = IngestSettings(
        **cast(dict[str, Any], options),
        assets=_globs(asset or []),
        asset_column=asset_column,
        columns=columns,
        encoding=encoding,
        max_bad_share=max_bad_share,
    )
    chosen = _analysis_settings(AnalysisSettings, analysis)
    health = prepare(files, out, settings, cast(Literal["ja", "en"], language), analysis=chosen, shown=True)
    console.print(f"{out / 'health.html'}: {STATES[health.status]}", highlight=False, markup=False, soft_wrap=True)
    emit(_result(out, health), json_path)
    raise typer.Exit(health.status)


def _result(out: Path, health: Any) -> dict[str, Any]:
    from ..system.files import read_json

    return {"command": command_line(), "out": str(out), "status": health.status, **read_json(out / "health.json")}


def _analysis_settings(cls: Any, text: str) -> Any:
    try:
        return cls(**yaml_fields(text, "--analysis"))
    except TypeError as error:  # a field that there is not
        raise ValueError(f"--analysis {text!r}: {error}") from error


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
