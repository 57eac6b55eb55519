"""One file -> its rows in Parquet, its channels, and what was found while it was read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

from ...system.extras import needs_extra
from ..errors import PlantDataError
from ..findings import Finding, Quality
from .clock_times import StampReader
from .csv_fields import BadLine
from .ingest_settings import IngestSettings
from .local_times import LocalTimes
from .opened_file import OpenedFile
from .part_files import PartWriter
from .reading_findings import bad_lines, channel_findings, order_of_dates, repeated
from .repeated_rows import FLAGS, repeated_events, repeated_readings
from .row_tables import RowTables
from .time_order import TimeOrder
from .zone_evidence import ZoneEvidence

with needs_extra("industry", "data of plants"):
    import polars as pl

FEW = 10  # bad lines that any file may have, if they are at most a quarter of it
LISTED = 1000  # bad lines that are kept with what they hold; all are counted


@dataclass
class FilePart:
    """What was read of one file."""

    tables: RowTables
    writer: PartWriter
    findings: list[Finding]
    lines: int


class FileReader:
    """Reads one file from its start to its end.

    Args:
        opened: the file.
        asset: its machine, for rows that name none.
        settings: what the user says.
        folder: for its rows.
    """

    def __init__(self, opened: OpenedFile, asset: str, settings: IngestSettings, folder: Path) -> None:
        self.opened, self.settings = opened, settings
        self.path = opened.file.path
        self.tables, self.writer = RowTables(opened, asset), PartWriter(folder)
        self.stamps = StampReader(self.path, settings)
        self.local, self.order = LocalTimes(settings.time_zone), TimeOrder()
        self.evidence = ZoneEvidence(self.path, asset, settings.zone)
        self.bad: list[BadLine] = []
        self.bad_count, self.lines, self.good = 0, 0, 0
        self._known: list[pl.DataFrame] = []
        self._hashes: dict[str, list[pl.DataFrame]] = {}

    def read(self, advance: Callable[[int], None]) -> FilePart:
        """Read it; ``advance`` gets the number of the last line that was read.

        Raises:
            PlantDataError: too many of its lines cannot be read, or their times cannot be told.
            SurveyNeededError: `survey` must come first, with a new reader.
        """
        for frame, bad in self.opened.chunks():
            self._bad(bad)
            if frame.height:
                self.lines = max(self.lines, int(frame["line"].max()))  # type: ignore[arg-type]
                self._chunk(frame)
            advance(self.lines)
        self.writer.close()
        self._check_share()
        if not self.good:
            raise PlantDataError(
                "holds no row with a time",
                ["name the column of the time: --column time=NAME", "say --time-format", "leave the file out"],
                file=self.path,
            )
        flags = self._flags()
        duplicates = {*flags.filter(pl.col("flag") == Quality.DUPLICATE.value)["line"].to_list()}
        about = self.evidence.about
        clock = self.evidence.findings(self.order, duplicates)
        # stamps that a clock showed twice are told by what was done to the clock
        for first, last in self.evidence.repeated:
            twice = pl.col("time").is_between(first, last) & (pl.col("flag") == Quality.EQUAL_STAMP.value)
            flags = flags.filter(~twice)
        findings = [
            *bad_lines(about, self.bad, self.bad_count),
            *order_of_dates(about, self.stamps),
            *clock,
            *repeated(about, flags, self.opened.kind, self.good),
            *channel_findings(about, self.tables.channels),
        ]
        if self.opened.by_asset:
            findings = [replace(each, asset=None) if each.channel is None else each for each in findings]
        return FilePart(self.tables, self.writer, findings, self.lines)

    def survey(self) -> None:
        """Let all stamps of the file decide how they are read. Raises PlantDataError where they cannot."""
        for frame, _ in self.opened.chunks():
            self.stamps.survey(frame["stamp"].cast(pl.String), frame["line"])
        self.stamps.decide()

    # -- a chunk ------------------------------------------------------------------------------------------------

    def _chunk(self, frame: pl.DataFrame) -> None:
        frame, bad = self.tables.numbered(frame)
        self._bad(bad)
        read = self.stamps.read(frame["stamp"], frame["line"])
        frame = frame.with_columns(read.rename({"ns": "local", "unit": "time_unit"}))
        if read["ns"].null_count():
            wrong = frame.filter(pl.col("local").is_null()).select("line", "stamp")
            self._bad(
                [
                    BadLine(line, f"{_shown(stamp)} is no time stamp", "time_unreadable")
                    for line, stamp in wrong.iter_rows()
                ]
            )
            frame = frame.filter(pl.col("local").is_not_null())
        if frame.is_empty():
            return
        self.good += frame.height
        frame = self._in_utc(frame)
        order = self.order.add(frame["ns"], self.tables.streams(frame), frame["line"])
        quality = frame["ambiguous"].cast(pl.UInt16) * Quality.AMBIGUOUS_TIME.value
        frame = frame.with_columns(quality=quality | order["backward"].cast(pl.UInt16) * Quality.BACKWARD.value)
        if order["known"].any() and self.opened.kind != "events":
            channel = frame["number"] if self.opened.kind == "long" else pl.lit(0, dtype=pl.UInt16)
            self._known.append(
                frame.with_columns(channel=channel, time="ns").filter(order["known"]).select("channel", "time").unique()
            )
        for asset, rows in self.tables.rows(frame):
            table = "events" if self.opened.kind == "events" else "readings"
            if table == "events":
                self._remember(asset, rows)
            self.writer.write(asset, table, rows)

    def _in_utc(self, frame: pl.DataFrame) -> pl.DataFrame:
        zoned = frame["offset"].is_not_null()
        stream = self.tables.streams(frame)
        local = frame["local"].zip_with(~zoned, pl.Series([None], dtype=pl.Int64)) if zoned.any() else frame["local"]
        times = self.local.utc(local, stream)
        missing = local.is_not_null() & times["utc"].is_null()
        utc = times["utc"].zip_with(~zoned, frame["local"])
        if missing.any():
            utc = utc.zip_with(~missing, _before_the_gap(local, missing, self.settings.time_zone))
        frame = frame.with_columns(
            ns=utc, ambiguous=times["ambiguous"] | missing, second=times["second"], missing=missing
        )
        self.evidence.add(
            frame.select(
                "line", "ns", "local", "offset", "second", "missing", unit="time_unit", ambiguous=times["ambiguous"]
            )
        )
        return frame

    def _remember(self, asset: str, rows: pl.DataFrame) -> None:
        parts = self._hashes.setdefault(asset, [])
        start = parts[-1]["row"][-1] + 1 if parts else 0
        parts.append(
            rows.select(
                pl.int_range(start, start + rows.height, dtype=pl.UInt32).alias("row"),
                "line",
                pl.col("time").cast(pl.Int64),
                pl.struct("time", "origin", "level", "text", "template", "label").hash().alias("hash"),
            )
        )

    # -- its end ------------------------------------------------------------------------------------------------

    def _flags(self) -> pl.DataFrame:
        """Flags that need the whole file, written beside the rows of each asset; all of them."""
        every = [pl.DataFrame(schema=FLAGS)]
        known = pl.concat(self._known).unique() if self._known else None
        for asset, table in self.writer.rows:
            path = self.writer.path(asset, table)
            if table == "events":
                flags = repeated_events(pl.concat(self._hashes[asset]))
            elif known is None:
                continue
            else:
                flags = repeated_readings(path, known, wide=self.opened.kind == "wide")
            if flags.height:
                flags.select("row", "flag").write_ipc(path.with_name(f"{path.stem}-flags.arrow"))
                every.append(flags)
        return pl.concat(every)

    def _bad(self, bad: list[BadLine]) -> None:
        self.bad_count += len(bad)
        self.bad += bad[: LISTED - len(self.bad)]
        if bad:
            self.lines = max(self.lines, *(each.line for each in bad))

    def _check_share(self) -> None:
        allowed = max(self.settings.max_bad_share * self.lines, min(FEW, self.lines / 4))
        if self.bad_count <= allowed:
            return
        first = min(self.bad, key=lambda each: each.line)
        raise PlantDataError(
            f"{self.bad_count} of {self.lines} lines cannot be read, the first: {first.found}",
            [
                "say how it is written: --form, --column, --time-format, --encoding",
                f"allow more of them: --max-bad-share {min(0.99, 1.1 * self.bad_count / self.lines):.2g}",
                "repair or remove these lines",
            ],
            file=self.path,
            line=first.line,
        )


def _shown(stamp: object) -> str:
    return "an empty field" if stamp is None or stamp == "" else repr(str(stamp)[:60])


def _before_the_gap(local: pl.Series, missing: pl.Series, zone: str) -> pl.Series:
    """UTC of local times that do not exist, by the offset before the clock was set forward (PEP 495, fold 0)."""
    values: list[int | None] = [None] * len(local)
    info = ZoneInfo(zone)
    for at in missing.arg_true().to_list():
        seconds, rest = divmod(int(local[at]), 10**9)
        naive = datetime(1970, 1, 1) + timedelta(seconds=seconds)
        offset = naive.replace(tzinfo=info).utcoffset()
        values[at] = (seconds - int(offset.total_seconds() if offset else 0)) * 10**9 + rest
    return pl.Series("ns", values, dtype=pl.Int64)
