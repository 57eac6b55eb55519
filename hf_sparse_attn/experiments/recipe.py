"""Recipes: YAML deltas against ``defaults.yaml``, checked key by key. A recipe is data: what it may set is a list."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..config import SparseAttentionConfig
from ..data.questions import QUOTED_TASK
from ..evaluation.baselines import selector_names
from ..system.precision import DTYPES
from ..training.config import ALLOWED, FROM_SCRATCH, NETWORK, AdaptationConfig, DistillationConfig, without_target
from .longlink.families import LongLinkConfig
from .recipe_values import RecipeError as RecipeError
from .recipe_values import change, check_names, defaults, find_recipe, merge, pinned, read_recipe
from .retired import retired
from .rows.ruler import RULER
from .scores.budget_allocation import FITTED
from .tasks.keys import READS, check_read, read_by, stated
from .value_kinds import checked_fields, fitted

STAGES = {"distill": DistillationConfig, "lora": AdaptationConfig}
WHOLE = {f.name for f in fields(SparseAttentionConfig)} - {"density", "candidate_factor", "mass_threshold"}
MOST_TOKENS = 2**31 - 1  # of a length that is measured
PATCHTST: dict[str, Any] = {  # fields of PatchTSTConfig; the others follow from the data and from series
    **dict.fromkeys(("d_model", "ffn_dim", "num_hidden_layers", "num_attention_heads", "num_parallel_samples"), int),
    **dict.fromkeys(("attention_dropout", "positional_dropout", "path_dropout", "ff_dropout", "head_dropout"), float),
    **dict.fromkeys(("norm_eps", "init_std"), float),
    **dict.fromkeys(("share_embedding", "channel_attention", "bias", "pre_norm", "share_projection"), bool),
    **dict.fromkeys(("norm_type", "activation_function", "positional_encoding_type", "scaling", "loss"), str),
}


@dataclass(frozen=True)
class Quality:
    """One length at which quality is measured."""

    length: int
    windows: int
    budgets: tuple[int, ...]
    decode_tokens: int = 256
    selections: tuple[str, ...] = field(default_factory=selector_names)
    fit_windows: int = 4  # of other text, on which the selections whose average is fitted are

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", tuple(self.budgets))
        object.__setattr__(self, "selections", tuple(self.selections))
        known = (*selector_names(every=True), *FITTED)
        unknown = sorted(set(self.selections) - set(known))
        if unknown:
            hint = retired(unknown, "quality.selections")
            raise RecipeError(
                f"quality.selections names {', '.join(map(repr, unknown))}; known: {', '.join(known)}{hint}"
            )
        needed = {"oracle", "window + sink"} - set(self.selections)
        if needed:
            raise RecipeError(
                f"quality.selections must hold {', '.join(sorted(needed))}: the shares are measured between them"
            )
        if self.fit_windows < 1:
            raise RecipeError(f"quality.fit_windows is {self.fit_windows}: must be >= 1")
        if not self.budgets or self.windows < 1 or not 0 <= self.decode_tokens < self.length // 2:
            raise RecipeError(
                "quality needs at least one budget and one window, and decode_tokens below half the length"
            )
        if min(self.budgets) < 1 or self.length > MOST_TOKENS:
            raise RecipeError(
                f"quality has length {self.length}, budgets {list(self.budgets)}: must be whole numbers of tokens and "
                "keys"
            )

    @property
    def is_fitted(self) -> bool:
        """Some selection keeps a number of keys on average that is fitted first."""
        return bool(set(self.selections) & set(FITTED))


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; keys as documented in ``recipes/defaults.yaml``."""

    name: str
    task: str
    packages: dict[str, str | None]
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


def load_recipe(path: str | Path, *, smoke: bool = False, changes: Sequence[str] = (), network: bool = False) -> Recipe:
    """Read a recipe of that path, or of that name among those of this package; what it leaves out is as in
    ``defaults.yaml``.

    ``smoke`` lays the recipe's ``smoke`` section over it, ``changes`` are further ``key.path=value`` settings (values
    as in YAML). ``network`` lets it name training arguments that send something to other machines.

    Raises:
        RecipeError: no such file, not YAML, a key that is unknown, not allowed or not read by the task, a value of the
            wrong kind, or a missing model, text, or hash of a package.
    """
    file = find_recipe(path)
    try:
        known = defaults()
        # what comes later wins: defaults, the recipe, its smoke section, the command line
        written, changed = read_recipe(file), [change(text) for text in changes]
        values = merge(deepcopy(known), written, known)
        reduced = values.pop("smoke")
        for delta in (*((reduced,) if smoke else ()), *changed):
            # a change may not bring a smoke section, which was laid over already
            values = merge(values, delta, {name: value for name, value in known.items() if name != "smoke"})
        for key, value, allowed in (
            ("model.dtype", values["model"]["dtype"], DTYPES),
            ("task", values["task"], tuple(READS)),
        ):
            if value not in allowed:
                raise RecipeError(f"{key} is {value!r}; supported: {', '.join(allowed)}")
        if values["task"] != "longlink":  # which makes its model and data itself
            _check_sources(values)
        recipe = _checked_recipe(values, smoke, network)
        check_read([key for delta in (written, *changed) for key in stated(delta, known)], recipe.task)
        return recipe
    except (TypeError, ValueError, OverflowError) as error:
        raise RecipeError(f"{path}: {error}") from error


