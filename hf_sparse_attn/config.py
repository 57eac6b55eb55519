"""`SparseAttentionConfig`: what a user can choose, validated on construction, and its JSON form."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NoReturn

IGNORE_INDEX = -100  # label of a token that has no loss
KEY = "sparse_attention"  # of a Transformers config, under which the settings stand
ATTN_IMPLEMENTATION = "hf_sparse"  # what sparse models name as their attention implementation
CONFIG_VERSION = 1
MOST_KEYS = 2**31 - 1  # of lengths and budgets, which count tokens
MOST_FEATURES = 2**16
MOST_FACTOR = 1e9  # what passes everything on is far below
FILE_NAME = re.compile(r"\w[\w.-]{0,98}\.json")
BLOCK_SIZES = (16, 32, 64, 128)
QUERY_TILES = (1, 16, 32, 64, 128)
BUDGET_FIELDS = ("density", "min_keys", "max_keys")  # what a mass_threshold is fitted for
FIXED_FIELDS = ("block_size", "router_dim", "index_dim")  # the routers' weights depend on these


def fixed_budget(keys: int | None) -> dict[str, Any]:
    """Fields of `SparseAttentionConfig` at which every tile may keep ``keys`` keys; None changes nothing."""
    return {} if keys is None else {"min_keys": keys, "max_keys": keys, "mass_threshold": None}


@dataclass(frozen=True)
class Bookkeeping:
    """What the library writes into a saved config; users do not choose these."""

    version: int = CONFIG_VERSION  # layout of this dict
    trained: bool = False  # the routers were trained: a checkpoint without router weights is refused
    calibration: str | None = None  # file name of a calibration beside config.json, None if there is none

    def __post_init__(self) -> None:
        if self.version != CONFIG_VERSION:
            raise ValueError(
                f"sparse_attention.bookkeeping.version is {self.version!r}; this hf_sparse_attn reads version "
                f"{CONFIG_VERSION}: "
                "install the version of hf_sparse_attn that wrote the checkpoint"
            )
        if not isinstance(self.trained, bool):
            raise ValueError(f"sparse_attention.bookkeeping.trained is {self.trained!r}: must be true or false")
        if self.calibration is not None and not (
            isinstance(self.calibration, str) and FILE_NAME.fullmatch(self.calibration)
        ):
            raise ValueError(
                f"sparse_attention.bookkeeping.calibration is {self.calibration!r}: must be null or the "
                "name of a .json file beside config.json"
            )


@dataclass(frozen=True)
class SparseAttentionConfig:
    """How a model's attention is made sparse. Lengths are in tokens; docs/concepts.md explains the terms.

    Raises:
        ValueError: a field has an impossible value; the message names field, value and what is allowed.
    """

    block_size: int = 16  # keys of one block, the unit of selection: 16, 32, 64 or 128
    query_tile: int = 64  # consecutive queries that share one selection at prefill and training
    density: float = 0.125  # share of the visible keys that a query tile may keep, in (0, 1]
    min_keys: int = 512  # a tile keeps at least this many keys (forced ones included) if that many are visible
    max_keys: int | None = None  # and at most this many; None = no cap
    # budgets that vary: keep candidates with at least this share of a tile's softmax mass; see docs/budgets.md
    mass_threshold: float | None = None
    candidate_factor: float = 3.0  # stage 1 passes this many times the budget on to stage 2, >= 1
    sink: int = 16  # the first tokens, always kept
    local: int = 64  # tokens before a tile's first query, always kept
    dense_below: int = 2048  # calls with fewer keys than this run the stock attention
    dense_layers: tuple[int, ...] = ()  # indices of layers that stay dense
    # (layer, KV head) of heads that look single tokens up: stage 1 is left out, all their blocks are candidates
    retrieval_heads: tuple[tuple[int, int], ...] = ()
    router_dim: int | None = None  # feature size of stage 1, at least the head dim; None = 2 × head dim
    index_dim: int | None = None  # rank of stage 2's token scores; None = the head dim, i.e. exact q·k at the start
    query_samples: int = 32  # queries of a tile that stage 2 scores
    bookkeeping: Bookkeeping = field(default_factory=Bookkeeping)

    def __post_init__(self) -> None:
        if isinstance(self.dense_layers, list):
            object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        if isinstance(self.bookkeeping, Mapping):
            _check_names(self.bookkeeping, Bookkeeping, "sparse_attention.bookkeeping")
            object.__setattr__(self, "bookkeeping", Bookkeeping(**self.bookkeeping))
        self._check_types()
        if self.block_size not in BLOCK_SIZES:
            self._refuse("block_size", f"one of {BLOCK_SIZES}")
        if self.query_tile not in QUERY_TILES:
            self._refuse("query_tile", f"one of {QUERY_TILES}")
        if not 0 < self.density <= 1:
            self._refuse("density", "a share in (0, 1]")
        if not 1 <= self.candidate_factor <= MOST_FACTOR:
            self._refuse("candidate_factor", f"a finite number >= 1, at most {MOST_FACTOR:.0e}")
        if self.mass_threshold is not None and not 0 < self.mass_threshold < 1:
            self._refuse("mass_threshold", "None or a share in (0, 1)")
        for name, least in (("sink", 0), ("local", 0), ("dense_below", 0), ("query_samples", 1), ("min_keys", 1)):
            if not least <= getattr(self, name) <= MOST_KEYS:
                self._refuse(name, f"an integer >= {least}, at most {MOST_KEYS}")
        for name in ("router_dim", "index_dim"):
            value = getattr(self, name)
            if value is not None and (not 2 <= value <= MOST_FEATURES or value % 2):
                self._refuse(name, f"None or an even integer >= 2, at most {MOST_FEATURES}")
        if any(not 0 <= layer <= MOST_FEATURES for layer in self.dense_layers):
            self._refuse("dense_layers", "layer indices >= 0")
        if any(not 0 <= number <= MOST_FEATURES for pair in self.retrieval_heads for number in pair):
            self._refuse("retrieval_heads", "pairs of a layer index and a KV head, both >= 0")
        object.__setattr__(self, "retrieval_heads", tuple(sorted({(int(a), int(b)) for a, b in self.retrieval_heads})))
        if self.min_keys < self.forced_keys:
            self._refuse(
                "min_keys",
                f">= {self.forced_keys}, the keys that sink, local and the tile itself force (in whole blocks)",
            )
        if self.max_keys is not None and not self.min_keys <= self.max_keys <= MOST_KEYS:
            self._refuse("max_keys", f"None or >= min_keys ({self.min_keys}), at most {MOST_KEYS}")

    def _refuse(self, name: str, allowed: str) -> None:
        raise ValueError(f"sparse_attention.{name} is {getattr(self, name)!r}: must be {allowed}")

    def _check_types(self) -> None:
        numbers = {"density", "candidate_factor", "mass_threshold"}
        optional = {"max_keys", "mass_threshold", "router_dim", "index_dim"}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "bookkeeping":
                if not isinstance(value, Bookkeeping):
                    self._refuse(f.name, "a dict of bookkeeping fields")
            elif f.name == "dense_layers":
                if not isinstance(value, tuple) or not all(type(layer) is int for layer in value):
                    self._refuse(f.name, "a list of layer indices")
            elif f.name == "retrieval_heads":
                pairs = value if isinstance(value, list | tuple) else [()]
                if not all(isinstance(p, list | tuple) and [type(n) for n in p] == [int, int] for p in pairs):
                    self._refuse(f.name, "a list of pairs [layer, KV head]")
            elif value is None and f.name in optional:
                continue
            elif type(value) is not int and not (f.name in numbers and type(value) is float):
                self._refuse(f.name, "a number" if f.name in numbers else "an integer")

    @property
    def forced_keys(self) -> int:
        """Most keys that the forced links of one tile can hold, in whole blocks."""
        sink = -(-self.sink // self.block_size)
        return self.block_size * (sink + max(self.near_blocks(self.query_tile), self.near_blocks(1)))

    def near_blocks(self, query_tile: int) -> int:
        """Most blocks that ``local`` tokens and a tile of ``query_tile`` touch together."""
        # n tokens at any offset touch at most ⌊(n + S − 2) / S⌋ + 1 blocks of S
        span = self.local + query_tile
        aligned = query_tile % self.block_size == 0
        return (
            -(-self.local // self.block_size) + query_tile // self.block_size
            if aligned
            else (span + self.block_size - 2) // self.block_size + 1
        )

    # ⌈clamp(⌈density · visible⌉, min_keys, max_keys) / block_size⌉
    def budget_blocks(self, visible: int) -> int:
        """Blocks that a tile may keep, forced ones included, when its last query sees ``visible`` keys."""
        keys = max(math.ceil(self.density * visible), self.min_keys)
        keys = keys if self.max_keys is None else min(keys, self.max_keys)
        return -(-keys // self.block_size)

    def resolved_router_dim(self, head_dim: int) -> int:
        """``router_dim`` for this head dim. Raises ValueError if it is smaller than the head dim."""
        value = 2 * head_dim if self.router_dim is None else self.router_dim
        if value < head_dim:
            self._refuse("router_dim", f">= the head dim of this model, {head_dim} (or None)")
        return value

    def resolved_index_dim(self, head_dim: int) -> int:
        """``index_dim`` for this head dim. Raises ValueError if it is larger than the head dim."""
        value = head_dim if self.index_dim is None else self.index_dim
        if value > head_dim:
            self._refuse("index_dim", f"<= the head dim of this model, {head_dim} (or None)")
        return value

    def changed(self, **changes: Any) -> SparseAttentionConfig:
        """A validated copy with some fields changed. Raises ValueError for an unknown field."""
        _check_names(changes, SparseAttentionConfig, "sparse_attention")
        return replace(self, **changes)

    def mark_trained(self) -> SparseAttentionConfig:
        return replace(self, bookkeeping=replace(self.bookkeeping, trained=True))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dict; `from_dict` is its inverse."""
        return {
            **asdict(self),
            "dense_layers": list(self.dense_layers),
            "retrieval_heads": [list(pair) for pair in self.retrieval_heads],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseAttentionConfig:
        """Read a dict of fields. Raises ValueError for an unknown field or an impossible value."""
        if not isinstance(values, Mapping):
            raise ValueError(f"sparse_attention is {values!r}: must be a dict of fields or a SparseAttentionConfig")
        _check_names(values, SparseAttentionConfig, "sparse_attention")
        return cls(**values)

    @classmethod
    def coerce(cls, value: SparseAttentionConfig | Mapping[str, Any]) -> SparseAttentionConfig:
        """A config from a config, a dict, or what a Transformers config holds."""
        if isinstance(value, StoredSettings):
            return value.settings
        return value if isinstance(value, SparseAttentionConfig) else cls.from_dict(value)


def _refuse_edit(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "config.sparse_attention cannot be edited in place: a model would not notice. Of a model change it with "
        "hf_sparse_attn.set_sparse_attention(model, density=0.25); in a config without a model replace it whole: "
        'config.sparse_attention = {**config.sparse_attention, "density": 0.25}'
    )


class FrozenList(list[Any]):
    """A list that refuses to be edited."""

    __setitem__ = __delitem__ = __iadd__ = __imul__ = append = extend = insert = remove = pop = clear = sort = (
        reverse
    ) = _refuse_edit

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self),)

    def __deepcopy__(self, memo: Any) -> FrozenList:
        return self


