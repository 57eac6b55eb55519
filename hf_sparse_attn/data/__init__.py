"""Sources of models and texts, and windows of tokens."""