def _check_sources(values: dict[str, Any]) -> None:
    """Raise RecipeError unless the recipe names a model and the texts that its task reads."""
    if not values["model"]["source"]:
        raise RecipeError("model.source is missing")
    domains, data = values["robustness"]["domains"], values["data"]
    if values["task"] == "robustness":
        if not domains or not all(
            isinstance(texts, list) and texts and re.fullmatch(r"[\w-]+", name) for name, texts in domains.items()
        ):
            raise RecipeError(
                f"robustness.domains is {domains!r}: must map names (of letters, digits, _ and -) to lists of sources"
            )
        return
    if not data["train"]:
        raise RecipeError("data.train names no text; give one with --set 'data.train=[FILE]'")
    split = data["split"]
    if bool(data["eval"]) == (split is not None) or (split is not None and not 0 < split < 1):
        raise RecipeError(
            "data.eval names no text: name some, or set data.split to a share of each training text, but not both"
        )


def _checked_recipe(values: dict[str, Any], smoke: bool, network: bool) -> Recipe:
    quality = [_fields(entry, Quality, f"quality[{i}]") for i, entry in enumerate(values["quality"])]
    values["distill"]["settings"] = without_target(values["distill"]["settings"], "distill.settings")
    settings = {stage: _fields(values[stage]["settings"], cls, f"{stage}.settings") for stage, cls in STAGES.items()}
    _check_training_arguments(
        settings["lora"].get("training_arguments", {}), {}, "lora.settings.training_arguments", network
    )
    _check_training_arguments(values["series"]["pretrain"], FROM_SCRATCH, "series.pretrain", network)
    _allowed(values["series"]["model"], PATCHTST, "series.model")
    unknown = sorted(set(values["data"]["questions"]) - {QUOTED_TASK, *RULER})
    if unknown or not values["data"]["questions"]:
        named = ", ".join(map(repr, unknown)) or "none"
        raise RecipeError(f"data.questions names {named}: must be of {', '.join((QUOTED_TASK, *RULER))}")
    values = {
        **values,
        "quality": quality,
        **{stage: {**values[stage], "settings": stage_settings} for stage, stage_settings in settings.items()},
        "longlink": _fields(values["longlink"], LongLinkConfig, "longlink"),
        "sparse_attention": _sparse_attention(values["sparse_attention"]),
    }
    # the default of decode_tokens must not refuse a short length where it is not read
    unread = {} if "quality.decode_tokens" in READS[values["task"]] else {"decode_tokens": 0}
    parsed = {"quality": tuple(Quality(**{**unread, **entry}) for entry in quality), **_pinned_sources(values)}
    sparse = SparseAttentionConfig.from_dict(values["sparse_attention"])
    # a run sees the keys of its task only: reading another one raises
    read = read_by(values["task"], {**values, **parsed}, defaults())
    recipe = Recipe(**{**read, "sparse_attention": sparse}, smoke_run=smoke, raw=values)
    for stage, cls in STAGES.items():  # raises for values that do not go together
        cls(**{"seed": recipe.seed, **settings[stage]})
    LongLinkConfig(**recipe.longlink)
    if recipe.minutes is not None and not (isinstance(recipe.minutes, int | float) and recipe.minutes > 0):
        raise RecipeError(f"minutes is {recipe.minutes!r}: must be a number > 0, or null for all of the recipe")
    if recipe.minutes is not None and recipe.task != "causal_lm":
        raise RecipeError(
            f"minutes is {recipe.minutes}: only runs of task causal_lm are sized by time, this is of task {recipe.task}"
        )
    if recipe.task == "questions" and any(entry.is_fitted for entry in recipe.quality):
        raise RecipeError(
            f"quality.selections of the task 'questions' must be of {', '.join(selector_names(every=True))}"
        )
    return recipe


def _fields(values: Any, cls: type, where: str) -> dict[str, Any]:
    """Fields of a dataclass, known ones with values of their kind. Raises ValueError."""
    return checked_fields(check_names(values, {f.name for f in fields(cls)}, where), cls, where)


def _allowed(values: dict[str, Any], hints: dict[str, Any], where: str) -> None:
    """Raise ValueError for a key that is not among ``hints``, or a value of another kind."""
    for name in sorted(values):
        if name not in hints:
            raise RecipeError(f"{where}.{name} is not allowed in a recipe; allowed: {', '.join(sorted(hints))}")
        values[name] = fitted(values[name], hints[name], f"{where}.{name}")


def _check_training_arguments(values: dict[str, Any], more: dict[str, Any], where: str, network: bool) -> None:
    reaching = sorted(set(values) & set(NETWORK))
    if reaching and not network:
        raise RecipeError(
            f"{where}.{reaching[0]} sends what is trained, or what is known of it, to other machines: a recipe may "
            "not by itself. If that "
            "is what you want, give --allow-network"
        )
    _allowed(values, {**ALLOWED, **more, **(NETWORK if network else {})}, where)


def _sparse_attention(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of the settings, whole numbers written as 1e3 among them as such;
    the rest is checked where they are made.
    """
    if "bookkeeping" in values:
        raise RecipeError("sparse_attention.bookkeeping is written by this package: a recipe may not set it")
    return {name: int(v) if type(v) is float and name in WHOLE and v.is_integer() else v for name, v in values.items()}


def _pinned_sources(values: dict[str, Any]) -> dict[str, Any]:
    """The sections that name sources, with the hash of every package."""
    packages, model = values["packages"], values["model"]
    data = {key: pinned(values["data"][key], packages, f"data.{key}") for key in ("train", "eval", "fit")}
    domains = {
        name: pinned(texts, packages, f"robustness.domains.{name}")
        for name, texts in values["robustness"]["domains"].items()
    }
    source = None if model["source"] is None else pinned([model["source"]], packages, "model.source")[0]
    return {
        "model": {**model, "source": source},
        "data": {**values["data"], **data},
        "robustness": {**values["robustness"], "domains": domains},
    }
