"""One call of one layer: documents, cache, routing, attention over the kept blocks or dense attention."""

from ..system.old_names import names_of_module

__getattr__ = names_of_module("attention")
