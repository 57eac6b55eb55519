"""Optional packages: which extra of this package brings each, and one sentence with the command where one
is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

EXTRAS = {  # extra of pyproject.toml: the modules that it brings and this package imports
    "cli": ("typer", "rich"),
    "report": ("matplotlib",),
    "data": ("gguf", "zstandard"),
    "triton": ("triton",),
    "trl": ("trl",),
    "lm-eval": ("lm_eval",),
    "industry": ("polars", "pandera", "drain3", "ruptures", "sklearn", "scipy", "pyod"),
}


class MissingExtraError(ImportError):
    """A package of an extra is not installed; the message says what needs it, and the command that installs it."""


def install_command(extra: str) -> str:
    """What installs an extra, to be pasted into a shell."""
    return f"pip install 'hf_sparse_attn[{extra}]'"


def missing_packages(extra: str) -> list[str]:
    """The modules of an extra that are not installed."""
    return [module for module in EXTRAS[extra] if find_spec(module) is None]


@contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Around the imports of an extra's packages; ``purpose`` says in the message what needs them.

    Raises:
        MissingExtraError: one of them is not installed. An import that fails for another reason raises as it did.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        # the error may name a module inside of the package
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS[extra]:
            raise
        raise _missing(extra, purpose, module) from None


def require_extra(extra: str, purpose: str) -> None:
    """Before long work whose end needs an extra. Raises MissingExtraError where a package of it is not installed."""
    for module in missing_packages(extra):
        raise _missing(extra, purpose, module)


def extra_states() -> dict[str, str]:
    """Every extra with "installed", or with what is missing and the command that installs it."""
    missing = {extra: ", ".join(missing_packages(extra)) for extra in EXTRAS}
    return {
        extra: f"{names} missing: {install_command(extra)}" if names else "installed"
        for extra, names in missing.items()
    }


def _missing(extra: str, purpose: str, module: str) -> MissingExtraError:
    return MissingExtraError(f"{purpose} needs {module}, which is not installed: {install_command(extra)}", name=module)
