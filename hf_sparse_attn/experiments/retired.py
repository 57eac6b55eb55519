"""What recipes could name until commit 7897bf2 and ablations found worse than, or equal to, what is there instead."""

from __future__ import annotations

from collections.abc import Iterable

RETIRED: dict[str, dict[str, str]] = {
    "quality.selections": {
        "two stages by corrected threshold": "a threshold that followed what earlier windows kept; use 'two stages by "
        "threshold'",
        "two stages by top-p": "no better than a uniform budget; use 'two stages by threshold' or 'two stages by head'",
    },
    "ablate.factors": {
        "pooling of stage 1": "features of the mean alone, no different; stage 1 pools max, min and mean",
        "keys that are pooled": "keys after RoPE, no different; stage 1 pools un-rotated keys",
        "target of the distillation": "the largest mass and the output's norm, no gain; routers learn the block mass",
        "cut blocks": "a pooled key and value for each, worse; cut blocks are left out",
    },
}


def retired(names: Iterable[str], where: str) -> str:
    """What a message about unknown ``names`` of ``where`` adds: those that were known once, and what to use instead."""
    known = RETIRED[where]
    return "".join(f". {name!r} was removed ({known[name]})" for name in names if name in known)
