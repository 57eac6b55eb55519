"""Whether a router finds the blocks where LongLink's causes stand, for the heads that use them."""

# shapes: B batch, G KV heads, n query tiles, nb key blocks

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hf_sparse_attn_kernels import BlockSelection, block_mass
from torch import Tensor
from transformers import PreTrainedModel

from ...attention.call import Selector, SparseCall
from ...router.budget import make_plan
from ...router.module import RoutingInputs, SparseRouter
from ...training.mass_threshold import candidates
from .ceilings import ceiling, chance
from .link_answers import predicted, right_tokens, sequences_at_once
from .link_metrics import AveragePrecision, ChanceAdjustedRecall, NormalisedAccuracy
from .planting import Link, Planted

USES = 0.5  # of a question's softmax mass on the blocks of its causes, on average over links: such a head uses them
Head = tuple[int, int]  # layer, KV head


class ByRow:
    """Links of the sequences of one call, by the row of the batch."""

    def __init__(self, planted: Planted) -> None:
        self.links: dict[int, list[Link]] = defaultdict(list)
        for link in planted.links:
            self.links[link.sequence].append(link)
        self.start = 0

    def rows(self, inputs: RoutingInputs) -> list[list[Link]]:
        return [self.links[self.start + row] for row in range(inputs.q.shape[0])]


def _passes(model: PreTrainedModel, planted: Planted, rows: ByRow, observer: SparseCall) -> None:
    ids, sequences = torch.from_numpy(planted.input_ids).to(model.device), sequences_at_once(planted)
    # the loop sets ``rows.start``, by which observers find the links of the sequences at work
    for rows.start in range(0, len(ids), sequences):
        batch = ids[rows.start : rows.start + sequences]
        with torch.no_grad():
            model.base_model(batch, use_cache=False, sparse_call=observer)


