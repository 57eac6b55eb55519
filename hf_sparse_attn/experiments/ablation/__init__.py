"""Ablation: which part of the sparse attention brings what, one factor at a time."""
