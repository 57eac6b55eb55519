"""What the names in a report mean, in sentences for readers who have never seen the project."""

from __future__ import annotations

from collections.abc import Iterable

SELECTIONS = {
    "dense": "Ordinary attention, which reads every key. All others are compared with it.",
    "dense, dense LoRA": "Ordinary attention, in a model that was trained with LoRA under it: the yardstick for the "
    "other trained rows.",
    "oracle": "The blocks that dense attention gives the most weight. It needs dense attention itself, so it only "
    "shows what is possible.",
    "two stages": "This model. A trained router picks the blocks: a coarse stage proposes candidates, a fine stage "
    "chooses among them.",
    "stage 1 alone": "The coarse stage of the same router chooses.",
    "untrained": "The router of this model before it was trained.",
    "mean-pool": "The mean of a block's keys stands for the block. Nothing is trained.",
    "min-max": "The blocks whose keys could reach the largest score, a bound known from Quest. Nothing is trained.",
    "mean-std": "The mean and the spread of a block's scores stand for the block. Nothing is trained.",
    "window + sink": "A sliding window: the first tokens of the text and the nearest ones, whatever the text says.",
    "random": "Blocks that are drawn at random.",
    "two stages by threshold": "The same router, which keeps more blocks where attention is spread out and fewer "
    "where it is not.",
    "two stages by corrected threshold": "The same, with the average corrected while the text is read.",
    "two stages by head": "The same router, with a budget of its own for every layer and KV head.",
    "two stages by top-p": "The same router, which keeps blocks until their estimated weight reaches a share.",
    "oracle by threshold": "The oracle, which keeps more blocks where attention is spread out.",
    "calibrated": "This model, with a budget of its own for every layer and KV head.",
    "uniform": "This model, with the same budget for every layer and KV head.",
    "largest class": "Always the commonest class. It reads nothing.",
    "last value": "Repeats the last value. It reads nothing else.",
    "one period before": "Repeats the values of one period before.",
}


def explained(names: Iterable[str]) -> list[tuple[str, str]]:
    """The names, each once, with their sentences; names that a page explains where it uses them have none and are left
    out.
    """
    return [(name, SELECTIONS[name]) for name in dict.fromkeys(names) if name in SELECTIONS]
