"""Budgets of one layer that differ by KV head and length, as a calibration finds them."""

# Shape legend: G KV heads, n query tiles.

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MOST_SHARE = 0.6  # of the visible keys: a head that needs more is dense


@dataclass(frozen=True)
class HeadBudgets:
    """Shares of the visible keys that the KV heads of a layer may keep, forced keys included; with ``in_keys`` numbers
    of keys.

    ``ends`` are the visible keys up to which each length bucket reaches; longer inputs belong to the last one.
    ``shares`` holds one row of G shares for every bucket: up to 0.6, or 1 where the head is dense.

    Raises:
        ValueError: the ends do not rise, there is not a row of as many shares for each, or a share is another.
    """

    ends: tuple[int, ...]
    shares: tuple[tuple[float, ...], ...]
    in_keys: bool = False

    def __post_init__(self) -> None:
        if not self.ends or sorted(set(self.ends)) != list(self.ends) or self.ends[0] < 1:
            raise ValueError(f"the ends of length buckets are {self.ends}: must be rising numbers of keys")
        if len(self.shares) != len(self.ends) or len({len(row) for row in self.shares}) != 1:
            raise ValueError(
                f"{len(self.ends)} length buckets need as many rows of a share for every KV head, got {self.shares}"
            )
        for share in (share for row in self.shares for share in row):
            if self.in_keys:
                if share < 1:
                    raise ValueError(f"a head's budget is {share} keys: must be at least 1")
            elif not (0 < share <= MOST_SHARE or share == 1):
                raise ValueError(
                    f"a head's share of the keys is {share}: must be in (0, {MOST_SHARE}], or 1 where it is dense"
                )

    def bucket(self, visible: int) -> int:
        """Index of the bucket of a tile that sees ``visible`` keys."""
        return min(bisect_left(self.ends, visible), len(self.ends) - 1)

    def most_blocks(self, visible: int, block_size: int) -> int:
        """Blocks of the largest budget of a head that is not dense, 0 if all are."""
        # a dense head gets lists of its own: it must not widen those of the others
        keys = [count for count in self.keys(visible) if count < visible]
        return math.ceil(max(keys, default=0) / block_size)

    def keys(self, visible: int) -> list[float]:
        """Keys that every head of a tile may keep which sees ``visible`` keys;
        all of them or more where it is dense.
        """
        return [share if self.in_keys else share * visible for share in self.shares[self.bucket(visible)]]

    @property
    def is_dense(self) -> bool:
        """All heads are dense at every length."""
        return not self.in_keys and all(share == 1 for row in self.shares for share in row)


@dataclass(frozen=True)
class AllowedBlocks:
    """What the heads may keep in the n tiles of a call: ``blocks`` int64 [G, n];
    ``dense`` boolean [G, n] or None if no head is.
    """

    blocks: Tensor
    dense: Tensor | None


@lru_cache(maxsize=256)  # of every layer's decode step
def allowed_blocks(
    budgets: HeadBudgets, visible: tuple[int, ...], block_size: int, device: torch.device | str
) -> AllowedBlocks:
    """Budgets of tiles that see ``visible`` keys; a dense head may keep all blocks."""
    rows = [budgets.keys(seen) for seen in visible]
    blocks = [[math.ceil(keys / block_size) for keys in row] for row in rows]
    dense = [[keys >= seen for keys in row] for seen, row in zip(visible, rows, strict=True)]
    # None spares the caller lists of all blocks where no head needs them
    some = torch.tensor(dense, device=device, dtype=torch.bool).T.contiguous() if any(map(any, dense)) else None
    return AllowedBlocks(torch.tensor(blocks, device=device, dtype=torch.int64).T.contiguous(), some)
