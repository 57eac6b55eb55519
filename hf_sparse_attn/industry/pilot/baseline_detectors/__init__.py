"""Detectors that plants use today, fitted on the training period and judged beside the language models."""
