"""Causal models of plants' tokens: trained on what comes next, read for surprise, next events and failures ahead."""
