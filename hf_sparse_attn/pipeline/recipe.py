"""Recipes: YAML deltas against ``defaults.yaml``, checked key by key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..config import SparseAttentionConfig
from ..data.questions import QUOTED_TASK
from ..data.ruler import RULER
from ..evaluation.allocations import FITTED
from ..precision import DTYPES
from ..training.adaptation import AdaptationConfig
from ..training.distiller import DistillationConfig

SELECTIONS = ("oracle", "two stages", "stage 1 alone", "untrained", "mean-pool", "min-max", "window + sink", "random")
TASKS = ("causal_lm", "questions", "classification", "forecasting", "ablation", "robustness", "longlink")


class RecipeError(ValueError):
    """A recipe that cannot be run; the message says which key and what is allowed."""


@dataclass(frozen=True)
class Quality:
    """One length at which quality is measured."""

    length: int
    windows: int
    budgets: tuple[int, ...]
    decode_tokens: int = 256
    selections: tuple[str, ...] = SELECTIONS
    fit_windows: int = 4  # of other text, on which the selections whose average is fitted are

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", tuple(self.budgets))
        object.__setattr__(self, "selections", tuple(self.selections))
        known = (*SELECTIONS, *FITTED)
        unknown = sorted(set(self.selections) - set(known))
        if unknown:
            raise RecipeError(f"quality.selections names {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
        needed = {"oracle", "window + sink"} - set(self.selections)
        if needed:
            raise RecipeError(f"quality.selections must hold {', '.join(sorted(needed))}: the shares are measured between them")
        if self.fit_windows < 1:
            raise RecipeError(f"quality.fit_windows is {self.fit_windows}: must be >= 1")
        if not self.budgets or self.windows < 1 or not 0 <= self.decode_tokens < self.length // 2:
            raise RecipeError("quality needs at least one budget and one window, and decode_tokens below half the length")

    @property
    def is_fitted(self) -> bool:
        """Some selection keeps a number of keys on average that is fitted first."""
        return bool(set(self.selections) & set(FITTED))


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; keys as documented in ``recipes/defaults.yaml``."""

    name: str
    task: str
    seed: int
    minutes: float | None
    model: dict[str, Any]
    sparse_attention: SparseAttentionConfig
    data: dict[str, Any]
    series: dict[str, Any]
    distill: dict[str, Any]
    lora: dict[str, Any]
    compare: dict[str, Any]
    ablate: dict[str, Any]
    robustness: dict[str, Any]
    longlink: dict[str, Any]
    quality: tuple[Quality, ...]
    speed: dict[str, Any]
    prompt: str | None
    max_new_tokens: int
    smoke_run: bool
    raw: dict[str, Any] = field(repr=False)

    @property
    def distillation(self) -> DistillationConfig:
        return DistillationConfig(**{"seed": self.seed, **self.distill["settings"]})

    @property
    def adaptation(self) -> AdaptationConfig:
        return AdaptationConfig(**{"seed": self.seed, **self.lora["settings"]})


