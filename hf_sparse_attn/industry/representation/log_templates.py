"""Templates of log lines by Drain, mined once and then frozen: a line's template has the same number for good.

Drain (He et al. 2017, "Drain: An Online Log Parsing Approach with Fixed Depth Tree") is the library drain3-improved.
Around it stand masks of what varies (numbers, addresses, paths), each masked line mined once, and a file format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from ...system.extras import needs_extra
from ...system.files import read_json, write_json
from ..errors import PlantDataError

with needs_extra("industry", "templates of log lines"):
    import polars as pl
    from drain3.drain import Drain, LogCluster

FORMAT = 1
UNKNOWN = 0  # number of the template of lines that fit none; mined templates count from 1
WILDCARD = "<*>"
LONGEST = 2048  # characters of a masked line that are mined
LEAF = 64  # templates of a leaf that a line is compared with while they are mined: the first and the latest
END = ""  # key of a template's number in a tree of words; no word is empty
CACHED = 1 << 20  # masked lines whose template is remembered

# What a mask takes, first match first: absolute paths, hexadecimal numbers, IPv4 addresses with their port, names with
# a hyphen and a digit behind it (nodes, dates, UUIDs), long hexadecimal words, signed numbers, numbers, the wildcard
# itself. Groups 1 and 2 are the character before, which stays: the engine cannot look behind.
MASK = "|".join(
    [
        r"""(^|[\s=("'\[,:;>])(?:/[\w.%+~@-]+){2,}""",
        r"0[xX][0-9a-fA-F]+",
        r"\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?",
        r"[A-Za-z0-9_](?:[A-Za-z0-9_.:]*[A-Za-z0-9_])?-[A-Za-z0-9_.:-]*[0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9_])?",
        r"\b[0-9a-fA-F]{8,}\b",
        r"(^|[^A-Za-z0-9_.)])[-+]\d+(?:\.\d+)*(?:[eE][-+]?\d+)?",
        r"\d+(?:\.\d+)*(?:[eE][-+]?\d+)?",
        r"<\*>",
    ]
)

# Words of scripts without spaces: runs of Katakana or Hiragana, pairs of Chinese characters, of which most words of
# Japanese technical language are made. Drain needs words to compare lines by.
UNSPACED = r"\p{Han}{1,2}|[\p{Katakana}ー]+|\p{Hiragana}+"


class Match(IntEnum):
    """How a line got its template."""

    EXACT = 0
    NEAREST = 1  # the most similar template of its number of words
    UNKNOWN = 2


@dataclass(frozen=True)
class MinerSettings:
    """How templates are mined.

    Attributes:
        similarity: share of words that a line and a template have in common at least (Drain's similarity threshold).
        depth: levels of Drain's tree, at least 3.
        max_templates: at most so many; the rarest beyond that become unknown.
        nearest: lines that fit no template get the most similar one above ``similarity``, else the unknown one.
        mask: regular expression of what varies; see `MASK`.
        unspaced: regular expression of a word in scripts without spaces; see `UNSPACED`.
    """

    similarity: float = 0.4
    depth: int = 4
    max_templates: int = 1000
    nearest: bool = False
    mask: str = MASK
    unspaced: str = UNSPACED


@dataclass(frozen=True)
class Template:
    """A template: its words with ``<*>`` for what varies, and how many lines of the training data it has."""

    text: str
    lines: int


@dataclass
class TemplateMiner:
    """Frozen templates; number n is ``templates[n - 1]``, 0 the unknown one.

    Attributes:
        dropped: lines of the training data whose template was beyond ``max_templates``.
    """

    templates: Sequence[Template]
    settings: MinerSettings = field(default_factory=MinerSettings)
    dropped: int = 0

    def __post_init__(self) -> None:
        self._by_text = {template.text: number for number, template in enumerate(self.templates, 1)}
        self._cache: dict[str, tuple[int, int]] = {}
        # built from the templates, never kept from mining: a loaded miner is the one that was saved
        self._exact: dict[str, Any] = {}
        self._drain = _Miner(self.settings)
        for number, template in enumerate(self.templates, 1):
            words = template.text.split()
            node = self._exact
            for word in words:
                node = node.setdefault(word, {})
            node.setdefault(END, number)
            cluster = LogCluster(words, number)
            self._drain.id_to_cluster[number] = cluster
            self._drain.add_seq_to_prefix_tree(self._drain.root_node, cluster)

    @classmethod
    def fit(cls, events: pl.LazyFrame, settings: MinerSettings | None = None) -> TemplateMiner:
        """Mine the templates of ``events`` (columns ``text`` and ``template`` of `EVENTS`), in their order.

        A template that stands in ``template`` (OpenTelemetry's ``log.record.template``) is taken as it is.
        """
        settings = settings or MinerSettings()
        drain, found = _Miner(settings), dict[str, list[int]]()  # text or number of the cluster: first row, lines
        for masked, given, row, count in _distinct(events, settings).iter_rows():
            key = f"={given}" if given is not None else str(drain.add_log_message(masked)[0].cluster_id)
            found.setdefault(key, [row, 0])[1] += count
        mined = {str(cluster.cluster_id): cluster.get_template() for cluster in drain.clusters}
        texts = {key: mined.get(key, key[1:]) for key in found}
        merged: dict[str, list[int]] = {}  # clusters that grew alike, and given templates that were mined too
        for key, (row, count) in found.items():
            entry = merged.setdefault(texts[key], [row, 0])
            entry[0], entry[1] = min(entry[0], row), entry[1] + count
        ranked = sorted(merged.items(), key=lambda item: (-item[1][1], item[1][0]))
        kept = sorted(ranked[: settings.max_templates], key=lambda item: item[1][0])
        dropped = sum(count for _, (_, count) in ranked[settings.max_templates :])
        return cls([Template(text, count) for text, (_, count) in kept], settings, dropped)

    def assign(self, events: pl.DataFrame) -> pl.DataFrame:
        """The templates of ``events`` (columns ``text``, ``template``): a frame with ``masked`` (the masked line),
        ``number`` (of the template) and ``match`` (`Match`), rows as they stand.
        """
        frame = events.select(masked(self.settings), pl.col("template").alias("given"))
        lines = frame.filter(pl.col("given").is_null())["masked"].unique(maintain_order=True)
        answers = [self._match(line) for line in lines]
        mined = pl.DataFrame(
            {"masked": lines, "number": [n for n, _ in answers], "match": [m for _, m in answers]},
            schema={"masked": pl.String, "number": pl.UInt32, "match": pl.UInt8},
        )
        given = frame["given"].drop_nulls().unique(maintain_order=True)
        numbers = [self._by_text.get(text, UNKNOWN) for text in given]
        named = pl.DataFrame(
            {"given": given, "number": numbers, "match": [Match.EXACT if n else Match.UNKNOWN for n in numbers]},
            schema={"given": pl.String, "number": pl.UInt32, "match": pl.UInt8},
        )
        frame = frame.join(mined, on="masked", how="left", maintain_order="left")
        frame = frame.join(named, on="given", how="left", maintain_order="left", suffix="_given")
        # a given template decides, even where the line fits a mined one
        choose = [
            pl.when(pl.col("given").is_null()).then(pl.col(c)).otherwise(pl.col(f"{c}_given")).alias(c)
            for c in ("number", "match")
        ]
        return frame.select("masked", *choose)

    def _match(self, line: str) -> tuple[int, int]:
        if (known := self._cache.get(line)) is not None:
            return known
        words = line.split()
        number, match = _walk(self._exact, words), Match.EXACT
        if not number and self.settings.nearest:
            cluster = self._drain.tree_search(self._drain.root_node, words, self.settings.similarity, True)
            number, match = (UNKNOWN if cluster is None else cluster.cluster_id), Match.NEAREST
        answer = (number, match.value if number else Match.UNKNOWN.value)
        if len(self._cache) >= CACHED:
            self._cache.clear()
        self._cache[line] = answer
        return answer

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` is the inverse."""
        templates = [asdict(template) for template in self.templates]
        return {"settings": asdict(self.settings), "templates": templates, "dropped": self.dropped}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TemplateMiner:
        """Raises KeyError or TypeError for values of another form."""
        templates = [Template(**template) for template in values["templates"]]
        return cls(templates, MinerSettings(**values["settings"]), values["dropped"])

    @property
    def digest(self) -> str:
        """Names the templates, their order and all that decides about the template of a line."""
        return digest(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write one JSON file, whole or not at all."""
        save_sealed(path, "log templates", self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> TemplateMiner:
        """Raises PlantDataError if the file is none of `save`, or was changed."""
        return cls.from_dict(load_sealed(path, "log templates"))


def masked(settings: MinerSettings) -> pl.Expr:
    """The column ``text`` with ``<*>`` for what varies and spaces between words, at most `LONGEST` characters; null is
    an empty text.
    """
    text = pl.col("text").fill_null("").str.replace_all(settings.mask, "${1}${2}" + WILDCARD)
    text = text.str.replace_all(settings.unspaced, " ${0} ")
    return text.str.head(LONGEST).alias("masked")


def _distinct(events: pl.LazyFrame, settings: MinerSettings) -> pl.DataFrame:
    """(masked line, given template, first row, count), by first row; of lines with a given template one of them."""
    frame = events.with_row_index("row").select(masked(settings), pl.col("template").alias("given"), "row")
    key = pl.when(pl.col("given").is_null()).then(pl.col("masked")).alias("key")
    groups = frame.group_by(key, "given").agg(pl.col("row").min(), pl.len().alias("count"))
    return groups.select("key", "given", "row", "count").sort("row").collect(engine="streaming")


class _Miner(Drain):
    """Drain that compares a line with at most `LEAF` templates of a leaf: free text would make it quadratic."""

    def __init__(self, settings: MinerSettings) -> None:
        super().__init__(depth=settings.depth, sim_th=settings.similarity, param_str=WILDCARD)

    def fast_match(
        self, cluster_ids: Any, tokens: Sequence[str], sim_th: float, include_params: bool
    ) -> LogCluster | None:
        # the leaf itself: Drain copies it for each new template
        if isinstance(cluster_ids, list) and len(cluster_ids) > LEAF:
            del cluster_ids[LEAF // 2 : -LEAF // 2]
        return super().fast_match(cluster_ids, tokens, sim_th, include_params)


def _walk(tree: Mapping[str, Any], words: Sequence[str]) -> int:
    """Number of the template that fits all ``words``, the one with its words before wildcards furthest left; else 0."""
    paths = [(tree, 0)]
    while paths:
        node, at = paths.pop()
        if at == len(words):
            if END in node:
                return int(node[END])
            continue
        # the last one is tried first
        paths += [(node[word], at + 1) for word in dict.fromkeys((WILDCARD, words[at])) if word in node]
    return UNKNOWN


def digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, whatever the order of their keys."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def save_sealed(path: str | Path, kind: str, values: Mapping[str, Any]) -> None:
    """Write values with their digest, whole or not at all."""
    write_json(path, {"kind": kind, "format": FORMAT, **values, "sha256": digest(values)})


def load_sealed(path: str | Path, kind: str) -> dict[str, Any]:
    """What `save_sealed` wrote.

    Raises:
        PlantDataError: the file is missing, cut off, of another kind or format, or was changed.
    """
    ways = ["give the file that this version saved", "make it again from the training data", "restore it from a backup"]
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise PlantDataError("is not there", ways, file=path) from None
    except ValueError as error:
        raise PlantDataError(str(error), ways, file=path) from None
    if not isinstance(values, dict) or values.pop("kind", None) != kind:
        raise PlantDataError(f"holds no {kind}", ways, file=path)
    if (number := values.pop("format", None)) != FORMAT:
        raise PlantDataError(f"is of format {number!r}, this version reads {FORMAT}", ways, file=path)
    if values.pop("sha256", None) != digest(values):
        raise PlantDataError("was changed since it was saved: its digest does not fit", ways, file=path)
    return values
