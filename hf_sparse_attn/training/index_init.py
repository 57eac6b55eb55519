"""Start of stage 2: the low-rank index that loses least of q·k on real queries and keys."""

# Shapes: D head dim, I rank of the index (`index_dim`), hg query heads of one KV group.

from __future__ import annotations

import torch
from torch import Tensor

from ..router.module import RoutingInputs, SparseRouter
from .distributed import mean_tensor

SAMPLES = 4096  # tokens that the covariances are estimated from


# Least E (q·k − (A q)·(B k))² over maps A, B of rank I, for q and k that are independent:
# with the SVD C_q^½ C_k^½ = U S Vᵀ it is A = S_I^½ U_Iᵀ C_q^−½, B = S_I^½ V_Iᵀ C_k^−½ (Eckart and Young 1936).
@torch.no_grad()
def start_index(router: SparseRouter, inputs: RoutingInputs, counts: bool = True) -> None:
    """Set ``wq_index`` and ``wk_index`` to the joint SVD of the queries and keys in ``inputs`` of all processes of
    which this ``counts``.

    With C_q and C_k the second moments of one KV group's queries and keys, the rank-I map that least changes q·k is
    the truncated SVD of C_q^½ C_k^½, whitened on both sides. At full rank the untrained start is exact already.
    """
    rank = router.wq_index.shape[1]
    if rank == router.head_dim:
        return
    stride = max(1, inputs.k.shape[2] // SAMPLES)
    for g in range(router.groups):
        hg = router.heads // router.groups
        # float64: inverse roots of a moment multiply the rounding of its small eigenvalues
        q = inputs.q[:, g * hg : (g + 1) * hg, ::stride].reshape(-1, router.head_dim).double()
        k = inputs.k[:, g, ::stride].reshape(-1, router.head_dim).double()
        moments = mean_tensor(torch.stack([q.T @ q / len(q), k.T @ k / len(k)]), counts)
        (q_root, q_inverse), (k_root, k_inverse) = map(_roots, moments)
        # v is Vᵀ already
        u, s, v = torch.linalg.svd(q_root @ k_root)
        weight = s[:rank].sqrt()[:, None]
        router.wq_index[g] = (weight * u[:, :rank].T @ q_inverse).float()
        router.wk_index[g] = (weight * v[:rank] @ k_inverse).float()


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a second moment and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(moment)
    # eigenvalues of a singular moment come out as zero or below it, where the inverse root is not finite
    values = values.clamp(min=float(values.max()) * 1e-10)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
