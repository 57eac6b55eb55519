"""A LongLink study of a model: answers and routing under every selection, by distance, under noise, on null and
counterfactual sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from hf_sparse_attn_kernels import BlockSelection
from transformers import PreTrainedModel

from ...attention.call import Selector, SparseCall
from ...evaluation.baselines import make_selectors
from ...evaluation.calibration_observers import visible_keys
from ...models.convert import sparse_attention_as
from ...router.module import RoutingInputs, SparseRouter
from ...system.progress import counted
from .cause_recall import Head, link_scores, necessity, using_heads
from .ceilings import ceiling, chance
from .families import LongLinkConfig
from .link_answers import accuracy, by_distance, pairs_told_apart, predicted, reach
from .planting import Planted, plant

NOISE: Sequence[tuple[str, tuple[float, ...]]] = (
    ("corruption", (0.0, 0.2, 0.4)),
    ("missing", (0.0, 0.2, 0.4)),
    ("strength", (1.0, 0.8, 0.6)),
)
LOOKALIKES = (0, 4, 8)  # distractors of a sequence
NULL_SEQUENCES = 4  # times those of the other sets: chance is met closely
OWN = "two stages"


def study(model: PreTrainedModel, config: LongLinkConfig, seed: int) -> dict[str, Any]:
    """Figures of a sparse ``model`` that learned the links of ``config``, at its present budget, on the sets of
    ``seed``.
    """
    planted = plant(config, seed)
    selectors = make_selectors()
    heads = using_heads(model, planted)
    # every selection reads the same sequences
    rows = [_answers(model, planted, "dense", SparseCall(dense=True))]
    rows += [_answers(model, planted, name, SparseCall(selector=selector)) for name, selector in selectors.items()]
    return {
        "config": asdict(config),
        "seed": seed,
        "chance": chance(config),
        "ceiling": ceiling(config),
        "density": density(model, planted),
        "heads": [{"layer": layer, "head": head, "mass": mass} for (layer, head), mass in heads.items()],
        "answers": rows,
        "routing": link_scores(model, planted, selectors, heads),
        "routing_of_single_queries": _single_queries(
            model, planted, {name: selectors[name] for name in (OWN, "oracle")}, heads
        ),
        "unseen": _unseen(model, config, seed),
        "necessity": necessity(model, planted, selectors[OWN]),
        "null": _null(model, config, seed, selectors, heads),
        "counterfactual": _counterfactual(model, config, seed) if config.family == "delayed" else None,
        "noise": _noise(model, config, seed, {OWN: selectors[OWN]}, heads),
    }


class _KeptShare(SparseCall):
    """Counts the keys that selections keep, and those that their tiles see."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = self.visible = 0

    def on_selection(self, router: SparseRouter, inputs: RoutingInputs, selection: BlockSelection) -> None:
        keys = selection.kept_keys()
        self.keys += int(keys.sum())
        self.visible += keys.shape[0] * keys.shape[1] * visible_keys(selection.grid)


def density(model: PreTrainedModel, planted: Planted) -> float:
    """Kept over visible keys of the router's selection, over all tiles, heads and layers, of the first sequences."""
    few = replace(
        planted, input_ids=planted.input_ids[:2], links=tuple(link for link in planted.links if link.sequence < 2)
    )
    kept = _KeptShare()
    predicted(model, few, kept)
    return kept.keys / kept.visible


def _answers(model: PreTrainedModel, planted: Planted, name: str, call: SparseCall) -> dict[str, Any]:
    tokens = predicted(model, planted, call)
    octaves = by_distance(planted, tokens)
    scores = {"selection": name, **accuracy(planted, tokens), "by_distance": octaves}
    return {**scores, "d50": reach(octaves, 0.5), "d90": reach(octaves, 0.9)}


def _both(model: PreTrainedModel, planted: Planted) -> dict[str, np.ndarray]:
    """The tokens that the model answers every link with, densely and with its own selection."""
    calls = {"dense": SparseCall(dense=True), OWN: SparseCall()}
    return {name: predicted(model, planted, call) for name, call in calls.items()}


def _single_queries(
    model: PreTrainedModel, planted: Planted, selectors: Mapping[str, Selector], heads: Mapping[Head, float]
) -> dict[str, Any]:
    """The same of tiles of 1, as decoding has them: no other query of a tile asks for blocks of its own."""
    with sparse_attention_as(model, query_tile=1):
        return link_scores(model, planted, selectors, heads)


def _unseen(model: PreTrainedModel, config: LongLinkConfig, seed: int) -> dict[str, Any] | None:
    """Accuracy on the distances that the training left out, None if it left out none."""
    if config.unseen is None:
        return None
    planted = plant(replace(config, only_unseen=True), seed)
    return {name: accuracy(planted, tokens) for name, tokens in _both(model, planted).items()}


def _null(
    model: PreTrainedModel,
    config: LongLinkConfig,
    seed: int,
    selectors: Mapping[str, Selector],
    heads: Mapping[Head, float],
) -> dict[str, Any]:
    # null takes a second key for each link
    links = (config.keys - config.distractors) // 2
    many = NULL_SEQUENCES * config.sequences
    planted = plant(replace(config, family="null", links=min(config.links, links), sequences=many), seed)
    rows = {name: accuracy(planted, tokens) for name, tokens in _both(model, planted).items()}
    return {"answers": rows, "routing": link_scores(model, planted, selectors, heads)}


def _counterfactual(model: PreTrainedModel, config: LongLinkConfig, seed: int) -> dict[str, Any]:
    planted = plant(replace(config, family="counterfactual", sequences=max(2, config.sequences // 2 * 2)), seed)
    return {name: pairs_told_apart(planted, tokens) for name, tokens in _both(model, planted).items()}


def _noise(
    model: PreTrainedModel,
    config: LongLinkConfig,
    seed: int,
    selectors: Mapping[str, Selector],
    heads: Mapping[Head, float],
) -> list[dict[str, Any]]:
    """Accuracy and recall along each kind of noise, and with more look-alikes; all else as in ``config``."""
    # others have no ceiling there
    kinds = [(name, values) for name, values in NOISE if config.family != "count" or name == "strength"]
    levels = [(name, level) for name, values in kinds for level in values]
    levels += [
        ("distractors", level) for level in LOOKALIKES if config.needed_keys - config.distractors + level <= config.keys
    ]
    done: dict[LongLinkConfig, dict[str, Any]] = {}
    rows = []
    for name, level in counted(levels, "kinds of noise"):
        changed: dict[str, Any] = {name: level}
        other = replace(config, **changed)
        # a level that is the default belongs to several kinds, and is measured once
        if other not in done:
            planted = plant(other, seed)
            scores = {key: accuracy(planted, tokens) for key, tokens in _both(model, planted).items()}
            recall = link_scores(model, planted, selectors, heads)["recall"][OWN]
            done[other] = {"ceiling": ceiling(other), "answers": scores, "routing": recall}
        rows.append({"noise": name, "level": level, **done[other]})
    return rows
