"""A text in two parts by time: the beginning trains, what follows is evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...data.file_check import chunks, survey
from ...data.formats import SourceFile, source_files
from ...data.sources import SourceError
from ...system.files import write_atomically

EVALUATED_BYTES = 16 << 20  # of what follows each cut: evaluation reads windows, not gigabytes


def split_texts(sources: Sequence[str], share: float, folder: Path) -> tuple[list[str], list[str]]:
    """Cut every text of ``sources`` at the first line end behind ``share`` of its bytes, into files in ``folder``.

    A stream is copied: memory stays flat. Of what follows a cut at most 16 MB are taken.

    Returns:
        (paths of the training parts, paths of the evaluation parts).

    Raises:
        SourceError: a source cannot be read, is a table, or has no line end where it is to be cut.
    """
    train, rest = [], []
    for at, file in enumerate(source_files(sources)):
        if file.format != "text":
            raise SourceError(
                f"{file.path} is {file.format}: only plain texts and logs can be split; name data.eval instead of "
                "data.split"
            )
        name = Path(file.path).name
        for compression in (".gz", ".zst"):
            name = name.removesuffix(compression)
        first, second = folder / "train" / f"{at:03}-{name}", folder / "eval" / f"{at:03}-{name}"
        _copy(file, share, first, second)
        train.append(str(first))
        rest.append(str(second))
    return train, rest


def _copy(file: SourceFile, share: float, first: Path, second: Path) -> None:
    size = survey(file).size
    # bytes before the part with the cut, the cut's place in it, bytes taken behind it
    target, done, cut, taken = int(size * share), 0, -1, 0

    def write(train: Path, rest: Path) -> None:
        nonlocal done, cut, taken
        with train.open("wb") as before, rest.open("wb") as after:
            for part in chunks(file):
                if cut < 0:
                    # the first line end behind the share, in uncompressed bytes
                    end = part.find(b"\n", max(0, target - done)) if done + len(part) > target else -1
                    before.write(part if end < 0 else part[: end + 1])
                    done += len(part)
                    if end < 0:
                        continue
                    cut, part = end, part[end + 1 :]
                if taken + len(part) >= EVALUATED_BYTES:
                    part = part[: EVALUATED_BYTES - taken]
                    whole = part.rfind(b"\n") + 1  # no line, and no character, in two
                    after.write(part[: whole or len(part)])
                    taken += len(part)
                    return
                after.write(part)
                taken += len(part)

    write_atomically(first, lambda train: write_atomically(second, lambda rest: write(train, rest)))
    if cut < 0 or not taken:
        raise SourceError(
            f"{file.path} has no line end behind {share:.0%} of its {size} bytes, so nothing is left to evaluate: "
            "lower data.split"
        )
