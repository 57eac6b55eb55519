"""What recipes say, key by key: the file, the package's defaults, the changes, and which kind of value
belongs where.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from .plain_yaml import PlainYamlError, read_yaml
from .value_kinds import fitted, shown

TEXT, TEXTS = str | None, list[str]
HINTS: dict[str, Any] = {  # of keys whose default does not tell
    **dict.fromkeys(
        ("model.source", "model.name", "model.hub_id", "model.license", "prompt", "data.label", "series.time"), TEXT
    ),
    **dict.fromkeys(("series.machine", "series.time_format"), TEXT),
    **dict.fromkeys(
        ("data.train", "data.eval", "data.fit", "data.questions", "series.channels", "ablate.factors"), TEXTS
    ),
    **{
        "minutes": float | None,
        "data.split": float | None,
        "series.period": int | None,
        "robustness.contexts": list[int],
        "packages": dict[str, str | None],
    },
    **{"robustness.domains": dict[str, list[str]], "quality": list[Any]},
}
LEAST_ONE = {  # whole numbers of at least 1; the others are at least 0
    *(
        "distill.context",
        "distill.batches",
        "lora.context",
        "ablate.seeds",
        "ablate.repeats",
        "series.patch",
        "series.horizon",
    ),
    *("series.period", "speed.keys", "speed.repeats", "speed.attention_repeats", "max_new_tokens"),
}
MOST_SEED = 2**32 - 1  # of numpy's generators
# Windows keeps the names of devices for itself, with any ending
NAME = re.compile(r"(?!(?i:con|prn|aux|nul|com\d|lpt\d)(\.|$))\w[\w.-]{0,98}(?<!\.)")
SOURCE = re.compile(r"(?P<label>[\w-]+=)?(?P<kind>pypi|deb):(?P<package>[^:]*)(?P<rest>:.*)?", re.DOTALL)


class RecipeError(ValueError):
    """A recipe that cannot be run; the message says which key and what is allowed."""


def shipped_recipes() -> Traversable:
    """The folder of the recipes that come with this package."""
    packaged = files("hf_sparse_attn").joinpath("recipes")
    # the source tree
    return packaged if packaged.joinpath("defaults.yaml").is_file() else Path(__file__).parents[2] / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with this package."""
    files = (Path(file.name) for file in shipped_recipes().iterdir())
    return sorted(path.stem for path in files if path.suffix == ".yaml" and path.stem != "defaults")


def find_recipe(recipe: str | Path) -> Path | Traversable:
    """The file of a path or, where there is none, of the name of a recipe of this package.
    Raises RecipeError with all names.
    """
    if Path(recipe).is_file():
        return Path(recipe)
    if str(recipe) in recipe_names():
        return shipped_recipes().joinpath(f"{recipe}.yaml")
    raise RecipeError(f"{recipe}: no such file, and no recipe of this package, which are {', '.join(recipe_names())}")


