"""`block_sparse_attention`: every implementation against the reference, and the reference against dense attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hf_sparse_attn_kernels import BlockSelection, TileGrid, block_sparse_attention
from hf_sparse_attn_kernels.torch_kernels import chunks
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FAST = ("torch", "cpp")  # implementations that run on a CPU beside the reference
LENGTHS = (1, 63, 111, 1000)
# (query_tile, block_size): every block size, tiles of 64 and 1, a tile smaller than a block
TILINGS = ((64, 16), (64, 32), (64, 64), (64, 128), (1, 16), (1, 128), (16, 64), (128, 16))


def qkv(seed, grid, batch=1, groups=2, per_group=3, head_dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, groups * per_group, grid.q_len, head_dim, generator=generator).to(dtype)
    k, v = (torch.randn(batch, groups, grid.kv_len, head_dim, generator=generator).to(dtype) for _ in range(2))
    return q, k, v


def forward_backward(tensors, selection, impl, dtype=None):
    """[out, dq, dk, dv] and lse of one implementation; ``dtype`` promotes the inputs first."""
    leaves = [(t if dtype is None else t.to(dtype)).detach().clone().requires_grad_() for t in tensors]
    out, lse = block_sparse_attention(*leaves, selection, impl=impl, return_lse=True)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(tensors[0].dtype).to(out.dtype)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)], lse.detach()


def every_block(grid, batch, groups):
    """The selection that keeps all visible blocks."""
    block = torch.arange(grid.blocks)
    visible = block <= (grid.last_positions() // grid.block_size)[:, None]
    indices = torch.where(visible, block, -1).sort(-1).values.int()
    return BlockSelection(indices.expand(batch, groups, -1, -1).contiguous(), grid)


def assert_matches_reference(tensors, selection, impl):
    want, want_lse = forward_backward(tensors, selection, "reference", torch.float64)
    got, got_lse = forward_backward(tensors, selection, impl)
    torch.testing.assert_close(got_lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("impl", FAST)
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**16),
    length=st.sampled_from((1, 15, 63, 64, 111, 200)),
    past=st.sampled_from((0, 0, 1, 16, 37, 64, 130)),
    tiling=st.sampled_from(TILINGS),
    per_group=st.sampled_from((1, 3, 8)),
    head_dim=st.sampled_from((64, 80, 128)),
    share=st.sampled_from((0.1, 0.5, 0.9)),
)
@example(seed=0, length=1000, past=0, tiling=(64, 16), per_group=3, head_dim=64, share=0.3)
@example(seed=0, length=1000, past=23, tiling=(64, 128), per_group=1, head_dim=80, share=0.3)
@example(seed=0, length=1, past=1000, tiling=(1, 16), per_group=8, head_dim=128, share=0.3)
def test_every_implementation_matches_the_reference_on_random_selections(
    random_selection, impl, seed, length, past, tiling, per_group, head_dim, share
):
    grid = TileGrid(length, past + length, *tiling)
    tensors = qkv(seed, grid, per_group=per_group, head_dim=head_dim)
    assert_matches_reference(tensors, random_selection(seed, 1, 2, grid, share), impl)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_every_block_kept_equals_dense_attention(length, tiling, impl):
    if length == 1000 and tiling[0] == 1:
        length = 300
    grid = TileGrid(length, length, *tiling)
    q, k, v = qkv(1, grid, batch=2, head_dim=64)
    out, _ = block_sparse_attention(q, k, v, every_block(grid, 2, 2), impl=impl)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 77), (5, 100), (70, 111), (64, 128), (100, 163)])
@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_continuing_a_cache_equals_the_last_rows_of_the_whole(q_len, kv_len, impl):
    whole = TileGrid(kv_len, kv_len, 64, 16)
    q, k, v = qkv(2, whole, head_dim=64)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[:, :, -q_len:]
    grid = TileGrid(q_len, kv_len, 64, 16)
    out, _ = block_sparse_attention(q[:, :, -q_len:], k, v, every_block(grid, 1, 2), impl=impl)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tiling", "length", "past"), [((64, 16), 600, 0), ((64, 64), 111, 37), ((1, 16), 63, 100), ((64, 128), 300, 0)]
)
@pytest.mark.parametrize("per_group", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("impl", FAST)
def test_bfloat16_error_is_at_most_that_of_eager_bfloat16(
    random_selection, impl, tiling, length, past, per_group, head_dim
):
    assert_as_exact_as_eager(
        random_selection, TileGrid(length, past + length, *tiling), per_group, head_dim, torch.bfloat16, impl
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 63, 111, 1000, 4096])
@pytest.mark.parametrize("impl", FAST)
def test_the_error_in_every_dtype_is_at_most_that_of_eager_attention(random_selection, impl, length, dtype):
    assert_as_exact_as_eager(random_selection, TileGrid(length, length, 64, 16), 1, 64, dtype, impl)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_head_dim_is_as_exact_as_eager_attention(random_selection, head_dim, dtype):
    assert_as_exact_as_eager(random_selection, TileGrid(150, 200, 64, 32), 4, head_dim, dtype, "cpp")


def assert_as_exact_as_eager(random_selection, grid, per_group, head_dim, dtype, impl):
    """Root-mean-square error of the output and every gradient against float64, with a margin of a tenth."""
    tensors = qkv(3, grid, groups=1, per_group=per_group, head_dim=head_dim, dtype=dtype)
    selection = random_selection(3, 1, 1, grid, 0.4)
    oracle, _ = forward_backward(tensors, selection, "reference", torch.float64)
    eager, _ = forward_backward(tensors, selection, "reference")
    ours, _ = forward_backward(tensors, selection, impl)
    for name, a, b, exact in zip(("out", "dq", "dk", "dv"), ours, eager, oracle, strict=True):
        error, allowed = ((x.double() - exact).pow(2).mean().sqrt().item() for x in (a, b))
        assert error <= 1.1 * allowed + 1e-6, f"{name}: error {error:.3e}, eager {dtype} {allowed:.3e}"


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("tiling", [(64, 16), (64, 128), (1, 16), (16, 64)])
def test_later_and_unselected_keys_and_values_never_contribute(random_selection, impl, tiling):
    grid = TileGrid(150, 200, *tiling)
    q, k, v = qkv(4, grid)
    selection = random_selection(4, 1, 2, grid, 0.4)
    clean, clean_lse = block_sparse_attention(q, k, v, selection, impl=impl, return_lse=True)
    for query in (0, 20, 77, 148):  # all keys after this query, in its own tile and in later ones
        poisoned_k, poisoned_v = k.clone(), v.clone()
        poisoned_k[:, :, grid.q_offset + query + 1 :] = torch.nan
        poisoned_v[:, :, grid.q_offset + query + 1 :] = torch.nan
        out, lse = block_sparse_attention(q, poisoned_k, poisoned_v, selection, impl=impl, return_lse=True)
        torch.testing.assert_close(out[:, :, : query + 1], clean[:, :, : query + 1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse[:, :, : query + 1], clean_lse[:, :, : query + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_keys_of_blocks_that_nobody_kept_never_contribute(random_selection, impl):
    grid = TileGrid(200, 200, 64, 16)
    q, k, v = qkv(5, grid)
    selection = random_selection(5, 1, 2, grid, 0.4)
    indices = selection.indices.clone()
    indices[(indices == 3) | (indices == 8)] = -1
    selection = BlockSelection(indices.sort(-1).values, grid)
    want, _ = forward_backward((q, k, v), selection, impl)
    for block in (3, 8):
        k[:, :, block * 16 : block * 16 + 16] = torch.nan
        v[:, :, block * 16 : block * 16 + 16] = torch.inf
    out, _ = block_sparse_attention(q, k, v, selection, impl=impl)
    torch.testing.assert_close(out, want[0])


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("query_tile", [64, 1])
def test_a_row_that_sees_nothing_is_zero_with_finite_gradients(impl, query_tile):
    grid = TileGrid(128, 128, query_tile, 16)
    q, k, v = qkv(6, grid)
    indices = torch.full((1, 2, grid.tiles, 2), -1, dtype=torch.int32)
    if query_tile == 64:
        indices[:, :, 0, 1] = 3  # tile 0 keeps its last block only: tokens 0 to 47 see nothing; tile 1 keeps nothing
        blind = torch.cat([torch.arange(48), torch.arange(64, 128)])
    else:
        indices[:, :, 100:, 1] = 2
        blind = torch.arange(100)
    (out, *grads), lse = forward_backward((q, k, v), BlockSelection(indices, grid), impl)
    assert torch.equal(out[:, :, blind], torch.zeros_like(out[:, :, blind]))
    assert bool((lse[:, :, blind] == -torch.inf).all())
    seeing = torch.ones(128, dtype=torch.bool)
    seeing[blind] = False
    assert bool(torch.isfinite(lse[:, :, seeing]).all()) and bool((out[:, :, seeing] != 0).any())
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
    assert torch.equal(grads[0][:, :, blind], torch.zeros_like(grads[0][:, :, blind]))


def test_an_empty_selection_gives_zeros():
    grid = TileGrid(70, 70, 64, 16)
    q, k, v = qkv(6, grid)
    selection = BlockSelection(torch.full((1, 2, 2, 1), -1, dtype=torch.int32), grid)
    for impl in ("reference", *FAST):
        out, lse = block_sparse_attention(q, k, v, selection, impl=impl, return_lse=True)
        assert torch.equal(out, torch.zeros_like(q)) and bool((lse == -torch.inf).all())


@settings(max_examples=8)
@given(seed=st.integers(0, 999), chunk=st.sampled_from((1, 5000, 1 << 15, 1 << 30)), tiling=st.sampled_from(TILINGS))
def test_the_result_does_not_depend_on_the_chunk_size(random_selection, seed, chunk, tiling):
    grid = TileGrid(70, 93, *tiling)
    tensors = qkv(seed, grid)
    selection = random_selection(seed, 1, 2, grid, 0.5)
    want, want_lse = forward_backward(tensors, selection, "torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_SCORES", chunk)
        got, got_lse = forward_backward(tensors, selection, "torch")
    for a, b in zip([*got, got_lse], [*want, want_lse], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_memory_of_a_chunk_does_not_grow_with_the_length(monkeypatch):
    sizes = []
    gather = chunks.gather_blocks
    monkeypatch.setattr(chunks, "CHUNK_SCORES", 1 << 16)
    monkeypatch.setattr(chunks, "gather_blocks", lambda *args: sizes.append((out := gather(*args)).numel()) or out)
    largest = []
    for length in (256, 768):
        grid = TileGrid(length, length, 64, 16)
        last = grid.last_positions() // 16
        indices = (last[:, None] - torch.arange(3, -1, -1)).int().expand(1, 2, -1, -1)
        sizes.clear()
        forward_backward(qkv(0, grid), BlockSelection(indices.contiguous(), grid), "torch")
        largest.append(max(sizes))
    assert largest[0] == largest[1]
    assert largest[0] // 16 * 3 * 64 <= 1 << 16  # keys × the query rows that score them


def test_scale_and_lse_are_those_that_were_asked_for(random_selection):
    grid = TileGrid(100, 100, 64, 16)
    q, k, v = qkv(8, grid)
    selection = random_selection(8, 1, 2, grid, 1.0)
    for impl in ("reference", *FAST):
        out, lse = block_sparse_attention(q, k, v, selection, scale=0.3, impl=impl, return_lse=True)
        torch.testing.assert_close(
            out,
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True),
            rtol=1e-4,
            atol=1e-5,
        )
        scores = (q @ k.repeat_interleave(3, 1).transpose(-1, -2) * 0.3).masked_fill(
            ~torch.ones(100, 100).tril().bool(), -torch.inf
        )
        torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-4, atol=1e-5)
        assert block_sparse_attention(q, k, v, selection, impl=impl)[1] is None


@pytest.mark.parametrize("impl", FAST)
def test_keys_that_are_a_view_of_a_larger_buffer(random_selection, impl):
    grid = TileGrid(100, 100, 64, 16)
    q, k, v = qkv(9, grid)
    selection = random_selection(9, 1, 2, grid, 0.5)
    want, _ = block_sparse_attention(q, k, v, selection, impl=impl)
    room = torch.full((2, 1, 2, 300, 16), torch.nan)
    room[:, :, :, :100] = torch.stack([k, v])
    out, _ = block_sparse_attention(q, room[0, :, :, :100], room[1, :, :, :100], selection, impl=impl)
    assert torch.equal(out, want)
    strided, _ = block_sparse_attention(q, k.transpose(1, 2).contiguous().transpose(1, 2), v, selection, impl=impl)
    assert torch.equal(strided, want)


GOOD = [[-1, -1, 0], [-1, 1, 4], [0, 3, 6]]
BAD = {
    "descending": ([[-1, -1, 0], [-1, 4, 1], [0, 3, 6]], "ascending"),
    "duplicate": ([[-1, -1, 0], [-1, 4, 4], [0, 3, 6]], "ascending and unique"),
    "empty in the middle": ([[-1, -1, 0], [1, -1, 4], [0, 3, 6]], "-1"),
    "empty last": ([[-1, 0, -1], [-1, 1, 4], [0, 3, 6]], "-1"),
    "block after the tile": ([[-1, -1, 4], [-1, 1, 4], [0, 3, 6]], "after its tile's last query"),
    "block after the end": ([[-1, -1, 0], [-1, 1, 4], [0, 3, 9]], "after its tile's last query"),
    "too few tiles": ([[-1, -1, 0], [-1, 1, 4]], r"\(1, 1, 2\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_selection_that_does_not_fit_is_refused(name, monkeypatch):
    monkeypatch.setenv("HF_SPARSE_ATTN_DEBUG", "1")
    grid = TileGrid(140, 140, 64, 16)
    q, k, v = qkv(0, grid, groups=1)
    block_sparse_attention(q, k, v, BlockSelection(torch.tensor([[GOOD]], dtype=torch.int32), grid))
    indices, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(q, k, v, BlockSelection(torch.tensor([[indices]], dtype=torch.int32), grid))


def test_values_are_read_back_only_when_asked_for():
    grid = TileGrid(140, 140, 64, 16)
    q, k, _ = qkv(0, grid, groups=1)
    selection = BlockSelection(torch.tensor([[BAD["descending"][0]]], dtype=torch.int32), grid)
    selection.check(q, k)
    with pytest.raises(ValueError, match="ascending"):
        selection.check(q, k, values=True)


def test_a_selection_for_other_lengths_or_heads_is_refused():
    grid = TileGrid(140, 140, 64, 16)
    selection = BlockSelection(torch.tensor([[GOOD]], dtype=torch.int32), grid)
    q, k, v = qkv(0, TileGrid(139, 139, 64, 16), groups=1)
    with pytest.raises(ValueError, match=r"kv_len=140.*\(1, 1, 139, 16\)"):
        block_sparse_attention(q, k, v, selection)
    q, k, v = qkv(0, grid, groups=2)
    with pytest.raises(ValueError, match=r"indices must be \(1, 2, 3\)"):
        block_sparse_attention(q, k, v, selection)
    two = BlockSelection(selection.indices.expand(1, 2, -1, -1), grid)
    with pytest.raises(ValueError, match="5 query heads cannot share 2 KV heads"):
        block_sparse_attention(q[:, :5], k, v, two)


def test_unknown_implementation_and_mixed_dtypes_are_refused():
    grid = TileGrid(140, 140, 64, 16)
    selection = BlockSelection(torch.tensor([[GOOD]], dtype=torch.int32), grid)
    q, k, v = qkv(0, grid, groups=1)
    with pytest.raises(ValueError, match=r"'cudnn'.*reference, torch"):
        block_sparse_attention(q, k, v, selection, impl="cudnn")
    with pytest.raises(ValueError, match=r"float32.*bfloat16"):
        block_sparse_attention(q, k, v.bfloat16(), selection)


def test_float64_goes_through_the_torch_implementation_unrounded(random_selection):
    grid = TileGrid(90, 120, 64, 16)
    tensors = qkv(11, grid, dtype=torch.float64)
    selection = random_selection(11, 1, 2, grid, 0.5)
    want, _ = forward_backward(tensors, selection, "reference")
    got, _ = forward_backward(tensors, selection, "torch")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kv_len", [1, 16, 77, 256])
@pytest.mark.parametrize("keep_own", [True, False])
@pytest.mark.parametrize("room", [0, 3, 64])
@pytest.mark.parametrize("impl", FAST)
def test_one_query_over_a_cache_with_room_to_grow_matches_the_reference(random_selection, impl, kv_len, keep_own, room):
    """What stands in memory behind the last key never contributes, whether or not it fills whole blocks."""
    grid = TileGrid(1, kv_len, 1, 16)
    q, k, v = qkv(9, grid, batch=2, head_dim=64)
    selection = every_block(grid, 2, 2) if keep_own else random_selection(9, 2, 2, grid, 0.4)
    grown_k, grown_v = (torch.full((2, 2, kv_len + room, 64), torch.nan) for _ in range(2))
    grown_k[:, :, :kv_len], grown_v[:, :, :kv_len] = k, v
    want, want_lse = block_sparse_attention(q, k, v, selection, impl="reference", return_lse=True)
    got, lse = block_sparse_attention(
        q, grown_k[:, :, :kv_len], grown_v[:, :, :kv_len], selection, impl=impl, return_lse=True
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
