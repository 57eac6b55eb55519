"""Which key blocks a query tile reads: the two-stage router, its budgets and its selections."""
