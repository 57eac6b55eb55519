"""Exports of a plant -> a tidy dataset with provenance, and a report on its health."""
