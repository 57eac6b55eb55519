"""What the source of Transformers says about a model type, read as text: no modeling module is imported."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import configuration_auto, modeling_auto

_CONFIGS: Any = configuration_auto  # its tables are not among its exports

# documentation names classes that the code does not use
_STRINGS = re.compile(r'"""(?:.|\n)*?"""')
# a line without indentation begins a statement of the module
_STATEMENTS = re.compile(r"^(?=[@A-Za-z_])", re.M)
_DEFINITION = re.compile(r"(?:class |def )?(\w+)(?=[ :(=])")  # tables of attention classes by name are assignments
_NAME = re.compile(r"\b[A-Za-z_]\w+")


@dataclass(frozen=True)
class ModelSource:
    """One model type: its config class and the definitions that its models reach in their own folder.

    Attributes:
        model_type: a key of Transformers' table of configs.
        config: the stock config class of that key.
        heads: names of the tables of Auto classes that know the type, e.g. CAUSAL_LM.
    """

    model_type: str
    config: type[PreTrainedConfig]
    heads: frozenset[str]

    @cached_property
    def models(self) -> dict[str, str]:
        """Source of the model classes of this type, by name."""
        defined = _definitions(_folder(self.model_type))
        named = {name: defined[name] for name in _auto_names(self.model_type) if name in defined}
        if named:
            return named
        # a model that no Auto class knows is told by the config that it takes
        takes = re.compile(rf"(?:config: |config_class = ){self.config.__name__}\b")
        taken = {name: text for name, text in defined.items() if takes.search(text)}
        return {name: text for name, text in taken.items() if "PreTrainedModel" in text.splitlines()[0]} or taken

    @cached_property
    def reached(self) -> dict[str, str]:
        """Source of every class and function that the models refer to, themselves included, by name."""
        defined = _definitions(_folder(self.model_type))
        # by name, wherever it stands in the text: too much is reached rather than too little
        seen, todo = dict[str, str](), list(self.models)
        while todo:
            name = todo.pop()
            if name in seen or name.endswith("PreTrainedModel"):  # the base class initialises parts of every type
                continue
            seen[name] = defined[name]
            todo += [other for other in set(_NAME.findall(defined[name])) if other in defined]
        return seen

    @cached_property
    def attention(self) -> dict[str, str]:
        """Those of the reached classes that are attention modules."""
        return {
            name: text
            for name, text in self.reached.items()
            if text.startswith("class ")
            # by name, or because it calls the interface; what is named after its mask, output or loss is none
            and (re.search(r"Attention(?!Mask|Output|Loss)|Attn", name) or "get_interface" in text)
        }

    @cached_property
    def routed(self) -> dict[str, str]:
        """Those of the attention modules that call Transformers' attention interface."""
        return {name: text for name, text in self.attention.items() if "get_interface" in text}

    @cached_property
    def text(self) -> str:
        """Everything reached."""
        return "\n".join(self.reached.values())

    @property
    def borrowed(self) -> list[str]:
        """Names of the model classes that the Auto classes give for this type, but that belong to another one."""
        return [] if self.models else _auto_names(self.model_type)

    @property
    def parts(self) -> dict[str, str]:
        """The models that this one is made of: their model types by field of its config, "" for one of any type."""
        model_types = {
            field: getattr(part, "model_type", "") for field, part in (self.config.sub_configs or {}).items()
        }
        known = _CONFIGS.CONFIG_MAPPING_NAMES
        return {
            field: part
            for field, part in model_types.items()
            if part in known or self.config.sub_configs[field] is AutoConfig
        }

    def wholes(self) -> dict[str, str]:
        """The model types beside this one whose configs hold its config: the field that holds it, by type."""
        return {
            whole.model_type: field
            # configs of composites stand in one module with those of their parts
            for whole in vars(sys.modules[self.config.__module__]).values()
            if isinstance(whole, type) and issubclass(whole, PreTrainedConfig)
            for field, part in (whole.sub_configs or {}).items()
            if part is self.config
        }


@cache
def model_source(model_type: str) -> ModelSource | None:
    """What the installed Transformers has under ``model_type``; None if it does not know it."""
    if model_type not in _CONFIGS.CONFIG_MAPPING_NAMES:
        return None
    # MODEL_FOR_CAUSAL_LM_MAPPING_NAMES is the head CAUSAL_LM
    heads = {
        name.removesuffix("_MAPPING_NAMES").removeprefix("MODEL_FOR_")
        for name, table in _auto_tables()
        if model_type in table
    }
    return ModelSource(model_type, getattr(transformers, _CONFIGS.CONFIG_MAPPING_NAMES[model_type]), frozenset(heads))


def installed_model_types() -> list[str]:
    """Every model type of the installed Transformers, by name; not those that a user registered."""
    return sorted(_CONFIGS.CONFIG_MAPPING_NAMES, key=str.lower)


def _auto_tables() -> Iterator[tuple[str, dict[str, str]]]:
    for name in dir(modeling_auto):
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES"):
            yield name, getattr(modeling_auto, name)


def _auto_names(model_type: str) -> list[str]:
    classes = [table[model_type] for _, table in _auto_tables() if model_type in table]
    return [name for names in classes for name in ((names,) if isinstance(names, str) else names)]


def _folder(model_type: str) -> Path | None:
    # found, not imported: modeling code loads much
    spec = importlib.util.find_spec(f"transformers.models.{_CONFIGS.model_type_to_module_name(model_type)}")
    return Path(spec.origin).parent if spec and spec.origin else None


@cache
def _definitions(folder: Path | None) -> dict[str, str]:
    """Source of the classes and functions of a model's folder without their documentation, by name."""
    files = [] if folder is None else sorted(folder.glob("modeling_*.py"))
    statements = [
        part for file in files for part in _STATEMENTS.split(_STRINGS.sub("", file.read_text(encoding="utf-8")))
    ]
    return {match[1]: part for part in statements if (match := _DEFINITION.match(part))}
