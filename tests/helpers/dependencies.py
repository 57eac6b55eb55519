"""What installed packages require, read from their metadata."""

from __future__ import annotations

import re
from importlib.metadata import Distribution, distribution

from packaging.requirements import Requirement


def normalised(name: str) -> str:
    """The name of a distribution as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: list[str]) -> dict[str, Distribution]:
    """The installed distributions that ``requirements`` bring on this machine, by normalised name."""
    todo, distributions = [Requirement(text) for text in requirements], {}
    while todo:
        wanted = todo.pop()
        name = normalised(wanted.name)
        if name in distributions:
            continue
        distributions[name] = distribution(wanted.name)
        for required in map(Requirement, distributions[name].requires or ()):
            marker = required.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted.extras or {""}):
                todo.append(required)
    return distributions
