"""What a user can say about files that are read: zone, order of dates, columns, machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal
from zoneinfo import ZoneInfo

from ..errors import PlantDataError

Form = Literal[
    "csv-wide", "csv-long", "csv-events", "parquet-wide", "parquet-long", "parquet-events", "jsonl", "text", "otel"
]
FORMS: tuple[Form, ...] = (
    "csv-wide",
    "csv-long",
    "csv-events",
    "parquet-wide",
    "parquet-long",
    "parquet-events",
    "jsonl",
    "text",
    "otel",
)
# how numbers count time; anything else in `time_format` is for strftime
UNITS = ("epoch-s", "epoch-ms", "epoch-us", "epoch-ns", "excel", "filetime", "ticks", "compact")


@dataclass(frozen=True)
class IngestSettings:
    """How files are read; what is None is told from their content.

    Attributes:
        zone: IANA name of the zone of local times; stamps with an offset do not need it.
        day_first: whether 05/06/2024 is the fifth of June.
        time_format: one of `UNITS`, or a format of strftime.
        year: of the first line of logs whose stamps have no year; None = from the time of change of the file.
        assets: name of a machine: globs of its files.
        asset_column: column that names the machine of each row.
        columns: of the stamp, the tag, the value and the unit, by "time", "channel", "value", "unit".
        form: one of `FORMS`.
        encoding: as Python names it.
        max_bad_share: share of lines that may be unreadable.

    Raises:
        PlantDataError: the zone, the form or the share is none.
    """

    zone: str | None = None
    day_first: bool | None = None
    time_format: str | None = None
    year: int | None = None
    assets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    asset_column: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    form: Form | None = None
    encoding: str | None = None
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        if self.zone is not None:
            try:
                ZoneInfo(self.zone)
            except (ValueError, OSError, KeyError) as error:
                raise PlantDataError(
                    f"zone {self.zone!r} is not known",
                    ["name one such as Europe/Berlin or Asia/Tokyo", "say UTC", "install the package tzdata"],
                ) from error
        if self.form is not None and self.form not in FORMS:
            raise PlantDataError(
                f"form {self.form!r} is not known",
                [f"name one of {', '.join(FORMS)}", "leave it out", "convert the file"],
            )
        if self.encoding is not None:
            try:
                "".encode(self.encoding)
            except LookupError as error:
                raise PlantDataError(
                    f"encoding {self.encoding!r} is not known",
                    ["name one such as utf-8, cp932 or cp1252", "leave it out", "convert the file"],
                ) from error
        if not 0 <= self.max_bad_share < 1:
            raise PlantDataError(
                f"max_bad_share is {self.max_bad_share}",
                ["give a share from 0 to below 1", "1 % is 0.01", "leave it out"],
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        values = asdict(self)
        return {**values, "assets": {name: list(globs) for name, globs in self.assets.items()}}

    @property
    def time_zone(self) -> str:
        """The zone of stamps without an offset."""
        return self.zone or "UTC"
