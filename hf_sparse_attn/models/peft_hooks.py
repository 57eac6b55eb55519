"""What PEFT does otherwise beside this package: adapter configs keep a key, and an adapter of a sparse model goes on no
dense one.

PEFT's own classes know neither, and PEFT is not imported for it: it is changed when somebody imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ..config import KEY
from .adapter_settings import ADVICE, put_settings, settings_of
from .adapter_states import router_sites


@cache
def watch_peft() -> None:
    """Change PEFT's classes: now where it is imported, else when it is."""
    for name, change in (("peft.config", _keep_settings), ("peft.tuners.tuners_utils", _refuse_on_dense)):
        if name in sys.modules:
            change(sys.modules[name])
        else:
            # in front of the finder that would otherwise be asked first
            sys.meta_path.insert(0, _OnImport(name, change))


class _OnImport(MetaPathFinder):
    """Calls ``change(module)`` once the module ``name`` was imported, as it is found without this finder."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name, self.change = name, change

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # not there: another import of the same module has taken it out
        if fullname != self.name or self not in sys.meta_path:
            return None
        # out of the way first: the search below goes through all finders again, this one included
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                # after the module's own code, and before whoever imports it goes on
                execute(module)
                self.change(module)

            loader.exec_module = execute_and_change
        return spec


def _keep_settings(module: ModuleType) -> None:
    """Let PEFT's configs save and load the key of the settings: they drop what is no field of theirs."""
    base = module.PeftConfigMixin
    to_dict, from_peft_type = base.to_dict, base.from_peft_type.__func__

    @wraps(to_dict)
    def with_settings(self: Any) -> dict[str, Any]:
        settings = getattr(self, KEY, None)
        return to_dict(self) if settings is None else {**to_dict(self), KEY: settings}

    # taken out before PEFT sees it, which warns of keys that it does not know and drops them
    def made_with_settings(cls: Any, /, **values: Any) -> Any:
        settings = values.pop(KEY, None)
        config = from_peft_type(cls, **values)
        if settings is not None:
            put_settings(config, settings)
        return config

    base.to_dict, base.from_peft_type = with_settings, classmethod(made_with_settings)


def _refuse_on_dense(module: ModuleType) -> None:
    """Let PEFT refuse an adapter of a sparse model on a model without routers, which would run without an error."""
    tuner = module.BaseTuner
    # PEFT's and Transformers' ways to put an adapter into a model's layers all end here
    inject = tuner.inject_adapter

    @wraps(inject)
    def refuse_or_inject(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        settings = settings_of(self.peft_config[adapter_name])
        if settings is not None and not router_sites(model):
            raise ValueError(
                f"adapter {adapter_name!r} cannot go on the dense {type(model).__name__}: "
                f"{ADVICE.format(settings=settings)}"
            )
        return inject(self, model, adapter_name, *args, **kwargs)

    tuner.inject_adapter = refuse_or_inject