def load_recipe(path: str | Path, *, smoke: bool = False, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe and the ``defaults.yaml`` beside it.

    ``smoke`` lays the recipe's ``smoke`` section over it, ``changes`` are further ``key.path=value`` settings (values as in YAML).

    Raises:
        RecipeError: no such file, not YAML, an unknown key, a value of the wrong kind, or a missing model or text.
    """
    path = Path(path)
    defaults = _read(path.with_name("defaults.yaml"))
    values = _merge(defaults, _read(path), defaults)
    reduced = values.pop("smoke")
    for delta in (*((reduced,) if smoke else ()), *map(_change, changes)):
        values = _merge(values, delta, {name: value for name, value in defaults.items() if name != "smoke"})
    if values["task"] != "longlink":  # which makes its model and data itself
        _check_sources(path, values)
    for key, value, known in (("model.dtype", values["model"]["dtype"], DTYPES), ("task", values["task"], TASKS)):
        if value not in known:
            raise RecipeError(f"{path}: {key} is {value!r}; supported: {', '.join(known)}")
    try:
        return _checked_recipe(values, smoke)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from error


def _check_sources(path: Path, values: dict[str, Any]) -> None:
    """Raise RecipeError unless the recipe names a model and the texts that its task reads."""
    if not values["model"]["source"]:
        raise RecipeError(f"{path}: model.source is missing")
    domains, data = values["robustness"]["domains"], values["data"]
    if values["task"] == "robustness":
        if not domains or not all(isinstance(texts, list) and texts and re.fullmatch(r"[\w-]+", name) for name, texts in domains.items()):
            raise RecipeError(
                f"{path}: robustness.domains is {domains!r}: must map names (of letters, digits, _ and -) to lists of sources"
            )
        return
    if not data["train"]:
        raise RecipeError(f"{path}: data.train names no text; give one with --set 'data.train=[FILE]'")
    split = data["split"]
    if bool(data["eval"]) == (split is not None) or (split is not None and not 0 < split < 1):
        raise RecipeError(f"{path}: data.eval names no text: name some, or set data.split to a share of each training text, but not both")


def _checked_recipe(values: dict[str, Any], smoke: bool) -> Recipe:
    names = {f.name for f in fields(Quality)}
    quality = tuple(Quality(**_checked(entry, names, f"quality[{i}]")) for i, entry in enumerate(values["quality"]))
    _checked(values["distill"]["settings"], {f.name for f in fields(DistillationConfig)}, "distill.settings")
    _checked(values["lora"]["settings"], {f.name for f in fields(AdaptationConfig)}, "lora.settings")
    unknown = sorted(set(values["data"]["questions"]) - {QUOTED_TASK, *RULER})
    if unknown or not values["data"]["questions"]:
        named = ", ".join(map(repr, unknown)) or "none"
        raise RecipeError(f"data.questions names {named}: must be of {', '.join((QUOTED_TASK, *RULER))}")
    sparse = SparseAttentionConfig.from_dict(values["sparse_attention"])
    recipe = Recipe(**{**values, "quality": quality, "sparse_attention": sparse}, smoke_run=smoke, raw=values)
    _ = recipe.distillation, recipe.adaptation
    if recipe.minutes is not None and not (isinstance(recipe.minutes, int | float) and recipe.minutes > 0):
        raise RecipeError(f"minutes is {recipe.minutes!r}: must be a number > 0, or null for all of the recipe")
    if recipe.minutes is not None and recipe.task != "causal_lm":
        raise RecipeError(f"minutes is {recipe.minutes}: only runs of task causal_lm are sized by time, this is of task {recipe.task}")
    if recipe.task == "questions" and any(entry.is_fitted for entry in quality):
        raise RecipeError(f"quality.selections of the task 'questions' must be of {', '.join(SELECTIONS)}")
    return recipe


def _change(text: str) -> dict[str, Any]:
    """``a.b=value`` as the delta ``{"a": {"b": value}}``."""
    keys, found, value = text.partition("=")
    if not found or not keys:
        raise RecipeError(f"--set {text!r}: must be key.path=value, e.g. 'lora.steps=4' or 'data.train=[my.log]'")
    try:
        delta = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text!r}: the value is not YAML: {error}") from error
    for key in reversed(keys.split(".")):
        delta = {key: delta}
    return delta  # type: ignore[no-any-return]


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such file (a recipe needs defaults.yaml beside it)") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML in UTF-8: {error}") from error
    if not isinstance(loaded, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, got {type(loaded).__name__}")
    return loaded


def _merge(values: dict[str, Any], delta: dict[str, Any], schema: dict[str, Any], where: str = "") -> dict[str, Any]:
    """``values`` with ``delta`` over it; ``schema``, the defaults, knows keys and kinds: mappings that are empty there take any key."""
    if schema:
        _checked(delta, set(schema), where or "the recipe")
    out = dict(values)
    for key, value in delta.items():
        old, name = schema.get(key), f"{where}.{key}" if where else key
        if isinstance(old, dict) or (not schema and isinstance(value, dict)):
            if not isinstance(value, dict):
                raise RecipeError(f"{name} is {value!r}: must be a mapping")
            inner = out.get(key)
            out[key] = _merge(inner if isinstance(inner, dict) else {}, value, old or {}, name)
            continue
        wrong = isinstance(old, list) != isinstance(value, list) or (type(old) is int and type(value) is not int)
        if wrong and old is not None:
            raise RecipeError(f"{name} is {value!r}: must be {'a list' if isinstance(old, list) else f'a {type(old).__name__}'}")
        out[key] = value
    return out


def _checked(values: Any, known: set[str], where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise RecipeError(f"{where} is {values!r}: must be a mapping")
    unknown = sorted(set(values) - known)
    if unknown:
        raise RecipeError(f"{where} has no key {', '.join(map(repr, unknown))}; keys: {', '.join(sorted(known))}")
    return values
