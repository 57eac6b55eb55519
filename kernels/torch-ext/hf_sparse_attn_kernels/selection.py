"""The selection that routers make and attention consumes, and the deterministic top-k that both stages use.

Shape legend of this package: B batch, H query heads, G KV heads (groups), N keys, Q queries, D head dim, T query
tile, S block size, n query tiles, nb key blocks, K kept blocks of a tile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class TileGrid:
    """Which content positions the query tiles of one call cover.

    The queries are the last ``q_len`` of ``kv_len`` tokens. Tiles are counted from content position 0, so the first
    tile of a call that continues a cache may hold only the end of a tile. Without ``causal`` every key of a kept block
    is visible to every query of its tile.
    """

    q_len: int
    kv_len: int
    query_tile: int
    block_size: int
    causal: bool = True

    def __post_init__(self) -> None:
        if self.q_len < 0 or self.kv_len < self.q_len:
            raise ValueError(
                f"q_len={self.q_len} queries cannot be the last of kv_len={self.kv_len} keys: need 0 <= q_len <= kv_len"
            )
        if self.query_tile < 1 or self.block_size < 1:
            raise ValueError(f"query_tile={self.query_tile} and block_size={self.block_size} must be positive")
        if self.query_tile != 1 and self.query_tile % self.block_size and self.block_size % self.query_tile:
            raise ValueError(
                f"query_tile={self.query_tile} and block_size={self.block_size}: one must divide the other (or "
                "query_tile be 1)"
            )

    @property
    def q_offset(self) -> int:
        """Content position of the first query."""
        return self.kv_len - self.q_len

    @property
    def lead(self) -> int:
        """Tokens of the first tile that lie before the first query."""
        return self.q_offset % self.query_tile

    @property
    def tiles(self) -> int:
        return -(-(self.lead + self.q_len) // self.query_tile) if self.q_len else 0

    @property
    def blocks(self) -> int:
        return -(-self.kv_len // self.block_size)

    @property
    def own_blocks(self) -> int:
        """Most blocks that one tile's own tokens touch."""
        return max(1, self.query_tile // self.block_size)

    def first_positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Content position at which each tile starts, ``[n]`` (int64)."""
        tile = torch.arange(self.tiles, device=device, dtype=torch.int64)
        return (tile + self.q_offset // self.query_tile) * self.query_tile

    def last_positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Content position of each tile's last query, ``[n]`` (int64)."""
        return (self.first_positions(device) + self.query_tile - 1).clamp_(max=self.kv_len - 1)

    def visible_blocks(self, device: torch.device | str = "cpu") -> Tensor:
        """Lists of all blocks that each tile sees, ``[n, nb]`` (int32), ascending, −1 first.

        Entry j of a list of nb blocks, of which a tile sees m, is j − (nb − m).
        """
        block = torch.arange(self.blocks, device=device, dtype=torch.int32)
        if not self.causal:
            return block.expand(self.tiles, -1)
        seen = self.last_positions(device).int() // self.block_size + 1
        return (block - self.blocks + seen[:, None]).clamp_(min=-1)


@dataclass(frozen=True)
class BlockSelection:
    """The links that are kept: for every query tile of every KV head a list of key blocks.

    ``indices`` ``[B, G, n, K]`` int32, ascending, −1 = empty (so empty entries come first). ``scores`` ``[B, G, n, K]``
    float32 is the router's estimate of the softmax mass of each link, NaN where a link was kept without being scored.

    ``documents`` int64 ``[R, 3]`` holds (batch row, first slot, end slot) of the R documents of a padded or packed
    batch; they do not overlap. ``indices`` is then ``[R, G, n, K]`` with n the most tiles of any document (surplus
    tiles all −1); tiles and blocks are counted from each document's first slot, and ``grid`` describes the slots of the
    whole call. The queries of a document are those of its slots that lie among the call's queries. None: a document is
    a batch row.
    """

    indices: Tensor
    grid: TileGrid
    scores: Tensor | None = None
    documents: Tensor | None = None

    def check(self, q: Tensor, k: Tensor, values: bool | None = None) -> None:
        """Raise ValueError unless this selection fits ``q`` [B, H, Q, D] and ``k`` [B, G, N, D].

        Shapes are always checked; ``values``, which reads the indices back from the device, only if asked for or if the
        environment variable HF_SPARSE_ATTN_DEBUG is 1.
        """
        indices, grid = self.indices, self.grid
        rows, tiles = (k.shape[0], grid.tiles) if self.documents is None else (len(self.documents), indices.shape[2])
        want = (rows, k.shape[1], tiles)
        if indices.shape[:3] != want or indices.dim() != 4 or q.shape[2] != grid.q_len or k.shape[2] != grid.kv_len:
            raise ValueError(
                f"the selection was made for indices {tuple(indices.shape[:3])}, q_len={grid.q_len}, "
                f"kv_len={grid.kv_len}, but got q {tuple(q.shape)} and k {tuple(k.shape)} (indices must be {want})"
            )
        if indices.dtype != torch.int32 or indices.device != k.device:
            raise ValueError(
                f"BlockSelection.indices is {indices.dtype} on {indices.device}: must be torch.int32 on {k.device}"
            )
        if self.documents is not None and (self.documents.shape[1:] != (3,) or self.documents.dtype != torch.int64):
            raise ValueError(
                f"BlockSelection.documents is {self.documents.dtype} {tuple(self.documents.shape)}: must be int64 [R, "
                "3] "
                "with (batch row, first slot, end slot)"
            )
        heads, groups = q.shape[1], k.shape[1]
        if heads % groups if groups else heads:
            raise ValueError(
                f"{heads} query heads cannot share {groups} KV heads: the first must be a multiple of the second"
            )
        if os.environ.get("HF_SPARSE_ATTN_DEBUG") == "1" if values is None else values:
            self._check_values(k.shape[0])

    def by_document(self, batch: int | None = None) -> Iterator[tuple[int, int, BlockSelection]]:
        """(batch row, first slot, selection) of every document that has queries; reads ``documents`` back to the host.

        Raises:
            ValueError: a document does not lie in the slots of the call (and in its ``batch`` rows), or has too few
                lists.
        """
        assert self.documents is not None
        for index, (row, first, end) in enumerate(self.documents.tolist()):
            if not (0 <= first < end <= self.grid.kv_len and row >= 0 and (batch is None or row < batch)):
                raise ValueError(
                    f"BlockSelection.documents holds {[row, first, end]}: must lie in {batch} rows of "
                    f"{self.grid.kv_len} slots "
                    "and share no slot with another document"
                )
            queries = end - max(first, self.grid.q_offset)
            if queries > 0:
                grid = replace(self.grid, q_len=queries, kv_len=end - first)
                if self.indices.shape[2] < grid.tiles:
                    raise ValueError(
                        f"BlockSelection.indices holds {self.indices.shape[2]} tiles, but a document has {grid.tiles}"
                    )
                yield row, first, BlockSelection(self.indices[index : index + 1, :, : grid.tiles], grid)

    def _check_values(self, batch: int) -> None:
        if self.documents is None:
            self.check_blocks()
            return
        for _, _, part in self.by_document(batch):
            part.check_blocks()
        taken = torch.zeros(batch, self.grid.kv_len, dtype=torch.bool, device="cpu")
        for row, first, end in self.documents.tolist():
            if bool(taken[row, first:end].any()):
                raise ValueError(
                    f"BlockSelection.documents holds {[row, first, end]}: must share no slot with another document"
                )
            taken[row, first:end] = True

    def check_blocks(self) -> None:
        """Raise ValueError unless every list is ascending and unique and holds blocks that its tile sees;
        reads the indices back.
        """
        idx = self.indices
        if idx.numel() == 0:
            return
        # only empty entries may repeat
        wrong = (idx[..., 1:] <= idx[..., :-1]) & (idx[..., :-1].maximum(idx[..., 1:]) >= 0)
        if bool(wrong.any()):
            at = tuple(wrong.nonzero()[0, :3].tolist())
            raise ValueError(
                f"BlockSelection.indices{list(at)} is {idx[at].tolist()}: must be ascending and unique, with -1 "
                "(empty) first"
            )
        end = self.grid.blocks - 1
        last_block = (self.grid.last_positions(idx.device) // self.grid.block_size).view(1, 1, -1)
        late = idx[..., -1] > (last_block if self.grid.causal else end)
        if bool(late.any()):
            block = int(idx[..., -1][late][0])
            why = (
                "starts after its tile's last query: causal attention cannot read it"
                if self.grid.causal
                else f"is after the last, {end}"
            )
            raise ValueError(f"BlockSelection.indices holds block {block}, which {why}")

    def kept_keys(self) -> Tensor:
        """Keys of the blocks that each tile keeps, forced ones included: int64 ``[B, G, n]``.
        A partial last block counts what it holds.
        """
        size, idx = self.grid.block_size, self.indices
        count = (idx >= 0).sum(-1) * size
        if idx.shape[-1] == 0:
            return count
        length = torch.tensor(self.grid.kv_len, device=idx.device, dtype=torch.int64)
        if self.documents is not None:
            length = (self.documents[:, 2] - self.documents[:, 1]).to(idx.device)[:, None, None]
        # only the last block of a document can be partial, and it can only be a list's last entry
        return torch.where(idx[..., -1] == (length - 1) // size, count - -length % size, count)

    def kept(self) -> Tensor:
        """Boolean ``[B, G, n, nb]``: which blocks are kept."""
        shape = (*self.indices.shape[:3], self.grid.blocks + 1)
        # column 0 collects the empty entries (−1) and is cut off
        mask = torch.zeros(shape, dtype=torch.bool, device=self.indices.device)
        return mask.scatter_(3, (self.indices.long() + 1), True)[..., 1:]


def join_documents(selections: Sequence[BlockSelection], documents: Tensor, q_len: int, kv_len: int) -> BlockSelection:
    """The selection of a call, the last Q of N slots, from those [1, G, n, K] of its ``documents`` int64 [R, 3].

    What `BlockSelection.by_document` takes apart; scores are left out, which attention does not read.

    Raises:
        ValueError: tiles or blocks of two documents differ in size, or one is causal and another is not.
    """
    grids = {(s.grid.query_tile, s.grid.block_size, s.grid.causal) for s in selections}
    if len(grids) != 1:
        raise ValueError(
            f"documents are joined whose (query_tile, block_size, causal) are {sorted(grids)}: must be the same for all"
        )
    lists = [s.indices for s in selections]
    tiles, width = (max(x.shape[dim] for x in lists) for dim in (2, 3))
    indices = lists[0].new_full((len(lists), lists[0].shape[1], tiles, width), -1)
    for r, x in enumerate(lists):  # ascending lists have their empty entries first
        indices[r, :, : x.shape[2], width - x.shape[3] :] = x[0]
    return BlockSelection(indices, replace(selections[0].grid, q_len=q_len, kv_len=kv_len), documents=documents)


def ordered_topk(scores: Tensor, k: int) -> Tensor:
    """Indices (int64 [..., k]) of the ``k`` best entries of the last dimension, best first, ties to the lower index.

    ``torch.topk`` promises no order among ties, so the order-preserving bits of the float32 score and the inverted
    index are packed into one int64 that has no ties. NaN counts as −inf.
    """
    width = scores.shape[-1]
    # −0.0 and 0.0 are equal scores but differ in bits: adding 0.0 makes both +0.0
    clean = scores.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).add_(0.0)
    bits = clean.view(torch.int32)
    bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))  # negative floats: more magnitude bits mean less
    inverted = _descending.__wrapped__ if torch.compiler.is_compiling() else _descending  # a graph holds its own
    # key = bits(score) · 2³² + (width − 1 − index): the largest keys, and the indices in their low halves
    packed = bits.long().bitwise_left_shift_(32).add_(inverted(width, scores.device))
    return packed.topk(k, dim=-1).values.bitwise_and_(0xFFFFFFFF).neg_().add_(width - 1)


@lru_cache(maxsize=64)
def _descending(width: int, device: torch.device) -> Tensor:
    return torch.arange(width - 1, -1, -1, device=device, dtype=torch.int64)
