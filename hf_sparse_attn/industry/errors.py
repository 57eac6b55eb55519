"""What is raised where data of a plant cannot be used: the place, what was found there, and ways on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class PlantDataError(ValueError):
    """Data that cannot be read as it stands.

    Args:
        found: what is wrong, with the value that was found.
        ways: what the reader of the message can do, best first.
        file: the file it was found in, if it is one file.
        line: its line from 1, of a Parquet file its row from 1.
        column: name or number of the column.
    """

    def __init__(
        self,
        found: str,
        ways: Sequence[str],
        *,
        file: str | Path | None = None,
        line: int | None = None,
        column: str | int | None = None,
    ) -> None:
        self.found, self.ways, self.file, self.line, self.column = found, tuple(ways), file, line, column
        place = [
            *([] if file is None else [str(file)]),
            *([] if line is None else [f"line {line}"]),
            *([] if column is None else [f"column {column!r}"]),
        ]
        text = f"{', '.join(place)}: {found}" if place else found
        if self.ways:
            text += ". What you can do: " + "; ".join(f"({n}) {way}" for n, way in enumerate(self.ways, 1))
        super().__init__(text)
