"""Which KV heads look single tokens up that stage 1 does not see: found by planted repetitions.

Stage 1 ranks blocks by pooled keys, in which a single token drowns. Most heads lose nothing by that. A few compare the
token at hand with every earlier one and read what followed its last occurrence (induction heads, Olsson et al. 2022,
arXiv:2209.11895; retrieval heads, Wu et al. 2024, arXiv:2404.15574): of these all blocks have to be candidates, as in
RTPurbo (arXiv:2605.16928). So stretches of a window are repeated at its end, one in each query tile, and the dense
softmax mass on the original is compared with what stage 1 passes on.
"""

# Shapes: B batch, N tokens, G KV heads, m query tiles, nb key blocks.

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from hf_sparse_attn_kernels import TileGrid, block_mass, stage_one_scores
from torch import Tensor, nn

from ..attention.call import SparseCall
from ..config import SparseAttentionConfig
from ..data.model_inputs import model_inputs
from ..models.adapters import active_routers
from ..models.attach import no_routers
from ..models.convert import set_sparse_attention, sparse_attention_as
from ..router.budget import make_plan
from ..router.module import RoutingInputs, SparseRouter
from ..router.selection import FeatureMaker
from .passes import run_sparse

SPAN = 24  # tokens that are repeated
LEAST_TILE = 32  # a query tile holds a whole repetition
PLANTS = 8  # repetitions in a window, one in each of its last query tiles
LEAST_LOST = 0.01  # softmax mass of a tile: a head that loses more on average gets all candidates
MOST_HEADS = 0.03  # share of a model's KV heads, at least one: each costs as much as scoring all of its keys


@dataclass(frozen=True)
class RetrievalHead:
    """Softmax mass, of 1, that a KV head's tiles give to what they repeat: all of it, and what stage 1 loses of it
    beyond what it loses of as many other blocks.
    """

    layer: int
    head: int
    planted: float
    lost: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Repetition:
    """Tokens ``[source, source + SPAN)`` of a row stand again from ``at`` on."""

    source: int
    at: int


