"""The verb pilot: does far history help on the data of a plant, and what do simple detectors reach?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

from ..system.extras import needs_extra
from .options import JsonOption, checked_output, command_line, console, emit

with needs_extra("cli", "the command line"):
    import typer
    from rich.markup import escape
    from rich.table import Table

if TYPE_CHECKING:
    from ..industry.pilot.pilot_table import PilotResult
    from ..industry.pilot.timeline import Timeline

LANGUAGES = ("en", "ja")
STEP = "5min"


def pilot(
    folder: Annotated[Path | None, typer.Argument(help="A folder that prep wrote.")] = None,
    faults: Annotated[
        str | None,
        typer.Option(
            help="When machines failed: CSV with asset, start, end (and kind), JSON, truth.json of a generated plant, "
            "or the word labels for labelled events of the data."
        ),
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Of the faults, where there are several; default all.")] = None,
    asset: Annotated[list[str] | None, typer.Option(help="A machine; default all. Can be repeated.")] = None,
    csv: Annotated[Path | None, typer.Option(help="A CSV file of one machine in place of FOLDER.")] = None,
    windows: Annotated[Path | None, typer.Option(help="With --csv: its faults, JSON as NAB has them.")] = None,
    step: Annotated[str | None, typer.Option(help=f"Step of time, such as 1min; default {STEP}.")] = None,
    near: Annotated[str, typer.Option(help="Near context: history that is at hand anyway.")] = "6h",
    multiples: Annotated[str, typer.Option(help="Multiples of it that are tried.")] = "4,16,64",
    alarms_a_day: Annotated[float, typer.Option(help="Alarm budget of a machine.")] = 1 / 7,
    ahead: Annotated[str | None, typer.Option(help="How long before a fault an alarm counts, such as 2h.")] = None,
    tolerance: Annotated[str, typer.Option(help="By which an alarm may miss a fault.")] = "1h",
    target: Annotated[
        str | None, typer.Option(help="Kind of event whose far causes are sought in place of the faults'.")
    ] = None,
    forecaster: Annotated[Path | None, typer.Option(help="Folder of a TimesFM checkpoint, to be judged, too.")] = None,
    language: Annotated[str, typer.Option(help="Of the page and the verdict: en or ja.")] = "en",
    out: Annotated[
        Path | None, typer.Option(callback=checked_output, help="Write the result as one HTML page to this path.")
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Say whether history beyond the near context helps on this data, by a rule that stands beforehand.

    Judges detectors that plants use today at one alarm budget: a table with intervals against the base rate.
    """
    from ..industry.pilot.pilot_page import pilot_page
    from ..industry.pilot.pilot_table import PilotSettings
    from ..industry.pilot.pilot_table import pilot as judged
    from ..industry.pilot.time_texts import span_seconds
    from ..system.environment import Cost, environment
    from ..system.files import write_text

    if language not in LANGUAGES:
        raise ValueError(f"--language is {language!r}: give one of {', '.join(LANGUAGES)}")
    settings = PilotSettings(
        near=span_seconds(near, "--near"),
        multiples=_multiples(multiples),
        alarms_a_day=alarms_a_day,
        ahead=0.0 if ahead is None else span_seconds(ahead, "--ahead"),
        tolerance=span_seconds(tolerance, "--tolerance"),
        target=target,
        forecaster=None if forecaster is None else str(forecaster),
    )
    words = cast(Literal["en", "ja"], language)
    with Cost() as cost:
        if csv is not None:
            given = {"FOLDER": folder, "--faults": faults, "--kind": kind, "--asset": asset, "--step": step}
            timelines, notes = _of_csv(csv, windows, [name for name, value in given.items() if value])
        else:
            timelines, notes = _of_folder(folder, faults, kind, asset, step, windows)
        result = judged(timelines, settings)
    result = replace(result, notes=(*notes, *result.notes))
    document = {"command": command_line(), "environment": environment(), **cost.figures, **result.to_dict()}
    emit(
        document, json_path, None if out is None else lambda: write_text(out, pilot_page(result, words, command_line()))
    )
    # last: a pipe that closes early costs no file
    _show(result, words)


def _of_csv(csv: Path, windows: Path | None, given: list[str]) -> tuple[list[Timeline], tuple[str, ...]]:
    from ..industry.pilot.csv_timeline import timeline_from_csv
    from ..industry.pilot.fault_files import within_record

    if given:
        raise ValueError(f"{given[0]} is about a prepared folder: leave it out, or --csv")
    if windows is None:
        raise ValueError("--csv needs --windows: a JSON file with the faults of each file, as NAB has them")
    return [within_record(timeline_from_csv(csv, windows))], ()


def _of_folder(
    folder: Path | None,
    faults: str | None,
    kind: str | None,
    asset: list[str] | None,
    step: str | None,
    windows: Path | None,
) -> tuple[list[Timeline], tuple[str, ...]]:
    """Timelines of a prepared folder, and notes on what is judged."""
    from ..industry.dataset import PlantDataset
    from ..industry.pilot.dataset_timeline import timeline_from_dataset
    from ..industry.pilot.fault_files import kinds_of, of_kind, read_faults, spans_of, within_record
    from ..industry.pilot.time_texts import span_seconds

    if folder is None or faults is None:
        raise ValueError(
            "pilot needs data and the times of faults: hf-sparse-attn pilot FOLDER --faults faults.csv, where FOLDER "
            "is what prep wrote; or --csv FILE --windows FILE"
        )
    if windows is not None:
        raise ValueError("--windows is about --csv: name the faults of a folder with --faults")
    data, seconds = PlantDataset(folder), span_seconds(STEP if step is None else step, "--step")
    names = list(dict.fromkeys(asset or data.manifest.assets))
    if faults == "labels":
        if kind is not None:
            raise ValueError("--kind is about files of faults: leave it out, labels are judged together")
        lines = [timeline_from_dataset(data, name, step_seconds=seconds) for name in names]
        if not any(len(line.faults) for line in lines):
            raise ValueError(f"--faults labels: no event of {folder} is labelled; name a file of faults")
        return lines, ()
    known = of_kind(read_faults(faults, data.manifest.assets), kind)
    lines = [timeline_from_dataset(data, name, step_seconds=seconds, faults=spans_of(known, name)) for name in names]
    kinds = kinds_of(known)
    together = (f"kinds of faults judged together: {', '.join(kinds)}",) if len(kinds) > 1 else ()
    return [within_record(line) for line in lines], together


def _multiples(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--multiples is {text!r}: write numbers above 1 with commas, such as 4,16,64") from None


def _show(result: PilotResult, language: Literal["en", "ja"]) -> None:
    """Verdict, its reasons, the table, and what was not run and why."""
    from ..industry.pilot.pilot_page import PilotView

    view = PilotView(result, language)
    for line in (result.verdict.sentence[language], *(f"  {reason[language]}" for reason in result.verdict.reasons)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    rows = [view.row(row) for row in result.rows]
    table = Table(*map(escape, view.columns()))
    for row in rows:
        if not row["missing"]:
            # an interval below its value: the table fits 80 columns
            table.add_row(*(escape(cell.replace(" (", "\n(")) for cell in (row["name"], *row["cells"])))
    console.print(table)
    missing = (f"{row['name']}: {view.words['not_available']}: {row['missing']}" for row in rows if row["missing"])
    for line in (view.base_rate(), *missing, *view.notes()):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