class FrozenDict(dict[str, Any]):
    """A dict that refuses to be edited."""

    __setitem__ = __delitem__ = __ior__ = update = setdefault = popitem = clear = _refuse_edit

    def pop(self, key: str, *default: Any) -> Any:
        """As of a dict, as long as that changes nothing:
        Transformers' ``to_dict`` takes keys out that are not there.
        """
        return default[0] if default and key not in self else _refuse_edit(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)

    def __deepcopy__(self, memo: Any) -> FrozenDict:
        return self


class SettingsHolder:
    """What the routers of one model run with: they all refer to it, so that it is changed in one place."""

    def __init__(self, settings: SparseAttentionConfig) -> None:
        self.settings = settings


class StoredSettings(FrozenDict):
    """``config.sparse_attention`` of a Transformers config: the fields of its ``settings``, not to be edited.

    ``in_use``: the routers of a model run with them.
    """

    def __init__(self, settings: SparseAttentionConfig, in_use: bool = False) -> None:
        values = settings.to_dict()
        frozen = {
            "dense_layers": FrozenList(values["dense_layers"]),
            "retrieval_heads": FrozenList(map(FrozenList, values["retrieval_heads"])),
            "bookkeeping": FrozenDict(values["bookkeeping"]),
        }
        super().__init__({**values, **frozen})
        self.settings, self.in_use = settings, in_use

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.settings, self.in_use)

    def __deepcopy__(self, memo: Any) -> StoredSettings:
        # of its own: what is made from the copy does not use the original
        return StoredSettings(self.settings, self.in_use)

    def replaced(self, value: SparseAttentionConfig | Mapping[str, Any] | None) -> StoredSettings | None:
        """What is stored where ``value`` is assigned. Raises ValueError if a model runs with other settings."""
        settings = None if value is None else SparseAttentionConfig.coerce(value)
        if self.in_use and settings != self.settings:
            raise ValueError(
                "config.sparse_attention of a model cannot be replaced: its routers would not notice. Call "
                "hf_sparse_attn.set_sparse_attention(model, …), hf_sparse_attn.to_dense(model), or make a config for "
                "another model with "
                "AutoConfig.from_pretrained(…, sparse_attention={…})"
            )
        return None if settings is None else StoredSettings(settings, self.in_use)


def _check_names(values: Mapping[str, Any], cls: type, where: str) -> None:
    known = [f.name for f in fields(cls)]
    unknown = sorted(set(values) - set(known), key=str)
    if unknown:
        raise ValueError(f"{where} has no field {', '.join(map(repr, unknown))}; fields: {', '.join(known)}")
