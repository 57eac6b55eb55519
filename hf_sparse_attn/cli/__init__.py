"""The command line, a file for each group of verbs."""

import sys

from ..system.extras import MissingExtraError
from ..system.old_names import names_of_module

__getattr__ = names_of_module("cli")


def main() -> None:
    """Entry point of ``hf-sparse-attn``; without the extra [cli] it says so and ends with exit code 2."""
    try:
        from .commands import main as run
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run()
