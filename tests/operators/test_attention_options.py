"""`block_sparse_attention`: documents, soft cap, sinks, bidirectional attention, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hf_sparse_attn_kernels import BlockSelection, TileGrid, block_sparse_attention, join_documents
from hf_sparse_attn_kernels.triton_kernels import support

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FAST = ("torch", "cpp")  # implementations that run on a CPU beside the reference


def qkv(grid, batch=1, groups=2):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, groups * 3, grid.q_len, 16, generator=generator)
    k, v = (torch.randn(batch, groups, grid.kv_len, 16, generator=generator) for _ in range(2))
    return q, k, v


def packed(seed, grid, documents, groups=2, share=0.6):
    """A random selection of a batch of documents (batch row, first slot, end slot)."""
    generator = torch.Generator().manual_seed(seed)
    empty = BlockSelection(
        torch.empty(len(documents), groups, grid.tiles + 1, 0, dtype=torch.int32), grid, None, torch.tensor(documents)
    )
    parts = {(row, first): part.grid for row, first, part in empty.by_document()}
    indices = torch.full(
        (len(documents), groups, max(g.tiles for g in parts.values()), grid.blocks), -1, dtype=torch.int32
    )
    block = torch.arange(grid.blocks)
    for r, (row, first, _) in enumerate(documents):
        if part := parts.get((row, first)):
            last = (part.last_positions() // part.block_size)[:, None] if part.causal else part.blocks - 1
            keep = (torch.rand(groups, part.tiles, grid.blocks, generator=generator) < share) & (block <= last)
            indices[r, :, : part.tiles] = torch.where(keep, block, -1).sort(-1).values.int()
    return BlockSelection(indices, grid, None, torch.tensor(documents))


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_each_document_is_computed_as_if_it_were_alone(impl):
    grid = TileGrid(90, 130, 64, 16)
    documents = [(0, 30, 130), (1, 0, 57), (1, 57, 120), (1, 121, 125)]
    q, k, v = qkv(grid, batch=2)
    selection = packed(1, grid, documents)
    selection.check(q, k, values=True)
    out, lse = block_sparse_attention(q, k, v, selection, impl=impl, return_lse=True)
    real = torch.zeros(2, 130, dtype=torch.bool)
    for r, (row, first, end) in enumerate(documents):
        real[row, first:end] = True
        queries = end - max(first, 40)
        alone = TileGrid(queries, end - first, 64, 16)
        part = BlockSelection(selection.indices[r : r + 1, :, : alone.tiles], alone)
        want, _ = block_sparse_attention(
            q[row : row + 1, :, end - 40 - queries : end - 40],
            k[row : row + 1, :, first:end],
            v[row : row + 1, :, first:end],
            part,
            impl=impl,
        )
        torch.testing.assert_close(out[row : row + 1, :, end - 40 - queries : end - 40], want)
    blank = ~real[:, 40:, None].transpose(1, 2).expand(2, 6, 90)
    assert not out[blank].any() and bool((lse[blank] == -torch.inf).all())
    with pytest.raises(ValueError, match="share no slot"):
        BlockSelection(selection.indices[:2], grid, None, torch.tensor([(0, 3, 9), (0, 8, 12)])).check(
            q, k, values=True
        )
    with pytest.raises(ValueError, match="int64"):
        BlockSelection(selection.indices, grid, None, torch.tensor(documents).int()).check(q, k)


DOCUMENTS = {  # padding on the left, on the right, packed with gaps, in any order and with one that has no queries
    "left": [(0, 0, 130), (1, 30, 130)],
    "right": [(0, 0, 130), (1, 0, 95)],
    "packed": [(1, 57, 120), (0, 33, 41), (0, 50, 130), (1, 0, 57), (1, 120, 125), (0, 0, 33)],
}


def alone(tensors, selection, softcap, dtype):
    """What `gradients` gives, of every document by itself in the reference: sliced by hand, in ``dtype``."""
    q, k, v, sinks = (x if x is None else x.to(dtype) for x in tensors)
    offset = selection.grid.q_offset
    results = [torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf), *(torch.zeros_like(x) for x in (q, k, v))]
    results += [] if sinks is None else [torch.zeros_like(sinks)]
    generator = torch.Generator().manual_seed(7)
    weights, lse_weights = (torch.randn(x.shape, generator=generator).to(dtype) for x in results[:2])
    for row, first, part in selection.by_document(len(q)):
        end = first + part.grid.kv_len
        slots, at = (slice(row, row + 1), slice(None), slice(first, end)), (slice(row, row + 1), slice(None))
        at = (*at, slice(end - part.grid.q_len - offset, end - offset))
        leaves = [x.clone().requires_grad_() for x in (q[at], k[slots], v[slots])]
        sink = None if sinks is None else sinks.clone().requires_grad_()
        out, lse = block_sparse_attention(*leaves, part, softcap=softcap, sinks=sink, impl="reference", return_lse=True)
        ((out * weights[at]).sum() + (lse.masked_fill(lse == -torch.inf, 0) * lse_weights[at]).sum()).backward()
        for whole, where, x in zip(
            results, (at, at, at, slots, slots), (out, lse, *(leaf.grad for leaf in leaves)), strict=False
        ):
            whole[where] = x.detach()
        if sink is not None:
            results[5] += sink.grad
    return results


@pytest.mark.parametrize("layout", DOCUMENTS)
@pytest.mark.parametrize("with_options", [False, True])
@pytest.mark.parametrize(
    ("q_len", "tiling", "causal"),
    [(130, (64, 16), True), (90, (16, 32), True), (130, (64, 16), False), (9, (1, 16), True)],
)
@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_documents_have_the_gradients_of_separate_ones(impl, q_len, tiling, causal, with_options, layout):
    """Query heads share KV heads; with a soft cap and sinks or without."""
    grid = TileGrid(q_len, 130, *tiling, causal)
    softcap, sinks = (2.0, torch.linspace(-1, 3, 6)) if with_options else (None, None)
    tensors, selection = (*qkv(grid, batch=2), sinks), packed(5, grid, DOCUMENTS[layout])
    selection.check(*tensors[:2], values=True)
    want = alone(tensors, selection, softcap, torch.float64)
    for a, b in zip(gradients(tensors, selection, impl, softcap), want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", DOCUMENTS)
@pytest.mark.parametrize("impl", FAST)
def test_documents_in_bfloat16_err_no_more_than_eager_ones(impl, layout):
    grid = TileGrid(90, 130, 64, 16)
    tensors, selection = (*(x.bfloat16() for x in qkv(grid, batch=2)), None), packed(5, grid, DOCUMENTS[layout])
    exact = alone(tensors, selection, None, torch.float64)
    results = [gradients(tensors, selection, name, None, torch.bfloat16) for name in (impl, "reference")]
    for got, eager, want in zip(*results, exact, strict=True):
        error, allowed = ((x.double() - want)[want > -torch.inf].square().mean().sqrt().item() for x in (got, eager))
        assert error <= 1.1 * allowed + 1e-6


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_documents_that_the_call_does_not_hold_are_refused(impl):
    grid = TileGrid(90, 130, 64, 16)
    q, k, v = qkv(grid, batch=2)
    good = packed(5, grid, DOCUMENTS["packed"])
    for place in (
        (2, 0, 9),
        (-1, 0, 9),
        (0, -1, 9),
        (0, 20, 131),
        (0, 9, 9),
        (0, 9, 3),
        (0, 1 << 62, 3),
        (1 << 62, 0, 3),
    ):
        documents = good.documents.clone()
        documents[1] = torch.tensor(place)
        with pytest.raises(
            ValueError,
            match=rf"documents holds \[{place[0]}, {place[1]}, {place[2]}\]: must lie in 2 rows of 130 slots",
        ):
            block_sparse_attention(q, k, v, BlockSelection(good.indices, grid, None, documents), impl=impl)
    with pytest.raises(ValueError, match=r"1 tiles, but .*document.* has 2"):
        block_sparse_attention(q, k, v, BlockSelection(good.indices[:, :, :1], grid, None, good.documents), impl=impl)


def test_documents_that_share_slots_are_refused_by_the_kernels_that_would_write_them_twice():
    grid = TileGrid(90, 130, 64, 16)
    q, k, v = qkv(grid, batch=2)
    selection = packed(5, grid, [(1, 50, 130), (0, 0, 20), (1, 0, 51)])
    with pytest.raises(ValueError, match=r"documents holds \[1, 50, 130\] after \[1, 0, 51\]: must share no slot"):
        block_sparse_attention(q, k, v, selection, impl="cpp")


def test_joined_documents_are_taken_apart_again():
    grid = TileGrid(90, 130, 64, 16)
    selection = packed(5, grid, DOCUMENTS["packed"])
    places = selection.documents[[0, 1, 2, 3, 4]]  # the last has no queries
    parts = [part for _, _, part in selection.by_document()]
    joined = join_documents(parts, places, 90, 130)
    assert joined.grid == grid and joined.documents is places
    for (_, _, got), want in zip(joined.by_document(), parts, strict=True):
        assert got.grid == want.grid and torch.equal(got.indices, want.indices)
    other = BlockSelection(parts[1].indices, dataclasses.replace(parts[1].grid, query_tile=16))
    with pytest.raises(ValueError, match=r"are \[\(16, 16, True\), \(64, 16, True\)\]: must be the same for all"):
        join_documents([parts[0], other], places[:2], 90, 130)


@pytest.mark.parametrize("causal", [True, False])
def test_softcap_sinks_and_bidirectional_attention_of_the_reference(causal):
    grid = TileGrid(50, 70, 64, 16, causal)
    q, k, v = (x.double() for x in qkv(grid))
    sinks = torch.linspace(-1, 3, 6, dtype=torch.float64)
    block = torch.arange(5).expand(1, 2, grid.tiles, 5).int()
    selection = BlockSelection(
        torch.where(block * 16 <= grid.last_positions()[:, None], block, -1).sort(-1).values.int(), grid
    )
    if not causal:
        selection = BlockSelection(block, grid)
    out, lse = block_sparse_attention(q, k, v, selection, softcap=2.0, sinks=sinks, impl="reference", return_lse=True)
    scores = 2 * torch.tanh(q @ k.repeat_interleave(3, 1).mT * 16**-0.5 / 2)
    if causal:
        scores = scores.masked_fill(torch.arange(70) > torch.arange(20, 70)[:, None], -torch.inf)
    weights = scores.exp() / (scores.exp().sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    torch.testing.assert_close(out, weights @ v.repeat_interleave(3, 1))
    torch.testing.assert_close(lse, (scores.exp().sum(-1) + sinks.exp()[:, None]).log())


def random_rows(seed, grid, rows, share):
    """A random selection with blocks of the future only where ``grid`` lets queries read them;
    no row is sure to see a key.
    """
    block = torch.arange(grid.blocks)
    last = (grid.last_positions() // grid.block_size)[:, None] if grid.causal else grid.blocks - 1
    keep = torch.rand(*rows, grid.tiles, grid.blocks, generator=torch.Generator().manual_seed(seed)) < share
    return BlockSelection(torch.where(keep & (block <= last), block, -1).sort(-1).values.int(), grid)


def gradients(tensors, selection, impl, softcap, dtype=torch.float32):
    """[out, lse, dq, dk, dv, dsinks] of a loss that reads both results;
    ``tensors`` are q, k, v and the sinks or None.
    """
    q, k, v, sinks = (x if x is None else x.to(dtype).clone().requires_grad_() for x in tensors)
    out, lse = block_sparse_attention(q, k, v, selection, softcap=softcap, sinks=sinks, impl=impl, return_lse=True)
    generator = torch.Generator().manual_seed(7)
    weights, lse_weights = (torch.randn(x.shape, generator=generator).to(dtype) for x in (out, lse))
    seen = lse > -torch.inf
    ((out * weights).sum() + (lse.masked_fill(~seen, 0) * lse_weights).sum()).backward()
    return [out, lse, q.grad, k.grad, v.grad, *([] if sinks is None else [sinks.grad])]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "tiling"), [(50, 70, (64, 16)), (130, 130, (64, 16)), (90, 90, (16, 64)), (40, 40, (1, 16))]
)
@pytest.mark.parametrize("impl", FAST)
def test_every_implementation_matches_the_reference_under_every_option(
    impl, causal, softcap, with_sinks, q_len, kv_len, tiling
):
    """Forward, log-sum-exp, and the gradients of both with respect to q, k, v and the sinks."""
    grid = TileGrid(q_len, kv_len, *tiling, causal)
    tensors = (*qkv(grid, batch=2), torch.linspace(-1, 3, 6) if with_sinks else None)
    selection = random_rows(3, grid, (2, 2), 0.5)
    want = gradients(tensors, selection, "reference", softcap, torch.float64)
    got = gradients(tensors, selection, impl, softcap)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("impl", FAST)
def test_one_query_over_a_cache_under_every_option(impl, softcap, with_sinks):
    grid = TileGrid(1, 77, 1, 16)
    q, k, v = qkv(grid, batch=2)
    sinks = torch.linspace(-1, 3, 6) if with_sinks else None
    selection = BlockSelection(torch.tensor([0, 2, 4], dtype=torch.int32).expand(2, 2, 1, 3), grid)
    options = {"softcap": softcap, "sinks": sinks, "return_lse": True}
    for a, b in zip(
        *(block_sparse_attention(q, k, v, selection, impl=i, **options) for i in (impl, "reference")), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(2.0, False), (None, True), (2.0, True)])
@pytest.mark.parametrize("impl", FAST)
def test_the_error_of_options_in_low_precision_is_at_most_eager_s(impl, dtype, softcap, with_sinks):
    """Root-mean-square error of the output against float64; margin a tenth."""
    grid = TileGrid(600, 600, 64, 16)
    q, k, v = (x.to(dtype) for x in qkv(grid))
    sinks = torch.linspace(-1, 3, 6).to(dtype) if with_sinks else None
    selection = random_rows(4, grid, (1, 2), 0.4)

    def run(impl, working):
        cast = [x if x is None else x.to(working) for x in (q, k, v, sinks)]
        return block_sparse_attention(*cast[:3], selection, softcap=softcap, sinks=cast[3], impl=impl)[0].double()

    exact = run("reference", torch.float64)
    ours, eager = ((run(impl, dtype) - exact).pow(2).mean().sqrt().item() for impl in (impl, "reference"))
    assert ours <= 1.1 * eager + 1e-6


def test_the_triton_implementation_names_what_it_lacks(monkeypatch):
    grid = TileGrid(140, 140, 64, 16)
    q, k, v = qkv(grid, groups=1)
    selection = BlockSelection(torch.zeros(1, 1, 3, 1, dtype=torch.int32), grid)
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'impl="triton".*not installed.*impl="torch"'):
        block_sparse_attention(q, k, v, selection, impl="triton")
    monkeypatch.setattr(support, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r'device "cpu"; supported: CUDA'):
        block_sparse_attention(q, k, v, selection, impl="triton")
    monkeypatch.setattr(support, "interpreted", lambda: True)
    for name, case in {
        "head dim=20": (q[..., :1].expand(-1, -1, -1, 20), 64, 16),
        "block_size=8": (q, 64, 8),
        "query_tile=24": (q, 24, 16),
        "dtype=torch.float64": (q.double(), 64, 16),
    }.items():
        assert f'impl="triton": {name} is not supported; supported: ' in support.unsupported(*case)
    assert support.unsupported(q, 64, 16) is None


@pytest.mark.parametrize(
    ("options", "message"), [({"sinks": torch.zeros(2)}, r"sinks is .* \(2,\)"), ({"softcap": 0.0}, "softcap=0.0")]
)
def test_impossible_softcaps_and_sinks_are_refused(options, message):
    grid = TileGrid(140, 140, 64, 16)
    selection = BlockSelection(torch.zeros(1, 1, 3, 1, dtype=torch.int32), grid)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*qkv(grid, groups=1), selection, **options)
