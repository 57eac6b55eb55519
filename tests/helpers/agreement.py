"""What the tests of several suites hold selections against."""

from __future__ import annotations

import itertools

import torch


def assert_same_up_to_ties(got, want, plan):
    """Blocks that only one of two selections keeps have a score within 1e-5 relative of their tile's threshold."""
    eligible = plan.eligible_mask(torch.arange(plan.grid.tiles, device=plan.device))
    assert plan.any_open and got.indices.shape == want.indices.shape
    for tile in plan.open.nonzero()[:, 0].tolist():
        for row, group in itertools.product(*map(range, want.indices.shape[:2])):
            at = (row, group, tile)
            score = dict(zip(want.indices[at].tolist(), want.scores[at].tolist(), strict=True))
            score |= dict(zip(got.indices[at].tolist(), got.scores[at].tolist(), strict=True))
            kept = [{b for b in s.indices[at].tolist() if b >= 0 and eligible[tile, b]} for s in (want, got)]
            assert len(kept[0]) == len(kept[1]) == int(plan.free[tile])
            threshold = min(score[b] for b in kept[0])
            for block in kept[0] ^ kept[1]:
                assert abs(score[block] - threshold) <= 1e-5 * threshold


def assert_close_to_largest(got, want, tolerance):
    """No value is further off than ``tolerance`` times the largest one."""
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def assert_same_sums(got, want, terms):
    """Sums of the same ``terms`` numbers in another order differ by no more than ``terms`` times epsilon of the largest
    sum.

    Of n terms of random sign and size t a sum is about √n·t, and the rounding of its n partial sums about ε·n·t, √n·ε
    of it: the bound leaves √n standard deviations to whatever order a processor sums in. A term that is missing is 1/√n
    to 1/n of a sum.
    """
    assert_close_to_largest(got, want, terms * torch.finfo(want.dtype).eps)
