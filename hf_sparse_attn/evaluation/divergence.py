"""How far a selection moves the model's predictions from those of dense attention on the same window."""

# Shapes: N tokens of a window, n of their positions, d hidden size.

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..attention.call import SparseCall

LOGIT_POSITIONS = 512  # positions whose logits are held at a time
PARTS = 8  # of a window, of which log-loss is told apart


@dataclass(frozen=True)
class Predictions:
    """What one pass over a window predicts.

    ``kl`` (nats a token, KL(dense ‖ selection) of the next token) and ``output_error`` (‖h − h_dense‖ / ‖h_dense‖ of
    the last hidden states) are means over the last half; so is ``loss``, the log-loss (nats a token), and
    ``by_position`` those of eight equal parts of the window.
    """

    loss: float
    kl: float
    output_error: float
    by_position: list[float]


@torch.no_grad()
def last_hidden(model: PreTrainedModel, ids: Tensor, call: SparseCall) -> Tensor:
    """Last hidden states [1, N, d] of ``ids`` [1, N]."""
    hidden: Tensor = model.base_model(ids, use_cache=False, sparse_call=call).last_hidden_state
    return hidden


@torch.no_grad()
def token_losses(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats of ``targets`` [1, n] from ``hidden`` [1, n, d], float32 [n];
    logits a part at a time.
    """
    head = model.get_output_embeddings()
    parts = zip(hidden[0].split(LOGIT_POSITIONS), targets[0].split(LOGIT_POSITIONS), strict=True)
    return torch.cat([F.cross_entropy(head(h).float(), t, reduction="none") for h, t in parts])


@torch.no_grad()
def predictions(
    model: PreTrainedModel, ids: Tensor, hidden: Tensor, dense: Tensor, *, whole: bool = True
) -> Predictions:
    """Compare the last hidden states ``hidden`` [1, N, d] of the tokens ``ids`` [1, N] with those of dense attention,
    ``dense``.

    Without ``whole`` only the last half is looked at, and ``by_position`` is empty.
    """
    half = ids.shape[1] // 2
    # state i predicts token i + 1, so the first token of the last half is predicted by the state before it
    states, other = hidden[0, half - 1 :], dense[0, half - 1 :]  # the last one predicts nothing that is known
    late, kl = _compare(model, states, other, ids[0, half:])
    early = [token_losses(model, hidden[:, : half - 1], ids[:, 1:half])] if whole else []
    return Predictions(
        loss=float(late.mean()),
        kl=float(kl[1:].mean()),
        output_error=float(((states - other).float().norm(dim=-1) / other.float().norm(dim=-1))[1:].mean()),
        by_position=[float(part.mean()) for part in torch.cat([*early, late]).tensor_split(PARTS)] if whole else [],
    )


# loss_i = −log q_i(token i + 1), KL_i = Σ_v p_i(v) (log p_i(v) − log q_i(v)) over the vocabulary,
# p under dense attention and q under the selection.
def _compare(model: PreTrainedModel, sparse: Tensor, dense: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-losses of ``targets`` [n − 1], KL of the next token's distribution from that of ``dense`` [n]) of the states
    ``sparse`` [n, d].
    """
    head, losses, divergences, at = model.get_output_embeddings(), [], [], 0
    for h, reference in zip(sparse.split(LOGIT_POSITIONS), dense.split(LOGIT_POSITIONS), strict=True):
        log_q, log_p = (head(states).float().log_softmax(-1) for states in (h, reference))
        # the last state has no target: its part has one loss less
        known = targets[at : at + len(h)]
        losses.append(-log_q[: len(known)].gather(1, known[:, None])[:, 0])
        # torch's kl_div(input, target) is KL(target ‖ input)
        divergences.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
        at += len(h)
    return torch.cat(losses), torch.cat(divergences)
