"""Which key blocks a query tile reads: the two-stage router, its budgets and its selections."""

from ..system.old_names import names_of_module

__getattr__ = names_of_module("router")
