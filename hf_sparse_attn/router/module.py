"""The two-stage router of one attention layer: its weights, features and scores.

Shape legend: B batch, H query heads, G KV heads, Hg = H/G, N keys, Q queries, D head dim, n query tiles, m some of
them, T query tile, S block size, nb blocks, R router_dim, I index_dim.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from hf_sparse_attn_kernels import TileGrid, pooled_features
from torch import Tensor, nn
from transformers import initialization as init

from ..config import SettingsHolder, SparseAttentionConfig
from .head_budgets import HeadBudgets
from .rotary import Rotary

QUERY_RUNS = 8  # stage 1 scores the means of this many runs of a tile's tokens
KEY_CHUNK = 2048  # keys that are un-rotated and pooled at a time, a multiple of every block size: bounds memory


@dataclass(frozen=True)
class RoutingInputs:
    """What a selector sees of one call: unpadded rows of one document each.

    ``q`` [B, H, Q, D] holds the queries of the last Q of the N tokens of ``k`` [B, G, N, D], both after RoPE, at the
    rotary ``positions`` [1 or B, N]. ``scale`` multiplies q·k. ``router_keys`` [B, G, >= N // S, R] are cached stage-1
    keys, or None. Without ``causal`` every query sees every key. ``v`` [B, G, N, D] are the values, where the layer
    gives them: routers never read them. ``consecutive``: whether the positions of the queries grow by one, None for
    unknown.
    """

    q: Tensor
    k: Tensor
    positions: Tensor
    scale: float
    router_keys: Tensor | None = None
    causal: bool = True
    v: Tensor | None = None
    consecutive: bool | None = None

    def grid(self, query_tile: int, block_size: int) -> TileGrid:
        return TileGrid(self.q.shape[2], self.k.shape[2], query_tile, block_size, self.causal)

    def detached(self) -> RoutingInputs:
        """The same without gradients."""
        return replace(self, q=self.q.detach(), k=self.k.detach(), v=None if self.v is None else self.v.detach())

    def span(self, start: int, stop: int) -> RoutingInputs:
        """The queries ``[start, stop)`` of this call with the keys up to the last of them."""
        kv_len = self.k.shape[2] - self.q.shape[2] + stop
        v = None if self.v is None else self.v[:, :, :kv_len]
        return replace(
            self, q=self.q[:, :, start:stop], k=self.k[:, :, :kv_len], positions=self.positions[:, :kv_len], v=v
        )


class SparseRouter(nn.Module):
    """Learned weights and scoring of both stages for one attention layer."""

    def __init__(
        self,
        config: SparseAttentionConfig,
        heads: int,
        groups: int,
        head_dim: int,
        rotary: Rotary | None,
        layer: int,
        # None: where torch makes a module's weights now, as from_pretrained wants them
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.holder = SettingsHolder(config)  # of a router in a model: that of all its routers
        self.heads, self.groups, self.head_dim, self.layer = heads, groups, head_dim, layer
        self.rotary = rotary
        self.fresh = True  # no weights were loaded into it
        self.budgets: HeadBudgets | None = None  # of a calibration, in place of the config's budget
        router_dim, index_dim = config.resolved_router_dim(head_dim), config.resolved_index_dim(head_dim)
        self.wq = nn.Parameter(
            torch.empty(groups, router_dim, heads // groups * head_dim, dtype=torch.float32, device=device)
        )
        self.wk = nn.Parameter(torch.empty(groups, router_dim, 3 * head_dim, dtype=torch.float32, device=device))
        self.wq_index = nn.Parameter(torch.empty(groups, index_dim, head_dim, dtype=torch.float32, device=device))
        self.wk_index = nn.Parameter(torch.empty(groups, index_dim, head_dim, dtype=torch.float32, device=device))
        self.requires_grad_(False)  # routers learn where something teaches them: in distillation and the joint stage

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseRouter:
        alone = not memo  # as PEFT copies it: the copy reads the model's embedding, too, and will be trained
        if alone and self.rotary is not None:
            memo[id(self.rotary.module)] = self.rotary.module
        if alone:
            memo[id(self.holder)] = self.holder
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        if alone:
            twin.budgets = None  # a calibration is of the weights that it was made with
        return twin

    @property
    def config(self) -> SparseAttentionConfig:
        """The settings it runs with. Setting them is for a router without a model: of a model they change together."""
        return self.holder.settings

    @config.setter
    def config(self, settings: SparseAttentionConfig) -> None:
        self.holder = SettingsHolder(settings)

    @property
    def retrieval_heads(self) -> tuple[int, ...]:
        """KV heads of this layer that the settings name, ascending."""
        return tuple(head for layer, head in self.config.retrieval_heads if layer == self.layer)

    @property
    def weights(self) -> list[nn.Parameter]:
        """All weights, each read as an attribute: that is how ZeRO-3 notices that a module needs those of another."""
        return [self.wq, self.wk, self.wq_index, self.wk_index]

    def extra_repr(self) -> str:
        config, dim = self.config, self.head_dim  # shapes may be sharded away
        sizes = f"router_dim={config.resolved_router_dim(dim)}, index_dim={config.resolved_index_dim(dim)}"
        return f"{sizes}, layer={self.layer}"

    @torch.no_grad()
    def init_weights(self) -> None:
        """Untrained start: stage 1 is mean-pool q·k averaged over a group's heads, stage 2 reads ``index_dim`` dims of
        q·k.

        Router dimensions beyond the head dim start with ``wq`` zero and ``wk`` small, so they add nothing yet but can
        learn. Without data stage 2 takes the slowest rotary pairs; `distill` replaces that by the joint SVD.
        """
        self.fresh = not all(getattr(weight, "_is_hf_initialized", False) for weight in self.parameters())
        hg, d = self.heads // self.groups, self.head_dim
        eye = torch.eye(d, dtype=torch.float32, device="cpu")
        wq, wk = (
            torch.zeros(self.wq.shape, dtype=torch.float32, device="cpu"),
            torch.empty(self.wk.shape, dtype=torch.float32, device="cpu").normal_(
                std=0.5 / d**0.5, generator=torch.Generator(device="cpu").manual_seed(self.layer)
            ),
        )
        wq[:, :d] = (eye / hg).repeat(1, hg)
        wk[:, :d] = torch.cat([torch.zeros(d, 2 * d, dtype=torch.float32, device="cpu"), eye], 1)
        index = self._index_start()
        for weight, value in ((self.wq, wq), (self.wk, wk), (self.wq_index, index), (self.wk_index, index)):
            init.copy_(weight, value.to(weight.dtype))

    def _index_start(self) -> Tensor:
        """Both weights of stage 2 before anything taught them: float32 [G, I, D]."""
        eye = torch.eye(self.head_dim, dtype=torch.float32, device="cpu")
        return eye[self._slowest_dims(self.wq_index.shape[1])].expand_as(self.wq_index)

    @property
    def index_is_untrained(self) -> bool:
        """Whether stage 2 still has its untrained start, however its weights came about:
        no loader or loop has to say so.
        """
        start = self._index_start().to(self.wq_index)
        return torch.equal(self.wq_index, start) and torch.equal(self.wk_index, start)

    def _slowest_dims(self, count: int) -> Tensor:
        d = self.head_dim
        if self.rotary is None:
            return torch.arange(count, dtype=torch.int64, device="cpu")
        half = self.rotary.dim // 2
        pair = torch.arange(half, dtype=torch.int64, device="cpu").repeat_interleave(2)
        first, second = (2 * pair, 2 * pair + 1) if self.rotary.interleaved else (pair, pair + half)
        order = torch.where(torch.arange(2 * half, dtype=torch.int64, device="cpu") % 2 == 0, first, second)
        return (
            torch.cat([order, torch.arange(self.rotary.dim, d, dtype=torch.int64, device="cpu")])[-count:].sort().values
        )

    # -- stage 1 ---------------------------------------------------------------------------------------------------

    # f_b = [max_j k_j ; min_j k_j ; mean_j k_j] over un-rotated keys j of block b (SeerAttention, arXiv 2410.13276).
    def pooled(self, k: Tensor, positions: Tensor, impl: str | None = None) -> Tensor:
        """Features of the whole blocks of ``k`` [B, G, N, D] (after RoPE): float32 [B, G, N // S, 3·D]."""
        plain = k.float() if self.rotary is None else self.rotary.unrotate(k, positions[:, None])
        return pooled_features(plain, self.config.block_size, impl=impl)

    # κ_b = R(centre of b) · W_k f_b, R(p) the layer's rotary rotation at position p.
    def project_keys(self, features: Tensor, positions: Tensor) -> Tensor:
        """Stage-1 keys from `pooled` features: float32 [B, G, N // S, R], rotated at each block's centre."""
        keys = torch.einsum("bgnf,grf->bgnr", features, self.wk.float())
        size = self.config.block_size
        centres = positions[:, : keys.shape[2] * size : size].float() + (size - 1) / 2
        return self._rotate_features(keys, centres[:, None])

    def router_keys(self, k: Tensor, positions: Tensor, impl: str | None = None) -> Tensor:
        """Stage-1 keys of the whole blocks of ``k`` [B, G, N, D] at ``positions`` [1 or B, N]: float32 [B, G, N // S,
        R].

        ``impl`` names the implementation that pools them, None for the default.
        """
        spans = [slice(at, at + KEY_CHUNK) for at in range(0, max(k.shape[2], 1), KEY_CHUNK)]
        return torch.cat(
            [self.project_keys(self.pooled(k[:, :, at], positions[:, at], impl), positions[:, at]) for at in spans], 2
        )

    def stage_one_keys(self, inputs: RoutingInputs) -> Tensor:
        """Stage-1 keys [B, G, at least N // S, R] in the dtype of the keys:
        those of the cache, or made from the keys.
        """
        keys = self.router_keys(inputs.k, inputs.positions) if inputs.router_keys is None else inputs.router_keys
        return keys.to(inputs.k.dtype)

    def _rotate_features(self, x: Tensor, positions: Tensor) -> Tensor:
        return x if self.rotary is None else self.rotary.rotate(x, positions)

    # ρ_r = R(centre of run r) · W_q [mean of its un-rotated queries, heads of the KV group side by side].
    def query_features(
        self, q: Tensor, positions: Tensor, grid: TileGrid, tiles: Tensor, consecutive: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Stage-1 queries of the tiles (int64 [m]): (float32 [B, G, m, runs, R], boolean [m, runs]: the run has
        tokens).

        ``q`` [B·G, m, Hg, T, D] are the tiles' queries, zero where a tile has no token of the call, ``positions`` [1 or
        B, N] the rotary positions of all keys, ``consecutive`` as in `RoutingInputs`.
        """
        runs = min(QUERY_RUNS, grid.query_tile)
        q = q.unflatten(0, (-1, self.groups))
        first = grid.first_positions(q.device)[tiles]
        if grid.query_tile == 1:  # one run of one token: nothing to pool
            positions = positions[:, first, None].float()
            plain = q.float() if self.rotary is None else self.rotary.unrotate(q, positions[:, None, :, None])
            queries = torch.einsum("bgmrf,gof->bgmro", plain.flatten(-3)[..., None, :], self.wq.float())
            return self._rotate_features(queries, positions[:, None]), torch.ones_like(first, dtype=torch.bool)[:, None]
        content = first[:, None] + torch.arange(grid.query_tile, device=q.device, dtype=torch.int64)
        real = (content >= grid.q_offset) & (content < grid.kv_len)
        token = content.clamp(grid.q_offset, grid.kv_len - 1)
        # those of no token go on from the call's first and last
        positions = (positions[:, token] + (content - token)).float()
        count = real.unflatten(-1, (runs, -1)).sum(-1)
        share = 1 / count.clamp(min=1).float()
        sums = self._run_sums(q, positions, runs, consecutive).transpose(3, 4).flatten(-2)
        centres = (positions * real).unflatten(-1, (runs, -1)).sum(-1) * share
        queries = torch.einsum("bgmrf,gof->bgmro", sums * share[..., None], self.wq.float())
        return self._rotate_features(queries, centres[:, None]), count > 0

    # Σ_i R(p_i)⁻¹ q_i = R(c)⁻¹ Σ_i R(p_i − c)⁻¹ q_i, c the middle of the run.
    def _run_sums(self, q: Tensor, positions: Tensor, runs: int, consecutive: bool | None) -> Tensor:
        """Sums of the un-rotated queries over the runs of each tile: float32 [B, G, m, Hg, runs, D].

        ``q`` [B, G, m, Hg, T, D], zero where there is no token, and float ``positions`` [1 or B, m, T].
        """
        length = q.shape[4] // runs
        if consecutive is None and q.device.type == "cpu":
            consecutive = bool((positions.diff(dim=-1) == 1).all())  # reading it would wait for an accelerator
        if self.rotary is not None and consecutive and length > 1:
            # consecutive positions turn alike around the middle of each run: one product per run, then one turn
            offsets = torch.arange(length, device=q.device, dtype=torch.float32) - (length - 1) / 2
            matrix = self.rotary.relative(offsets, q.shape[-1]).flatten(0, 1).to(q.dtype)
            sums = torch.matmul(q.unflatten(4, (runs, -1)).flatten(-2), matrix)
            middle = positions.unflatten(-1, (runs, -1)).mean(-1)
            return self.rotary.unrotate(sums, middle[:, None, :, None])
        plain = q.float() if self.rotary is None else self.rotary.unrotate(q, positions[:, None, :, None])
        return plain.reshape(*q.shape[:4], runs, -1, q.shape[-1]).sum(5)

    # -- stage 2 ---------------------------------------------------------------------------------------------------

    # Head h samples the tokens ⌊i · T / r⌋ + ⌊h · ⌊T / r⌋ / Hg⌋ for i < r.
    def representatives(self, grid: TileGrid, device: torch.device) -> Tensor:
        """Which tokens of a tile stage 2 scores, strided with an offset per head: int64 [Hg, r]."""
        hg, t = self.heads // self.groups, grid.query_tile
        count = min(self.config.query_samples, t)
        offset = torch.arange(hg, device=device, dtype=torch.int64) * (t // count) // hg
        return torch.arange(count, device=device, dtype=torch.int64) * t // count + offset[:, None]

    # s_ij = (U q_i) · (V k_j) = (Vᵀ U q_i) · k_j with U = wq_index and V = wk_index.
    def index_queries(self, q: Tensor, fold: bool) -> Tensor:
        """``q`` [B·G, ..., D] in index space [..., I];
        with ``fold`` mapped back so that it meets keys themselves, [..., D].
        """
        batch = q.shape[0] // self.groups
        matrix = (
            torch.einsum("gid,gie->ged", self.wq_index.float(), self.wk_index.float())
            if fold
            else self.wq_index.float()
        )
        out = torch.einsum("bgxd,god->bgxo", q.float().reshape(batch, self.groups, -1, self.head_dim), matrix)
        return out.reshape(*q.shape[:-1], -1)

    def index_keys(self, k: Tensor) -> Tensor:
        """``k`` [B, G, N, D] in index space: [B, G, N, I] in its own dtype."""
        return torch.matmul(k, self.wk_index.to(k.dtype).transpose(1, 2))


def active_router(module: Any) -> SparseRouter:
    """The router that runs: ``module`` itself, or, where PEFT wrapped it, the copy of the active adapter (the original
    without one).
    """
    if isinstance(module, SparseRouter):
        return module
    adapter = None if module.disable_adapters else next(iter(module.active_adapters), None)
    router: SparseRouter = module.original_module if adapter is None else module.modules_to_save[adapter]
    return router
