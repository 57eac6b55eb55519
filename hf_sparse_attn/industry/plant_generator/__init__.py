"""A plant of our own: assets, channels, states, logs, planted causes and data faults, with the truth written down."""
