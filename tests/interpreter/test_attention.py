"""The Triton attention kernels, forward and backward, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from hf_sparse_attn_kernels import BlockSelection, TileGrid, block_sparse_attention
from hf_sparse_attn_kernels.options import ScoreOptions
from hf_sparse_attn_kernels.triton_kernels import attention as operators
from hf_sparse_attn_kernels.triton_kernels.attention import block_sparse_attention_triton
from hf_sparse_attn_kernels.triton_kernels.inverse import invert

# queries, keys before them, query tile, block size, query heads of a KV group, head dim
CASES = [
    (1, 0, 64, 16, 1, 64),
    (63, 0, 64, 32, 3, 80),
    (111, 0, 64, 16, 4, 64),
    (250, 0, 64, 64, 3, 64),
    (250, 0, 128, 128, 1, 32),
    (111, 37, 64, 16, 3, 128),
    (63, 130, 64, 128, 8, 16),
    (1, 249, 64, 64, 4, 96),
    (1, 110, 1, 16, 3, 64),
    (1, 249, 1, 128, 8, 80),
    (20, 91, 1, 32, 4, 32),
    (63, 0, 1, 64, 1, 16),
    (100, 11, 16, 64, 3, 64),
    (111, 0, 32, 16, 4, 192),
    (63, 48, 128, 16, 1, 256),
]
PAIRS = pytest.mark.parametrize(("q_len", "past", "tile", "size", "per_group", "head_dim"), CASES)
PADDED = [(0, 0, 111), (1, 40, 111)]  # left padding
RIGHT = [(0, 0, 70), (1, 0, 111)]
PACKED = [(0, 0, 17), (0, 17, 80), (0, 80, 111), (1, 3, 100)]


@PAIRS
def test_float32(inputs, select, judge, q_len, past, tile, size, per_group, head_dim):
    grid = TileGrid(q_len, past + q_len, tile, size)
    judge(inputs(grid, per_group=per_group, head_dim=head_dim), select(grid))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [1, 2, 5, 8, 10, 12])
def test_half_precision(inputs, select, judge, case, dtype):
    q_len, past, tile, size, per_group, head_dim = CASES[case]
    grid = TileGrid(q_len, past + q_len, tile, size)
    judge(inputs(grid, per_group=per_group, head_dim=head_dim, dtype=dtype), select(grid))


@pytest.mark.parametrize("case", [1, 3, 6, 8, 12])
def test_bidirectional(inputs, select, judge, case):
    q_len, past, tile, size, per_group, head_dim = CASES[case]
    grid = TileGrid(q_len, past + q_len, tile, size, causal=False)
    judge(inputs(grid, per_group=per_group, head_dim=head_dim), select(grid))


@pytest.mark.parametrize(("softcap", "sinks"), [(2.0, False), (None, True), (30.0, True)])
@pytest.mark.parametrize(("q_len", "past", "tile"), [(111, 37, 64), (5, 100, 1)])
def test_softcap_and_sinks(inputs, select, judge, device, q_len, past, tile, softcap, sinks):
    grid = TileGrid(q_len, past + q_len, tile, 32)
    judge(
        inputs(grid),
        select(grid),
        softcap=softcap,
        sinks=torch.linspace(-2, 4, 6, device=device) if sinks else None,
        scale=0.5,
    )


@pytest.mark.parametrize("documents", [PADDED, RIGHT, PACKED], ids=["left", "right", "packed"])
@pytest.mark.parametrize(
    ("q_len", "tile", "size", "causal"),
    [(111, 64, 16, True), (60, 32, 64, True), (111, 64, 16, False), (30, 1, 16, True)],
)
def test_documents(inputs, select, judge, documents, q_len, tile, size, causal):
    grid = TileGrid(q_len, 111, tile, size, causal)
    selection = select(grid, documents=documents)
    q, k, v = inputs(grid)
    selection.check(q, k, values=True)
    judge((q, k, v), selection)


def test_documents_with_sinks_and_nan_in_the_padding(inputs, select, run, device):
    grid = TileGrid(111, 111, 64, 16)
    selection = select(grid, documents=PADDED)
    sinks = torch.linspace(-2, 4, 6, device=device)
    tensors = inputs(grid)
    want = run(tensors, selection, "reference", torch.float64, sinks=sinks)
    for x in tensors:
        x[1, :, :40] = torch.nan
    got = run(tensors, selection, "triton", sinks=sinks)
    for name, value in want.items():
        torch.testing.assert_close(
            got[name].double(), value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("size", [16, 128])
def test_decode_splits(inputs, select, device, size, splits):
    grid = TileGrid(3, 250, 1, size)
    q, k, v = inputs(grid, head_dim=80)
    selection, sinks = select(grid, share=0.7), torch.linspace(-2, 4, 6, device=device)
    out, lse = block_sparse_attention_triton(q, k, v, selection, ScoreOptions(0.2, 20.0, sinks), True, splits)
    want = block_sparse_attention(
        q.double(),
        k.double(),
        v.double(),
        selection,
        scale=0.2,
        softcap=20.0,
        sinks=sinks,
        impl="reference",
        return_lse=True,
    )
    torch.testing.assert_close(out.double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-5, atol=1e-5)


def test_decode_splits_of_an_empty_list_and_of_documents(inputs, select):
    grid = TileGrid(2, 111, 1, 16)
    q, k, v = inputs(grid)
    empty = BlockSelection(torch.full((2, 2, 2, 5), -1, dtype=torch.int32, device=q.device), grid)
    out, lse = block_sparse_attention_triton(q, k, v, empty, ScoreOptions(0.2), True, 3)
    assert not out.any() and bool((lse == -torch.inf).all())
    selection = select(grid, documents=[(0, 30, 111), (1, 0, 110)])
    want = block_sparse_attention(q, k, v, selection, scale=0.2, impl="reference", return_lse=True)
    for a, b in zip(block_sparse_attention_triton(q, k, v, selection, ScoreOptions(0.2), True, 3), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [64, 1])
def test_a_row_that_sees_nothing_is_zero_with_finite_gradients(inputs, judge, tile):
    grid = TileGrid(128, 128, tile, 16) if tile == 64 else TileGrid(24, 40, 1, 16)
    tensors = inputs(grid)
    indices = torch.full((2, 2, grid.tiles, 2), -1, dtype=torch.int32, device=tensors[0].device)
    indices[:, :, : -(-grid.tiles // 2), 1] = 3 if tile == 64 else 0
    judge(tensors, BlockSelection(indices, grid))


# the interpreter's numpy warns of the NaNs that a test puts in
WITH_NAN = pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value encountered")


@WITH_NAN
@pytest.mark.parametrize(("tile", "size"), [(64, 16), (64, 128), (1, 16), (16, 64)])
def test_later_keys_and_values_never_contribute(inputs, select, tile, size):
    grid = TileGrid(90, 130, tile, size)
    q, k, v = inputs(grid, batch=1)
    selection = select(grid, batch=1)
    clean, clean_lse = block_sparse_attention(q, k, v, selection, impl="triton", return_lse=True)
    for query, poison in ((20, torch.inf), (67, torch.nan)):
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[:, :, grid.q_offset + query + 1 :] = poison
        bad_v[:, :, grid.q_offset + query + 1 :] = poison
        out, lse = block_sparse_attention(q, bad_k, bad_v, selection, impl="triton", return_lse=True)
        torch.testing.assert_close(out[:, :, : query + 1], clean[:, :, : query + 1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse[:, :, : query + 1], clean_lse[:, :, : query + 1], rtol=1e-5, atol=1e-6)


@WITH_NAN
def test_a_value_that_is_not_finite_shows_in_the_rows_that_see_it(inputs, select):
    grid = TileGrid(100, 100, 64, 16)
    q, k, v = inputs(grid)
    v[0, 1, 70, 3] = torch.nan
    out, _ = block_sparse_attention(q, k, v, select(grid, share=1.0), impl="triton")
    seen = torch.zeros(2, 6, 100, dtype=torch.bool, device=q.device)
    seen[0, 3:, 70:] = True
    assert torch.equal(out[..., 3].isnan(), seen) and torch.equal(out.isnan().any(-1), seen)


def test_keys_of_blocks_that_nobody_kept_never_contribute(inputs, select, run):
    grid = TileGrid(150, 150, 64, 16)
    tensors = inputs(grid, batch=1)
    indices = select(grid, batch=1).indices
    indices[(indices == 3) | (indices == 8)] = -1
    selection = BlockSelection(indices.sort(-1).values, grid)
    want = run(tensors, selection, "triton")
    for block in (3, 8):
        for x in tensors[1:]:
            x[:, :, block * 16 : block * 16 + 16] = torch.nan
    got = run(tensors, selection, "triton")
    for name in ("out", "lse", "dq"):
        assert torch.equal(got[name], want[name])


def test_strided_inputs_and_copies_give_the_same_bits(inputs, select, run):
    grid = TileGrid(100, 111, 64, 16)
    selection = select(grid)
    tensors = inputs(grid)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    room = torch.full((2, 2, 300, 16), torch.nan, device=tensors[0].device)
    room[:, :, :111] = views[1]
    views[1] = room[:, :, :111]
    assert not any(x.is_contiguous() for x in views)
    want, _ = block_sparse_attention(*tensors, selection, impl="triton")
    out, _ = block_sparse_attention(*views, selection, impl="triton")
    columns, _ = block_sparse_attention(tensors[0].mT.contiguous().mT, *views[1:], selection, impl="triton")
    assert torch.equal(out, want) and torch.equal(columns, want)


def test_two_runs_give_the_same_bits(inputs, select, run):
    grid = TileGrid(111, 111, 32, 16)
    tensors, selection = inputs(grid, dtype=torch.float16), select(grid)
    first, second = (run(tensors, selection, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("documents", [None, PACKED])
@pytest.mark.parametrize("chunk", [1, 3])
def test_popular_blocks_are_split_and_summed(inputs, select, chunk, documents):
    grid = TileGrid(111, 111, 16, 32)
    q, k, v = inputs(grid)
    selection = select(grid, share=0.9, documents=documents)
    out, lse = block_sparse_attention(q, k, v, selection, impl="triton", return_lse=True)
    grad, no_grad = torch.randn_like(out), torch.zeros_like(lse)
    arguments = (grad, no_grad, q, k, v, out, lse, selection.indices, selection.documents, 16, 32, True, 0.25, 0.0)
    whole, split = (operators.backward(*arguments, tiles) for tiles in (1000, chunk))
    for a, b in zip(split, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    inverse = invert(selection.indices, grid.blocks, 32, 2, selection.documents, chunk)
    assert int((inverse.popular < len(inverse.slots)).sum()) > 2


def test_the_inverse_index_lists_every_link_once(select):
    grid = TileGrid(250, 250, 16, 16)
    indices = select(grid).indices
    inverse = invert(indices, grid.blocks, 16, 2, None, 4)
    links = set()
    for bin, number in inverse.work.tolist():
        if bin < len(inverse.slots):
            start, stop = (
                inverse.starts[bin] + 4 * number,
                min(inverse.starts[bin] + 4 * number + 4, inverse.starts[bin + 1]),
            )
            here = [(bin // grid.blocks, tile, bin % grid.blocks) for tile in inverse.tiles[start:stop].tolist()]
            assert here == sorted(here) and not links & set(here)
            links |= set(here)
    rows = indices.flatten(0, 1).tolist()
    assert links == {
        (r, tile, block) for r, row in enumerate(rows) for tile, kept in enumerate(row) for block in kept if block >= 0
    }


def test_the_gradient_of_the_log_sum_exp(inputs, select):
    grid = TileGrid(63, 100, 64, 16)
    selection, grads = select(grid, share=1.0), []
    for impl in ("reference", "triton"):
        leaves = [x.requires_grad_() for x in inputs(grid)]
        out, lse = block_sparse_attention(*leaves, selection, impl=impl, return_lse=True)
        grads.append(torch.autograd.grad(out.square().sum() + lse.sin().sum(), leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("documents", [None, PACKED])
def test_the_operators_pass_opcheck(inputs, select, device, documents):
    grid = TileGrid(111, 111, 64, 64)
    q, k, v = (x.requires_grad_() for x in inputs(grid))
    selection, sinks = select(grid, documents=documents), torch.zeros(6, device=device, requires_grad=True)
    options = (64, 64, True, 0.25, 5.0)
    torch.library.opcheck(operators.forward, (q, k, v, selection.indices, selection.documents, sinks, *options, 0))
    with torch.no_grad():
        out, lse = operators.forward(q, k, v, selection.indices, selection.documents, sinks, *options, 0)
        arguments = (
            torch.randn_like(out),
            torch.randn_like(lse),
            q,
            k,
            v,
            out,
            lse,
            selection.indices,
            selection.documents,
            *options,
            0,
        )
    torch.library.opcheck(operators.backward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compilation_without_graph_breaks(inputs, select):
    grid = TileGrid(63, 100, 64, 16)
    tensors, selection = inputs(grid), select(grid)

    def loss(q, k, v):
        return block_sparse_attention(q, k, v, selection, impl="triton")[0].square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in tensors]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
