"""Memory and time of a training before it runs, from a step on tensors without storage and rates of the machine."""
