"""How a product q·k becomes a logit of the softmax: what every implementation of the attention is told alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoreOptions:
    """A score is ``scale`` · q·k, then ``softcap · tanh(score / softcap)`` if there is a cap.

    ``sinks`` [H] holds one more logit per query head that takes its share of the softmax and has no value.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    def cap(self, scores: Tensor) -> Tensor:
        """Scaled ``scores`` with the soft cap applied; in place where no gradient is recorded."""
        # cap(s) = softcap · tanh(s / softcap): Gemma 2, arXiv 2408.00118, section 2
        if self.softcap is None:
            return scores
        if scores.requires_grad:
            return torch.tanh(scores / self.softcap) * self.softcap
        return scores.div_(self.softcap).tanh_().mul_(self.softcap)
