"""Lines of logs -> stamp, origin, level, label and text: syslog, BGL, and lines that start with a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...system.extras import needs_extra
from .csv_fields import BadLine
from .stamp_shapes import shape_of
from .text_blocks import TextFile, blocks

with needs_extra("industry", "data of plants"):
    import polars as pl

LEVELS = "TRACE|DEBUG|INFO|INFORMATION|NOTICE|WARN|WARNING|ERROR|ERR|SEVERE|CRITICAL|CRIT|ALERT|EMERG|FATAL|FAILURE"
# RFC 5424, 6.2.1: severities by number
SEVERITIES = ("EMERGENCY", "ALERT", "CRITICAL", "ERROR", "WARNING", "NOTICE", "INFO", "DEBUG")
MONTHS = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"
PRIORITY = r"<(?P<priority>\d{1,3})>"
CLOCK = r"\d{1,2}:\d{2}(?::\d{2}(?:[.,:]\d{1,9})?)?"
DATE = (
    r"(?:\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}|\d{8}|\d{4}年\s*\d{1,2}月\s*\d{1,2}日"
    rf"|\d{{1,2}}[-/ ](?:{MONTHS})[a-z]*[-/ ]\d{{2,4}}|(?:(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun),? )?(?:{MONTHS})[a-z]*\.? +"
    r"\d{1,2}(?:, \d{4})?)"
)
ZONE = r"(?:\s?(?:Z|UTC|GMT|[+-]\d{2}:?\d{2}|[+-]\d{2}\b))?"
HALF = r"(?:\s?[AaPp]\.?[Mm]\.?)?"
DOTTED = r"\d{4}-\d{2}-\d{2}-\d{2}\.\d{2}\.\d{2}(?:\.\d+)?"
TIME = rf"(?:{CLOCK}|\d{{6}}|\d{{1,2}}時\d{{1,2}}分(?:\d{{1,2}}秒)?)"
STAMP = rf"(?:{DOTTED}|{DATE}(?:T|,? +|_|:|-){TIME}{HALF}{ZONE}(?: \d{{4}}\b)?)"
REST = rf"(?:[\[(<|\s:,;-]*\b(?P<level>(?i:{LEVELS}))\b[\])>|:,]*)?[\s:|,;-]*(?P<text>.*)$"
FORMS = {
    "syslog5424": rf"^{PRIORITY}\d{{1,2}} (?P<stamp>\S+) (?P<host>\S+) (?P<origin>\S+) \S+ \S+ "
    r"(?:-|(?:\[(?:[^\]\\]|\\.)*\])+)(?: \x{FEFF}?(?P<text>.*))?$",
    "syslog3164": rf"^(?:{PRIORITY})?(?P<stamp>(?:{MONTHS}) [ \d]\d \d{{2}}:\d{{2}}:\d{{2}}(?:\.\d+)?) (?P<host>\S+) "
    r"(?:(?P<origin>[^\s:\[]+)(?:\[[^\]]*\])?: )?(?P<text>.*)$",
    # its seconds since 1970 are the same everywhere, the date behind them is of an unknown zone
    "labelled": r"^(?P<label>\S+) (?P<epoch>\d{9,10}) \d{4}\.\d{2}\.\d{2} (?P<origin>\S+) "
    r"\d{4}-\d{2}-\d{2}-\d{2}\.\d{2}\.\d{2}(?P<fraction>\.\d+)? \S+ \S+ \S+ (?P<level>\S+) ?(?P<text>.*)$",
    # a host and a program behind a stamp with a year, as rsyslog and systemd write them
    "dated": r"^(?P<stamp>\d{4}-\d{2}-\d{2}T\S+) (?P<host>\S+) (?P<origin>[^\s:\[]+)(?:\[[^\]]*\])?: "
    r"(?P<text>.*)$",
    "generic": rf"^\s*[\[(<|]?\s*(?P<stamp>{STAMP})\s*[\])>|]?{REST}",
    "epoch": rf"^\s*\[?(?P<stamp>\d{{10}}(?:\.\d+|\d{{3}}|\d{{6}}|\d{{9}})?)\]?[\s:,;|-]{REST}",
}
GROUPS = ("priority", "stamp", "epoch", "fraction", "host", "origin", "level", "text", "label")
# a stack trace or an indented text goes on from the line above it
CONTINUES = (
    r"^(?:\s+\S|Caused by:|Traceback \(|\.\.\. \d+ more|[)}\]]|[\w$]+(?:\.[\w$]+)+(?:Exception|Error)\b"
    r"|\w+(?:Error|Exception):)"
)
MOST = 0.5


@dataclass(frozen=True)
class LogForm:
    """How the lines of a log are written."""

    name: str
    pattern: str


def log_form(lines: Sequence[str]) -> LogForm | None:
    """The form that reads most of the lines; None if none does."""
    held = pl.Series("text", [line for line in lines if line.strip()], dtype=pl.String)
    if held.is_empty():
        return None
    goes_on = held.str.contains(CONTINUES).fill_null(False)
    best: tuple[float, LogForm] | None = None
    for name, pattern in FORMS.items():
        found = _groups(held, pattern)
        fits = found["stamp"].is_not_null()
        if name in ("generic", "epoch", "dated") and fits.any():
            sample = found["stamp"].drop_nulls().head(20)
            fits &= name == "epoch" or all(shape_of(stamp) is not None for stamp in sample)
        share = int((fits | (goes_on & fits.any())).sum()) / len(held)
        # of two that read as much the one that tells more
        if share > MOST and (best is None or share > best[0] + 0.02):
            best = share, LogForm(name, pattern)
    return None if best is None else best[1]


def log_rows(text: TextFile, form: LogForm) -> Iterator[tuple[pl.DataFrame, list[BadLine]]]:
    """(columns stamp, origin, level, text, template, label and line; lines that are none) of each block.

    A line that goes on from the one above has a row of its own, with the stamp of that one.
    """
    last: str | None = None
    for block in blocks(text):
        lines = block.lines.alias("text")
        frame = _groups(lines, form.pattern).with_columns(
            line=pl.int_range(block.first, block.first + len(lines), dtype=pl.UInt64, eager=True),
            whole=lines,
            good=~pl.int_range(len(lines), eager=True).is_in(list(block.damaged)),
        )
        goes_on = pl.col("stamp").is_null() & pl.col("whole").str.contains(CONTINUES) & pl.lit(form.name != "labelled")
        above = pl.col("stamp").forward_fill().fill_null(pl.lit(last, dtype=pl.String))
        frame = frame.with_columns(
            stamp=pl.when(goes_on).then(above).otherwise("stamp"),
            text=pl.when(goes_on).then("whole").otherwise(pl.col("text").fill_null("")),
        )
        blank = pl.col("whole").str.strip_chars() == ""
        wrong = frame.filter((pl.col("stamp").is_null() | ~pl.col("good")) & ~blank)
        bad = [
            BadLine(line, block.damaged.get(line - block.first) or f"no {form.name} line: {whole[:80]!r}")
            for line, whole in wrong.select("line", "whole").iter_rows()
        ]
        frame = frame.filter(pl.col("stamp").is_not_null() & pl.col("good"))
        last = frame["stamp"][-1] if frame.height else last
        yield frame.select("stamp", "origin", "level", "text", "template", "label", "line"), bad


def _groups(lines: pl.Series, pattern: str) -> pl.DataFrame:
    # the engine of polars writes groups without P, and has no \x{…} in its sets
    found = lines.alias("text").str.extract_groups(pattern.replace("(?P<", "(?<")).struct.unnest()
    missing = [pl.lit(None, dtype=pl.String).alias(name) for name in GROUPS if name not in found.columns]
    found = found.with_columns(missing)
    severity = (pl.col("priority").cast(pl.Int64, strict=False) % 8).replace_strict(
        range(8), SEVERITIES, default=None, return_dtype=pl.String
    )
    return found.select(
        pl.coalesce("stamp", pl.col("epoch") + pl.col("fraction").fill_null("")).alias("stamp"),
        pl.coalesce("origin", "host").alias("origin"),
        pl.coalesce("level", severity).str.to_uppercase().alias("level"),
        pl.col("text"),
        pl.lit(None, dtype=pl.String).alias("template"),
        pl.col("label"),
    )
