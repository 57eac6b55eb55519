"""One call of one layer: documents, cache, routing, attention over the kept blocks or dense attention."""
