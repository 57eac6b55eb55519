"""Parameters of log lines as bins: for each template the place whose values say most, in quantiles or as values."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...system.extras import needs_extra
from .log_templates import UNKNOWN, WILDCARD, TemplateMiner

with needs_extra("industry", "parameters of log lines"):
    import polars as pl

SAMPLE = 100_000  # lines that bins are made from
RAREST = 20  # lines that a place needs
NUMERIC = 0.99  # share of a place's values that are numbers, from which on it counts as numeric
COVERED = 0.5  # share of lines that the listed values of a place without numbers must have
BEFORE = " \t=(\"'[,:;>"  # characters before a sign or a path that a match of the mask may start with
NUMBER = r"^[^0-9A-Za-z+-]?([-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)$"


@dataclass(frozen=True)
class BinSettings:
    """How parameters are binned.

    Attributes:
        bins: at most so many a place, besides the one for all other values.
        budget: bins of all places together.
        per_line: places of one template at most, each a token of its lines.
    """

    bins: int = 8
    budget: int = 512
    per_line: int = 1


@dataclass(frozen=True)
class Slot:
    """A place in the lines of a template, and its bins.

    Attributes:
        template: number of the template.
        word, place: the word of the line, and which of the masked parts in it, both from 0.
        values: bin i is ``values[i]``; empty where bins are intervals.
        edges: bin i is edges[i] ≤ x < edges[i + 1], the first and the last without end; empty where bins are values.
    """

    template: int
    word: int
    place: int
    values: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()

    @property
    def bins(self) -> int:
        """With the last one, which has all other values."""
        return (len(self.values) or len(self.edges) - 1) + 1

    def encode(self, values: pl.Series) -> NDArray[np.int64]:
        """Bins [n] of values [n] as they stand in the line."""
        other = self.bins - 1
        if self.values:
            number = {value: at for at, value in enumerate(self.values)}
            return np.array([number.get(value, other) for value in values], np.int64)
        numbers = values_of(values)
        inside = np.searchsorted(self.edges[1:-1], numbers, side="right")
        return np.where(np.isfinite(numbers), inside, other)

    def describe(self, at: int) -> str:
        """Bin ``at`` in words, for the start of its embedding."""
        if at == self.bins - 1:
            return "other"
        return self.values[at] if self.values else f"{self.edges[at]:g} to {self.edges[at + 1]:g}"


def values_of(values: pl.Series) -> NDArray[np.float64]:
    """The numbers [n] that stand in strings [n], full-width digits too; NaN where there is none."""
    numbers = values.str.normalize("NFKC").str.extract(NUMBER).cast(pl.Float64, strict=False)
    return numbers.fill_null(np.nan).to_numpy()


@dataclass(frozen=True)
class ParameterBins:
    """The places that become tokens, ordered by template, word and place."""

    slots: tuple[Slot, ...]
    settings: BinSettings

    @classmethod
    def fit(cls, miner: TemplateMiner, events: pl.LazyFrame, settings: BinSettings | None = None) -> ParameterBins:
        """Bins from ``events`` (columns ``text``, ``template``).

        A place with few values gets one bin each, one of numbers quantiles. Each template keeps the places whose bins
        tell most bits (lines × entropy), and of all templates those with most until the budget is spent.
        """
        settings = settings or BinSettings()
        sample = _sample(events)
        values = _values(miner, sample, miner.assign(sample))
        found: list[tuple[float, Slot]] = []  # with the bits that it tells of all lines
        for (template, word, place), part in values.group_by("number", "word", "place", maintain_order=True):
            if slot := _slot(int(template), int(word), int(place), part["value"], settings.bins):
                found.append((len(part) * _entropy(slot.encode(part["value"])), slot))
        best, spent, taken = list[Slot](), 0, dict[int, int]()
        for _, slot in sorted(found, key=lambda f: (-f[0], f[1].template, f[1].word, f[1].place)):
            if taken.get(slot.template, 0) < settings.per_line and spent + slot.bins <= settings.budget:
                best.append(slot)
                spent += slot.bins
                taken[slot.template] = taken.get(slot.template, 0) + 1
        return cls(tuple(sorted(best, key=lambda s: (s.template, s.word, s.place))), settings)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """The first bin of each slot [slots + 1] where those of all slots are numbered through."""
        return np.array([0, *itertools.accumulate(slot.bins for slot in self.slots)], np.int64)

    def encode(self, miner: TemplateMiner, events: pl.DataFrame, assigned: pl.DataFrame) -> NDArray[np.int64]:
        """Bins [lines, per_line], numbered through over all slots; -1: the line has no such parameter.

        Args:
            miner: what assigned the templates.
            events: columns ``text``, ``template``.
            assigned: of `TemplateMiner.assign` for the same lines.
        """
        offsets, columns = self.offsets, self._columns()
        # a line without its template's place (cut off, or of fewer words) has the last bin there
        start = np.full((len(miner.templates) + 1, self.settings.per_line), -1, np.int64)
        for slot, column, after in zip(self.slots, columns, offsets[1:], strict=True):
            start[slot.template, column] = after - 1
        bins: NDArray[np.int64] = start[assigned["number"].to_numpy()]
        rows = np.flatnonzero((bins >= 0).any(1))
        slots = pl.DataFrame(
            [(s.template, s.word, s.place, at) for at, s in enumerate(self.slots)],
            schema={"number": pl.UInt32, "word": pl.Int64, "place": pl.Int64, "slot": pl.Int64},
            orient="row",
        )
        wanted = {(slot.template, slot.word, slot.place) for slot in self.slots}
        values = _values(miner, events[rows], assigned[rows], wanted).join(slots, on=["number", "word", "place"])
        for (at,), part in values.group_by("slot"):
            lines = rows[part["line"].to_numpy()]
            bins[lines, columns[int(at)]] = offsets[int(at)] + self.slots[int(at)].encode(part["value"])
        return bins

    def _columns(self) -> list[int]:
        """Of each slot its place among those of its template."""
        first: dict[int, int] = {}
        return [at - first.setdefault(slot.template, at) for at, slot in enumerate(self.slots)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` is the inverse."""
        return {"settings": asdict(self.settings), "slots": [asdict(slot) for slot in self.slots]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ParameterBins:
        """Raises KeyError or TypeError for values of another form."""
        slots = [
            Slot(**{**s, "values": tuple(s["values"]), "edges": tuple(map(float, s["edges"]))}) for s in values["slots"]
        ]
        return cls(tuple(slots), BinSettings(**values["settings"]))


def _sample(events: pl.LazyFrame) -> pl.DataFrame:
    """About `SAMPLE` lines, spread evenly."""
    count = events.select(pl.len()).collect().item()
    if count <= SAMPLE:
        return events.collect()
    # multiples of the golden ratio (Knuth's multiplicative hash): every n-th line would miss what recurs every n lines
    mixed = (pl.col("row").cast(pl.UInt64) * 2654435761) % (1 << 32)
    return events.with_row_index("row").filter(mixed < (1 << 32) * SAMPLE // count).collect(engine="streaming")


def _values(
    miner: TemplateMiner,
    events: pl.DataFrame,
    assigned: pl.DataFrame,
    wanted: Container[tuple[int, int, int]] | None = None,
) -> pl.DataFrame:
    """Parameters of lines: ``line`` (row of ``events``), ``number`` (template), ``word``, ``place``, ``value``; all, or
    those of the ``wanted`` (template, word, place).
    """
    distinct = assigned.select("masked", "number").filter(pl.col("number") != UNKNOWN).unique(maintain_order=True)
    places = pl.DataFrame(
        [
            (line, number, match, word, place, constant)
            for line, number in distinct.iter_rows()
            for match, word, place, constant in _places(line, miner.templates[number - 1].text)
            if wanted is None or (number, word, place) in wanted
        ],
        schema={
            "masked": pl.String,
            "number": pl.UInt32,
            "match": pl.Int64,
            "word": pl.Int64,
            "place": pl.Int64,
            "constant": pl.String,
        },
        orient="row",
    )
    found = pl.col("text").fill_null("").str.extract_all(miner.settings.mask)
    lines = assigned.select("masked", "number").with_columns(events.select(found.alias("found"))["found"])
    lines = lines.with_row_index("line").join(places, on=["masked", "number"], maintain_order="left")
    value = pl.coalesce("constant", pl.col("found").list.get(pl.col("match"), null_on_oob=True))
    return lines.select("line", "number", "word", "place", value.str.strip_chars_start(BEFORE).alias("value"))


def _places(line: str, template: str) -> Iterator[tuple[int | None, int, int, str | None]]:
    """(which match of the mask, word, place in the word, the word itself) of what varies in a masked line.

    The match is None for a word that is not masked and stands where the template has a wildcard.
    """
    words, wild = line.split(), template.split()
    match = 0
    for at, word in enumerate(words):
        count = word.count(WILDCARD)
        for place in range(count):
            yield match + place, at, place, None
        match += count
        if not count and len(wild) == len(words) and WILDCARD in wild[at]:
            yield None, at, 0, word


def _slot(template: int, word: int, place: int, values: pl.Series, bins: int) -> Slot | None:
    """The bins of a place, or None where its values say nothing."""
    counts = values.value_counts(sort=False).sort(["count", values.name], descending=[True, False])
    if len(values) < RAREST or len(counts) < 2:
        return None
    if len(counts) <= bins:
        return Slot(template, word, place, values=tuple(counts[values.name]))
    numbers = values_of(values)
    known = numbers[np.isfinite(numbers)]
    if len(known) >= NUMERIC * len(numbers):
        edges = np.unique(np.quantile(known, np.linspace(0, 1, bins + 1)))
        if len(edges) > 2:
            return Slot(template, word, place, edges=tuple(edges.tolist()))
    if counts["count"][:bins].sum() >= COVERED * len(values):
        return Slot(template, word, place, values=tuple(counts[values.name][:bins]))
    return None


def _entropy(bins: NDArray[np.int64]) -> float:
    """−Σ p log₂ p of the shares p of bins [n], in bits."""
    shares: NDArray[np.float64] = np.unique(bins, return_counts=True)[1] / len(bins)
    return float(-(shares * np.log2(shares)).sum())
