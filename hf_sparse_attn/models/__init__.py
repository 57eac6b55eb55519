"""Sparse model classes: made, attached, converted, saved, calibrated, with adapters."""
