"""The tokens that logs and sensors add to a model's vocabulary: fitted on the training period, then frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AddedToken, PreTrainedTokenizerBase

from ...system.extras import needs_extra
from ..dataset import PlantDataset
from ..errors import PlantDataError
from .log_parameters import BinSettings, ParameterBins
from .log_templates import WILDCARD, MinerSettings, TemplateMiner, digest, load_sealed, save_sealed
from .sensor_bins import LIMIT, bin_centers
from .splitting import nanoseconds

with needs_extra("industry", "a vocabulary of logs"):
    import polars as pl

FILE = "log_vocabulary.json"
KEY = "log_vocabulary"  # in the config of a model and among a tokenizer's settings
# seconds, a factor of 4 apart, from a millisecond to 50 days
GAP_EDGES: tuple[float, ...] = tuple(0.001 * 4**i for i in range(17))
FIRST, EQUAL = 0, 1  # gap bins: nothing comes before; the same time stamp


@dataclass(frozen=True)
class VocabularySettings:
    """How a vocabulary is fitted.

    Attributes:
        miner: how templates are mined.
        parameters: how parameters are binned.
        max_origins: the most frequent origins have a token of their own, all others share one.
        sensor_bins: bins of sensor values; 0: no tokens for sensors.
    """

    miner: MinerSettings = field(default_factory=MinerSettings)
    parameters: BinSettings = field(default_factory=BinSettings)
    max_origins: int = 256
    sensor_bins: int = 0


@dataclass(frozen=True)
class LogVocabulary:
    """Templates, time gaps, origins, parameters and sensor bins, numbered in this order from 0.

    Attributes:
        miner: its templates; the first token is that of lines that fit none.
        parameters: bins of parameters.
        origins: those with a token of their own; the token before them is that of all others.
        sensor_bins: how many; before them stand a token that starts a step of a grid, and one for a missing value.
    """

    miner: TemplateMiner
    parameters: ParameterBins
    origins: tuple[str, ...]
    sensor_bins: int = 0

    @classmethod
    def fit(
        cls,
        data: PlantDataset,
        settings: VocabularySettings | None = None,
        assets: Sequence[str] | None = None,
    ) -> LogVocabulary:
        """Fit on the events of ``assets`` (all) before the end of training; on all of them where nothing is split.

        Raises:
            PlantDataError: there is no asset of that name.
        """
        settings = settings or VocabularySettings()
        events = training_events(data, data.manifest.assets if assets is None else assets)
        lines = events.select("text", "template")
        miner = TemplateMiner.fit(lines, settings.miner)
        counts = events.drop_nulls("origin").group_by("origin").len().collect(engine="streaming")
        origins = counts.sort(["len", "origin"], descending=[True, False])["origin"][: settings.max_origins]
        parameters = ParameterBins.fit(miner, lines, settings.parameters)
        return cls(miner, parameters, tuple(origins), settings.sensor_bins)

    @property
    def gaps(self) -> int:
        """First token of the time gaps."""
        return len(self.miner.templates) + 1

    @property
    def other_origin(self) -> int:
        return self.gaps + len(GAP_EDGES) + 3

    @property
    def parameter_bins(self) -> int:
        """First token of the parameters."""
        return self.other_origin + 1 + len(self.origins)

    @property
    def step(self) -> int:
        """The token that starts a step of a sensor grid."""
        return self.parameter_bins + int(self.parameters.offsets[-1])

    @property
    def sensors(self) -> int:
        """The token of a missing value, the first of what `sensor_bins.quantise` numbers."""
        return self.step + 1

    def __len__(self) -> int:
        return self.sensors + 1 + self.sensor_bins if self.sensor_bins else self.step

    def gap_tokens(self, seconds: NDArray[np.float64]) -> NDArray[np.int64]:
        """Tokens [n] of time gaps [n]; NaN: nothing comes before."""
        bins = np.searchsorted(GAP_EDGES, seconds, side="right") + EQUAL + 1
        bins = np.where(seconds == 0, EQUAL, bins)
        return self.gaps + np.where(np.isnan(seconds), FIRST, bins)

    def line_tokens(self, events: pl.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Tokens of events (columns ``origin``, ``text``, ``template``): origin, template, parameters.

        Returns:
            Tokens [n, 2 + parameters of a line], -1 where a line has no such parameter; `Match` [n] of its template.
        """
        assigned = self.miner.assign(events)
        bins = self.parameters.encode(self.miner, events, assigned)
        bins = np.where(bins >= 0, self.parameter_bins + bins, -1)
        columns = [self.origin_tokens(events), assigned["number"].to_numpy().astype(np.int64)]
        return np.column_stack([*columns, bins]), assigned["match"].to_numpy()

    def origin_tokens(self, events: pl.DataFrame) -> NDArray[np.int64]:
        """Tokens [n] of the column ``origin``."""
        number = {origin: self.other_origin + at for at, origin in enumerate(self.origins, 1)}
        tokens = events["origin"].replace_strict(number, default=self.other_origin, return_dtype=pl.Int64)
        return tokens.to_numpy()

    @cached_property
    def names(self) -> list[str]:
        """The tokens as a tokenizer knows them."""
        slots = [f"parameter:{s}:{b}" for s, slot in enumerate(self.parameters.slots) for b in range(slot.bins)]
        logs = [
            *(f"template:{n}" for n in range(self.gaps)),
            *(f"gap:{n}" for n in range(len(GAP_EDGES) + 3)),
            *(f"origin:{n}" for n in range(len(self.origins) + 1)),
            *slots,
        ]
        bins = ["step", "missing", *(f"bin:{n}" for n in range(self.sensor_bins))] if self.sensor_bins else []
        return [f"<|log:{name}|>" for name in logs] + [f"<|sensor:{name}|>" for name in bins]

    @cached_property
    def descriptions(self) -> list[str]:
        """The text whose mean embedding each token starts from."""
        templates = [template.text.replace(WILDCARD, " ") for template in self.miner.templates]
        edges = [_duration(edge) for edge in GAP_EDGES]
        gaps = [f"{a} to {b} later" for a, b in pairwise(edges)]
        slots = [self._slot_text(at, b) for at, slot in enumerate(self.parameters.slots) for b in range(slot.bins)]
        bins = [f"{center:.2f}" for center in bin_centers(self.sensor_bins)]
        return [
            *("unknown", *templates),
            *("start", "at the same time", f"less than {edges[0]} later", *gaps, f"more than {edges[-1]} later"),
            *("other", *self.origins),
            *slots,
            *(("sensors", "missing", *bins) if self.sensor_bins else ()),
        ]

    def _slot_text(self, at: int, bin_number: int) -> str:
        slot = self.parameters.slots[at]
        words = self.miner.templates[slot.template - 1].text.split()
        before = words[slot.word - 1] if 0 < slot.word <= len(words) else ""
        return f"{before} {slot.describe(bin_number)}".replace(WILDCARD, " ")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` is the inverse."""
        return {
            "miner": self.miner.to_dict(),
            "parameters": self.parameters.to_dict(),
            "origins": list(self.origins),
            "gap_edges": list(GAP_EDGES),
            "sensor_limit": LIMIT,
            "sensor_bins": self.sensor_bins,
        }

    @cached_property
    def digest(self) -> str:
        """Names the vocabulary; stands in the config of the model that has it."""
        return digest(self.to_dict())

    def save(self, folder: str | Path) -> None:
        """Write ``folder/log_vocabulary.json``, whole or not at all; the folder of the model is the place for it."""
        save_sealed(Path(folder) / FILE, "a log vocabulary", self.to_dict())

    @classmethod
    def load(cls, folder: str | Path) -> LogVocabulary:
        """Raises PlantDataError where `save` of this version wrote none, or the file was changed."""
        values: Mapping[str, Any] = load_sealed(Path(folder) / FILE, "a log vocabulary")
        miner, parameters = TemplateMiner.from_dict(values["miner"]), ParameterBins.from_dict(values["parameters"])
        if (tuple(values["gap_edges"]), values["sensor_limit"]) != (GAP_EDGES, LIMIT):
            raise PlantDataError(
                "has other time gaps or sensor bins than this version",
                ["install the version that saved it", "fit a vocabulary and train with this version"],
                file=Path(folder) / FILE,
            )
        return cls(miner, parameters, tuple(values["origins"]), values["sensor_bins"])

    def add_to(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Add the tokens to a tokenizer that lacks them; returns how many were added.

        They are special tokens: decoding can leave them out, and a text that holds their names never becomes one of
        them (`text_tokens.TextEncoder`).

        Raises:
            PlantDataError: it holds the tokens of another vocabulary.
        """
        known = tokenizer.init_kwargs.get(KEY)
        if known not in (None, self.digest):
            raise PlantDataError(
                f"the tokenizer holds another vocabulary of logs ({known[:12]}…, this is {self.digest[:12]}…)",
                ["load the vocabulary it was extended with", "load the tokenizer of the base model", "train anew"],
            )
        tokens = [AddedToken(name, special=True, normalized=False) for name in self.names]
        added = tokenizer.add_tokens(tokens, special_tokens=True)
        tokenizer.init_kwargs[KEY] = self.digest  # saved with the tokenizer
        return int(added)

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int32]:
        """The token ids [len(self)] that the tokenizer has for the tokens.

        Raises:
            PlantDataError: it does not hold this vocabulary.
        """
        vocabulary = tokenizer.get_vocab()
        if tokenizer.init_kwargs.get(KEY) != self.digest or not set(self.names) <= vocabulary.keys():
            raise PlantDataError(
                "the tokenizer does not hold this vocabulary of logs",
                ["extend model and tokenizer first: extend_model", "load the tokenizer that was saved with the model"],
            )
        return np.array([vocabulary[name] for name in self.names], np.int32)


def training_events(data: PlantDataset, assets: Sequence[str]) -> pl.LazyFrame:
    """Events of ``assets`` that lie before the end of training, as they stand."""
    frame = pl.concat([data.events(asset, in_order=False) for asset in assets])
    split = data.manifest.split
    return frame if split is None else frame.filter(pl.col("time").dt.epoch("ns") < nanoseconds(split.train_end))


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1000:.3g} milliseconds"
