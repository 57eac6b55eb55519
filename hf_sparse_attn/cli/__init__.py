"""The command line, a file for each group of verbs."""

import sys

from ..system.extras import MissingExtraError


def main() -> None:
    """Entry point of ``hf-sparse-attn``; without the extra [cli] it says so and ends with exit code 2."""
    try:
        from .commands import main as run
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run()