class _CauseMass(SparseCall):
    """Dense mass of every question on the blocks of its causes, by layer and KV head."""

    def __init__(self, rows: ByRow) -> None:
        super().__init__(dense=True)
        self.rows, self.mass = rows, defaultdict[Head, list[float]](list)

    def on_document(self, router: SparseRouter, inputs: RoutingInputs) -> None:
        size = router.config.block_size
        for row, links in enumerate(self.rows.rows(inputs)):
            effects = sorted({link.effect for link in links})
            # tiles of 1: the mass of the question alone, not of its tile
            tiles = torch.tensor(effects, device=inputs.q.device, dtype=torch.int64)
            one = (inputs.q[row : row + 1], inputs.k[row : row + 1])
            mass = block_mass(*one, inputs.grid(1, size), tiles, inputs.scale)[0]  # [G, effects, blocks]
            for link in links:
                blocks = sorted({cause // size for cause in link.causes})
                for head, value in enumerate(mass[:, effects.index(link.effect), blocks].sum(-1).tolist()):
                    self.mass[router.layer, head].append(value)


def using_heads(model: PreTrainedModel, planted: Planted) -> dict[Head, float]:
    """Mean dense mass of questions on the blocks of their causes, of the heads where it is at least half:
    found without any router.
    """
    rows = ByRow(planted)
    observer = _CauseMass(rows)
    _passes(model, planted, rows, observer)
    means = {head: float(np.mean(values)) for head, values in sorted(observer.mass.items())}
    return {head: mass for head, mass in means.items() if mass >= USES}


class LinkObserver(SparseCall):
    """Recall of several selections, and the average precision of the router's ranking, on a dense pass; of ``heads``
    only.

    Both count the causes whose blocks are not forced in the tile of the question.
    """

    def __init__(self, rows: ByRow, selectors: Mapping[str, Selector], heads: Mapping[Head, float]) -> None:
        super().__init__(dense=True)
        self.rows, self.selectors, self.heads = rows, selectors, heads
        self.recall = {name: ChanceAdjustedRecall() for name in selectors}
        self.precision = AveragePrecision()
        self.best = AveragePrecision()  # of the dense mass itself as a ranking
        self.rankings = 0  # added to each of them

    def on_document(self, router: SparseRouter, inputs: RoutingInputs) -> None:
        heads = [head for layer, head in self.heads if layer == router.layer]
        if not heads:
            return
        tile, size = router.config.query_tile, router.config.block_size
        plan = make_plan(router.config, inputs.grid(tile, size), inputs.q.device)
        # blocks that are not forced, in tiles that have to choose
        eligible = (
            plan.eligible_mask(torch.arange(plan.grid.tiles, device=inputs.q.device, dtype=torch.int64))
            & plan.open[:, None]
        )
        ranked = _estimates(candidates(router, inputs, tile).every)
        teacher = block_mass(
            inputs.q,
            inputs.k,
            plan.grid,
            torch.arange(plan.grid.tiles, device=inputs.q.device, dtype=torch.int64),
            inputs.scale,
        )
        kept = {name: selector(router, inputs, tile).kept() for name, selector in self.selectors.items()}
        places = list(self._places(inputs, eligible, tile, size))
        if not places:
            return
        self.rankings += len(heads) * len(places)
        hits = [hit.int().cpu().numpy() for *_, hit in places for _ in heads]
        # the router's ranking, and that of the dense mass, as the oracle has it
        for metric, ranking in ((self.precision, ranked), (self.best, teacher)):
            scores = [ranking[row, head, t, free].cpu().numpy() for row, t, free, _ in places for head in heads]
            metric.add_batch(predictions=scores, references=hits)
        for name, selection in kept.items():
            # by place and head: which free blocks were kept, and which hold a cause
            chosen = [(selection[row, head, t, free].float(), hit) for row, t, free, hit in places for head in heads]
            links_kept = torch.cat([blocks[hit] for blocks, hit in chosen])
            # chance of a link: the share of its tile's free blocks that the selection keeps
            share = torch.cat([blocks.mean().expand(int(hit.sum())) for blocks, hit in chosen])
            self.recall[name].add_batch(predictions=links_kept.tolist(), references=share.tolist())

    def _places(
        self, inputs: RoutingInputs, eligible: Tensor, tile: int, size: int
    ) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(row, tile, its blocks that are not forced, which of these hold a cause) of every tile with such a cause."""
        for row, links in enumerate(self.rows.rows(inputs)):
            for t, blocks in _wanted(links, tile, size).items():
                free = eligible[t].nonzero()[:, 0]
                hit = torch.isin(free, torch.tensor(sorted(blocks), device=free.device, dtype=torch.int64))
                if bool(hit.any()):
                    yield row, t, free, hit


def _wanted(links: list[Link], tile: int, size: int) -> dict[int, set[int]]:
    """Blocks of the causes, by the tile of the question."""
    causes: dict[int, set[int]] = defaultdict(set)
    for link in links:
        causes[link.effect // tile] |= {cause // size for cause in link.causes}
    return causes


def _estimates(every: BlockSelection) -> Tensor:
    """The router's estimate of each block's mass [B, G, n, nb], −1 for a block that stage 1 did not pass on."""
    assert every.scores is not None
    # a column more at the front: it takes the empty entries (−1), and is cut off
    shape = (*every.indices.shape[:3], every.grid.blocks + 1)
    out = every.scores.new_full(shape, -1.0).scatter_(-1, every.indices.long() + 1, every.scores.nan_to_num(-1.0))
    return out[..., 1:]


def link_scores(
    model: PreTrainedModel, planted: Planted, selectors: Mapping[str, Selector], heads: Mapping[Head, float]
) -> dict[str, Any]:
    """Recall of every selection at the model's budget, and the router's average precision, over ``heads`` (of
    `using_heads`).
    """
    rows = ByRow(planted)
    observer = LinkObserver(rows, selectors, heads)
    _passes(model, planted, rows, observer)
    if not observer.rankings:  # no head uses a cause, or all of them are forced
        missing = dict.fromkeys(("recall", "chance", "chance_adjusted_recall"))
        ranking = {"average_precision": None, "oracle_average_precision": None, "n": 0}
        return {**ranking, "recall": {name: {**missing, "n": 0} for name in selectors}}
    ranking = {**observer.precision.compute(), "oracle_average_precision": observer.best.compute()["average_precision"]}
    return {**ranking, "recall": {name: metric.compute() for name, metric in observer.recall.items()}}


class Without:
    """A selection without some blocks: those of the causes of each question's tile, or as many others of the kept ones
    at random.
    """

    def __init__(self, selector: Selector, rows: ByRow, causes: bool, seed: int = 0) -> None:
        self.selector, self.rows, self.causes = selector, rows, causes
        self.generator = torch.Generator(device="cpu").manual_seed(seed)

    def __call__(self, router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection:
        scores = self.selector(router, inputs, query_tile)
        plan = make_plan(router.config, scores.grid, inputs.q.device)
        eligible = plan.eligible_mask(torch.arange(plan.grid.tiles, device=scores.indices.device, dtype=torch.int64))
        indices = scores.indices.clone()
        for row, links in enumerate(self.rows.rows(inputs)):
            for t, blocks in _wanted(links, query_tile, scores.grid.block_size).items():
                for head in range(indices.shape[1]):
                    self._cut(indices[row, head, t], eligible[t], blocks)
        # lists are ascending, with the empty entries (−1) first
        return BlockSelection(indices.sort(-1).values, scores.grid)

    def _cut(self, kept: Tensor, eligible: Tensor, blocks: set[int]) -> None:
        # forced blocks cannot be cut: a tile's own, the window's and the sink's are always read
        free = (kept >= 0) & eligible[kept.clamp(min=0).long()]
        is_cause = torch.isin(kept, torch.tensor(sorted(blocks), dtype=kept.dtype, device="cpu")) & free
        if self.causes:
            kept[is_cause] = -1
            return
        others = (free & ~is_cause).nonzero()[:, 0]
        order = torch.randperm(len(others), generator=self.generator, dtype=torch.int64, device="cpu")
        kept[others[order[: int(is_cause.sum())]]] = -1


def necessity(model: PreTrainedModel, planted: Planted, selector: Selector) -> dict[str, float]:
    """Accuracy with the selection, without the blocks of the causes, and without as many others:
    only the first cut costs needed links.
    """
    accuracies, sequences = {}, sequences_at_once(planted)
    bounds = {"chance": chance(planted.config), "ceiling": ceiling(planted.config)}
    for name, cut in (("whole", None), ("without causes", True), ("without others", False)):
        rows = ByRow(planted)
        chosen = selector if cut is None else Without(selector, rows, cut)
        metric = NormalisedAccuracy()
        for rows.start in range(0, planted.config.sequences, sequences):
            part = _part(planted, rows.start, sequences)
            metric.add_batch(
                predictions=predicted(model, part, SparseCall(selector=chosen)), references=right_tokens(part)
            )
        accuracies[name] = float(metric.compute(**bounds)["accuracy"])
    return accuracies


def _part(planted: Planted, start: int, count: int) -> Planted:
    """Some of the sequences, counted from 0 again."""
    links = [
        replace(link, sequence=link.sequence - start)
        for link in planted.links
        if start <= link.sequence < start + count
    ]
    part = slice(start, start + count)
    return replace(planted, input_ids=planted.input_ids[part], labels=planted.labels[part], links=tuple(links))
