"""What a reader that knows how the sequences are made gets right, and what guessing gets, in closed form."""

from __future__ import annotations

from .families import LongLinkConfig

CAUSES = {"two_hops": 2, "conjunction": 2}  # tokens that must be there, for the families where it is not one
VALUES = {"conjunction": 2}  # causes that carry a value, likewise


def chance(config: LongLinkConfig) -> float:
    """Accuracy of guessing among the values, which are uniform."""
    return 1 / config.values


# right = strength · (1 − corruption)^(causes with a value) · (1 − missing)^causes;
# accuracy = right + (1 − right) / V for V values
def ceiling(config: LongLinkConfig) -> float:
    """Accuracy of the best reader.

    What it reads and the answer agree where the link holds, no cause's value was replaced and no cause is missing; else
    one of the two is uniform and independent of the other, so that they agree by chance.
    """
    if config.family == "null":
        return chance(config)
    whole = (1 - config.corruption) ** VALUES.get(config.family, 1) * (1 - config.missing) ** CAUSES.get(
        config.family, 1
    )
    right = config.strength * whole
    return right + (1 - right) * chance(config)