def read_recipe(path: Path | Traversable) -> dict[str, Any]:
    """The keys that a file sets. Raises RecipeError."""
    try:
        loaded = read_yaml(path.read_text(encoding="utf-8"))
    except (PlainYamlError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML in UTF-8 that can be read: {error}") from error
    if not isinstance(loaded, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, got {type(loaded).__name__}")
    return loaded


@cache
def defaults() -> dict[str, Any]:
    """Every key with its default, which the package brings: what a stranger puts beside a recipe is not read.
    Not to be changed.
    """
    return read_recipe(shipped_recipes().joinpath("defaults.yaml"))


def change(text: str) -> dict[str, Any]:
    """``a.b=value`` of the command line as the delta ``{"a": {"b": value}}``. Raises RecipeError."""
    keys, separator, value = text.partition("=")
    if not separator or not all(keys.split(".")):
        raise RecipeError(f"--set {text[:80]!r}: must be key.path=value, e.g. 'lora.steps=4' or 'data.train=[my.log]'")
    if keys.count(".") > 8:
        raise RecipeError(f"--set {text[:80]!r}: no key is nested that deep")
    try:
        delta = read_yaml(value)
    except PlainYamlError as error:
        raise RecipeError(f"--set {text[:80]!r}: {keys} is not YAML that can be read: {error}") from error
    if isinstance(delta, dict) and not value.lstrip().startswith("{"):
        delta = value  # a text with a colon
    # from the inside out
    for key in reversed(keys.split(".")):
        delta = {key: delta}
    return delta  # type: ignore[no-any-return]


def merge(values: dict[str, Any], delta: dict[str, Any], schema: dict[str, Any], where: str = "") -> dict[str, Any]:
    """``values`` with ``delta`` over it; ``schema``, the defaults, knows keys and kinds: mappings that are empty there
    take any key.

    Raises:
        ValueError: an unknown key, or a value of the wrong kind.
    """
    if schema:
        check_names(delta, set(schema), where or "the recipe")
    out = dict(values)
    for key, value in delta.items():
        old, name = schema.get(key), f"{where}.{key}" if where else key
        if isinstance(old, dict) or (not schema and isinstance(value, dict)):
            if not isinstance(value, dict):
                raise RecipeError(f"{name} is {shown(value)}: must be a mapping")
            inner = out.get(key)
            out[key] = merge(inner if isinstance(inner, dict) else {}, value, old or {}, name)
            continue
        out[key] = _leaf(value, old, name) if schema else value
    return out


def _leaf(value: Any, default: Any, name: str) -> Any:
    value = fitted(value, HINTS.get(name, type(default)), name)
    # type, not isinstance: true is no whole number
    if type(value) is int and value < (least := int(name in LEAST_ONE)):
        raise RecipeError(f"{name} is {value}: must be a whole number >= {least}")
    if name == "name" and not NAME.fullmatch(value):
        raise RecipeError(
            f"name is {shown(value)}: must be of letters, digits, _, - and ., as a folder is called by it"
        )
    if name == "seed" and value > MOST_SEED:
        raise RecipeError(f"seed is {value}: must be a whole number from 0 to {MOST_SEED}")
    if name == "robustness.contexts" and not all(context >= 1 for context in value):
        raise RecipeError(f"robustness.contexts is {value}: must be whole numbers >= 1")
    return value


def check_names(values: Any, known: Iterable[str], where: str) -> dict[str, Any]:
    """``values``, whose keys must be ``known``. Raises RecipeError."""
    if not isinstance(values, dict):
        raise RecipeError(f"{where} is {shown(values)}: must be a mapping")
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise RecipeError(f"{where} has no key {', '.join(map(repr, unknown))}; keys: {', '.join(sorted(known))}")
    return values


def pinned(sources: Sequence[str], packages: Mapping[str, str | None], where: str) -> list[str]:
    """``sources`` with the hash that ``packages`` holds of every package.
    Raises RecipeError for a package without one.
    """
    return [_pinned(source, packages, f"{where}[{at}]") for at, source in enumerate(sources)]


def _pinned(source: str, packages: Mapping[str, str | None], where: str) -> str:
    match = SOURCE.fullmatch(source)
    # a source that names its hash already is left as it is
    if match is None or "@" in match["package"]:
        return source
    name = f"{match['kind']}:{match['package']}"
    if name not in packages:
        raise RecipeError(
            f"{where} is {source!r}, but packages has no sha256 of {name}: add it to the recipe, or "
            f"--set 'packages={{\"{name}\": SHA256}}'; null in its place takes any archive of that name"
        )
    sha256 = packages[name]
    if sha256 is None:
        return source
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise RecipeError(f"packages.{name} is {shown(sha256)}: must be a sha256, 64 digits of 0-9 and a-f, or null")
    return f"{match['label'] or ''}{name}@sha256={sha256.lower()}{match['rest'] or ''}"
