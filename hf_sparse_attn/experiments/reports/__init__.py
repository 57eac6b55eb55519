"""Pages and model cards, rendered from results alone."""
