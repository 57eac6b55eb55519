"""A watch on generation: says once when the kept keys hold less of the attention than they should."""

# Shapes: B batch, G KV heads, n query tiles, K kept blocks of a tile.

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from hf_sparse_attn_kernels import BlockSelection
from torch import Tensor

from ..attention.call import SparseCall
from ..router.module import RoutingInputs, SparseRouter
from .attach import no_routers, routers

logger = logging.getLogger(__name__)

CALIBRATED_SHARE = 0.05  # of the tiles may keep less than a calibration's mass: that is how it is defined


class MassMonitor(SparseCall):
    """Warns once when the keys that a layer keeps hold less of its softmax mass than a floor.

    Hand it in where a forward pass or ``generate`` takes a ``sparse_call``; a new one warns anew. It reads what stage 2
    estimated for the selection in any case; on an accelerator each layer waits for that. Without it nothing is
    computed. Prefill, decoding, padded and packed batches are watched alike, tile by tile and KV head by KV head.

    The estimate is a share of the candidates and the forced keys, not of all keys: mass that stage 1 did not pass on is
    not seen. A head that lost the needle in stage 1 looks as if nothing were wrong. In a prefill tile it is a mean over
    the sampled queries, among which a single lookup hardly counts. Tiles that keep all they see are not counted. So
    silence proves nothing; ``hf-sparse-attn doctor --needles`` asks.

    Args:
        model: the sparse model, whose calibration gives the floor if it was made for a share of the mass.
        floor: a share of the softmax mass, in (0, 1], in place of that.
        share: tiles of a layer, in [0, 1), that may keep less; None: 5 % under a calibration's floor, which is how it
            is defined, and none under a given one. Above 0 tiles are collected until there are enough to tell.

    Attributes:
        warning: what was said, None so far.

    Raises:
        ValueError: the model has no routers, there is no floor, or ``floor`` or ``share`` is impossible.
    """

    def __init__(self, model: Any, floor: float | None = None, share: float | None = None) -> None:
        super().__init__()
        if not routers(model):
            raise ValueError(no_routers(model))
        calibration = getattr(model, "calibration", None)
        calibrated = None if calibration is None else calibration.mass
        if floor is None:
            floor = calibrated
            share = CALIBRATED_SHARE if share is None else share
        if floor is None:
            raise ValueError(
                "floor is None, and the model has no calibration for a share of the mass: give a floor such as 0.5, or "
                "calibrate the model with hf-sparse-attn calibrate"
            )
        self.floor, self.share = floor, 0.0 if share is None else share
        if not 0 < self.floor <= 1 or not 0 <= self.share < 1:
            raise ValueError(f"floor is {floor} and share is {share}: must be in (0, 1] and in [0, 1)")
        # of fewer tiles no such share can be told
        self.least = math.ceil(1 / self.share) if self.share else 1
        self.calibrated = calibration is not None
        self.warning: str | None = None
        # by layer: mass, KV head and position of tiles that were not judged yet, a row for each
        self._seen: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def on_selection(self, router: SparseRouter, inputs: RoutingInputs, selection: BlockSelection) -> None:
        if self.warning is not None or selection.scores is None:
            return
        seen = self._seen.setdefault(router.layer, [])
        seen.append(kept_of_tiles(selection))
        count = sum(len(rows) for rows in seen)
        if count < self.least:
            return
        rows = torch.cat(seen)
        seen.clear()
        below = int((rows[:, 0] < self.floor).sum())
        if below > self.share * count:
            self.warning = self._message(router, rows[rows[:, 0].argmin()].tolist(), below, count)
            logger.warning(self.warning)

    def _message(self, router: SparseRouter, worst: list[float], below: int, count: int) -> str:
        mass, head, position = worst
        config = router.config
        if self.calibrated:
            advice = "calibrate the model with a larger mass (hf-sparse-attn calibrate)"
        elif config.mass_threshold is not None:
            advice = f"lower mass_threshold ({config.mass_threshold:g})"
        else:
            most = "" if config.max_keys is None else f", with max_keys ({config.max_keys})"
            advice = f"raise min_keys ({config.min_keys}) or density ({config.density:g}){most}"
        return (
            f"layer {router.layer}, KV head {int(head)}, position {int(position)}: the kept keys hold an estimated "
            f"{mass:.2f} of the attention, less than the floor of {self.floor:g} ({below} of {count} tiles do): what "
            f"stands far back may be missed. To keep more, {advice}. This is said once"
        )


# kept = Σ over the kept blocks of m_b, the softmax mass that stage 2 estimated over candidates and forced blocks
def kept_of_tiles(selection: BlockSelection) -> Tensor:
    """Of every tile and KV head that was cut (estimated kept mass, KV head, content position of the tile): float64
    [tiles, 3].
    """
    scores = selection.scores
    assert scores is not None
    # a tile that keeps all it sees has no scores; an empty entry of another tile has none, either
    at = (~scores.isnan()).any(-1).nonzero()
    mass = scores.nan_to_num(0.0).sum(-1)[tuple(at.T)]
    positions = selection.grid.first_positions(scores.device)[at[:, 2]]
    return torch.stack([mass.double(), at[:, 1].double(), positions.double()], 1)
