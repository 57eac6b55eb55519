"""The command line, a file for each group of verbs."""

from .commands import main

__all__ = ["main"]
