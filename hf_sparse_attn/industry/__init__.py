"""Logs and sensor records of plants: read with provenance, checked, turned into tokens and judged against baselines."""