class PlantedMass(SparseCall):
    """Of a dense pass over a row with ``repetitions``: (all, lost) mass on their sources, by layer a [G, 2] for each;
    lost is counted beyond what is lost of as many other blocks.

    Only the first row of a batch is read.
    """

    def __init__(self, repetitions: Sequence[Repetition]) -> None:
        super().__init__(dense=True)
        self.repetitions = repetitions
        self.mass: dict[int, list[Tensor]] = {}

    def on_document(self, router: SparseRouter, inputs: RoutingInputs) -> None:
        config = router.config
        tile = max(config.query_tile, LEAST_TILE)
        grid = inputs.grid(tile, config.block_size)
        tiles = torch.tensor([r.at // tile for r in self.repetitions], device=inputs.q.device, dtype=torch.int64)
        plan = make_plan(config, grid, inputs.q.device)
        features = FeatureMaker(router, inputs, grid).features(tiles)
        mass = block_mass(inputs.q, inputs.k, grid, tiles, inputs.scale)[0]
        passed = plan.best(stage_one_scores(features, plan, tiles), tiles, plan.candidates[tiles])[0]
        # column 0 takes the empty entries
        member = torch.zeros(*mass.shape[:2], grid.blocks + 1, device=mass.device, dtype=torch.bool)
        eligible = plan.eligible_mask(tiles)
        lost = mass * eligible * ~member.scatter_(-1, passed + 1, True)[..., 1:]
        for place, repetition in enumerate(self.repetitions):
            first, last = (end // config.block_size for end in (repetition.source, repetition.source + SPAN))
            planted, missed = (x[:, place, first : last + 1].sum(-1) for x in (mass, lost))
            # what a tile loses of any other blocks says nothing about a lookup
            blocks, others = last + 1 - first, int(eligible[place].sum()) - (last + 1 - first)
            usual = (lost[:, place].sum(-1) - missed) * (blocks / max(others, 1))
            self.mass.setdefault(router.layer, []).append(torch.stack([planted, missed - usual], -1).cpu())


def planted_row(
    ids: Tensor, config: SparseAttentionConfig, generator: torch.Generator
) -> tuple[Tensor, list[Repetition]]:
    """A copy of the tokens ``ids`` [N] in whose last whole query tiles stretches from far back are repeated, and where.

    A tile whose blocks all are candidates gets none, since nothing can be lost there.
    """
    tile, size = max(config.query_tile, LEAST_TILE), config.block_size
    plan = make_plan(config, TileGrid(len(ids), len(ids), tile, size))
    whole = len(ids) // tile
    row, repetitions = ids.clone(), []
    for number in range(max(whole - PLANTS, 0), whole):
        budget = plan.budgets[number]
        # the source lies in blocks that may be selected, and before the first repetition
        first, end = budget.sink * size, min(budget.near * size, (whole - PLANTS) * tile) - SPAN
        if budget.eligible <= budget.candidates or end <= first:
            continue
        source = int(torch.randint(first, end, (), generator=generator, dtype=torch.int64, device="cpu"))
        at = number * tile + (tile - SPAN) // 2
        row[at : at + SPAN] = ids[source : source + SPAN]
        repetitions.append(Repetition(source, at))
    return row, repetitions


@torch.no_grad()
def find_retrieval_heads(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, seed: int = 0
) -> list[RetrievalHead]:
    """The KV heads of a sparse ``model`` whose stage 1 loses what they look up, worst first; the model stays as it is.

    Args:
        batches: mappings with ``input_ids`` [B, N] or [N], without padding and of one document. The first row of each
            is read; three windows show a head that stands out.
        seed: of the places that are repeated.

    Returns:
        Heads that lose at least 1 % of their softmax mass on average, and 3 % of all heads at most (but one).
        Give ``[[h.layer, h.head] for h in ...]`` to `set_sparse_attention` as ``retrieval_heads``.

    Raises:
        ValueError: the texts are so short that every block is a candidate, they are no tokens, or the model is no
            sparse one.
    """
    layer_routers = active_routers(model)
    if not layer_routers:
        raise ValueError(no_routers(model))
    config, texts = layer_routers[0].config, model_inputs(model, batches)
    if any("input_ids" not in batch for batch in texts):
        raise ValueError("find_retrieval_heads repeats stretches of tokens: give batches with input_ids")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    mass: dict[int, list[Tensor]] = {}
    with sparse_attention_as(model, retrieval_heads=()):
        for batch in texts:
            row, repetitions = planted_row(batch["input_ids"][0].cpu(), config, generator)
            if repetitions:
                observer = PlantedMass(repetitions)
                run_sparse(model, [{"input_ids": row[None]}], observer)
                for layer, values in observer.mass.items():
                    mass.setdefault(layer, []).extend(values)
    if not mass:
        raise ValueError(
            f"texts of {max((batch['input_ids'].shape[1] for batch in texts), default=0)} tokens are too short to "
            "find retrieval heads: stage 1 passes all blocks on. Give longer ones, a lower budget or candidate_factor"
        )
    heads = [
        RetrievalHead(layer, head, *values)
        for layer, found in sorted(mass.items())
        for head, values in enumerate(torch.stack(found).mean(0).tolist())
    ]
    most = max(1, int(MOST_HEADS * len(heads)))
    return [head for head in sorted(heads, key=lambda head: -head.lost)[:most] if head.lost >= LEAST_LOST]


def name_retrieval_heads(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], windows: int, seed: int = 0
) -> list[RetrievalHead] | None:
    """Find them in the first ``windows`` of ``batches`` that serve, and write them into the settings of ``model``.

    None where the settings name some already, or no batch serves.
    """
    config = active_routers(model)[0].config
    texts = [] if config.retrieval_heads else [batch for batch in batches if repeatable(batch, config)][:windows]
    if not texts:
        return None
    heads = find_retrieval_heads(model, texts, seed=seed)
    set_sparse_attention(model, retrieval_heads=[[head.layer, head.head] for head in heads])
    return heads


def repeatable(batch: Mapping[str, Any], config: SparseAttentionConfig) -> bool:
    """Whether stretches of a batch can be repeated: whole rows of tokens, without padding or several documents, in
    which stage 1 can lose something.
    """
    if "input_ids" not in batch or {"position_ids", "cu_seq_lens_q"} & batch.keys():
        return False
    if "attention_mask" in batch and not bool(batch["attention_mask"].all()):
        return False
    generator = torch.Generator(device="cpu").manual_seed(0)
    return bool(planted_row(batch["input_ids"][0].cpu(), config, generator)[1])
