"""The C++ kernels beyond what every implementation is tested for: agreement, determinism, compiling, refusals."""

from __future__ import annotations

import logging
import subprocess
import sys

import hf_sparse_attn_kernels as kernels
import pytest
import torch
from helpers.agreement import assert_same_up_to_ties
from hf_sparse_attn_kernels import BlockSelection, TileGrid, block_sparse_attention, implementations
from hf_sparse_attn_kernels.cpp_kernels import compiling, support

from hf_sparse_attn.router.budget import make_plan
from hf_sparse_attn.router.selection import FeatureMaker, select_blocks

ops = torch.ops.hf_sparse_attn_cpp


@pytest.fixture(scope="module", autouse=True)
def compiled():
    assert compiling.unavailable() is None


@pytest.fixture
def layer(random_selection):
    """(q, k, v, selection) of a call whose keys are a view with other strides, as a model makes them."""
    grid = TileGrid(300, 363, 64, 16)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 32, generator=generator).transpose(1, 2) for n, h in ((300, 6), (363, 2), (363, 2)))
    return q, k, v, random_selection(0, 2, 2, grid, 0.5)


@pytest.fixture
def threads():
    """Sets the number of threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("heads", [2, 6, 16])
@pytest.mark.parametrize(
    ("q_len", "past", "tile", "size"),
    [(900, 0, 64, 16), (700, 200, 64, 128), (130, 770, 16, 32), (5, 895, 1, 16), (1, 899, 1, 64)],
)
def test_a_router_keeps_the_same_blocks_as_the_torch_implementation(
    make_router, routing_inputs, q_len, past, tile, size, heads
):
    sizes = {"block_size": size, "query_tile": max(tile, 16), "local": size, "min_keys": 512 if size == 128 else 256}
    router = make_router(heads=heads, noise=0.1, density=0.3, candidate_factor=1.2, **sizes)
    inputs = routing_inputs(past + q_len, q_len, batch=2, heads=heads)
    got, want = (select_blocks(router, inputs, tile, impl=impl) for impl in ("cpp", "torch"))
    assert_same_up_to_ties(got, want, make_plan(router.config, got.grid))


def run_layer(q, k, v, selection):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = block_sparse_attention(*leaves, selection, impl="cpp", return_lse=True)
    (out.square().sum() + lse.sum()).backward()
    return [out.detach(), lse.detach(), *(leaf.grad for leaf in leaves)]


def test_results_and_gradients_are_the_same_bits_for_any_number_of_threads(layer, threads):
    want = run_layer(*layer)
    for count in (2, 3):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(run_layer(*layer), want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strides_of_the_inputs_do_not_change_a_bit(layer, dtype):
    q, k, v, selection = layer
    want = run_layer(*(x.to(dtype).contiguous() for x in (q, k, v)), selection)
    got = [x.to(dtype).clone(memory_format=torch.preserve_format).requires_grad_() for x in (q, k, v)]
    assert not got[1].is_contiguous()
    out, lse = block_sparse_attention(*got, selection, impl="cpp", return_lse=True)
    (out.square().sum() + lse.sum()).backward()
    for a, b in zip([out, lse, *(leaf.grad for leaf in got)], want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("count", [1, 2])
def test_a_block_that_does_not_exist_is_an_error_and_not_a_crash(layer, threads, count):
    threads(count)
    q, k, v, selection = layer
    indices = selection.indices.clone()
    indices[0, 0, 2, -1] = 23
    with pytest.raises(ValueError, match=r"block 23, but there are only 23 blocks of 16 keys"):
        block_sparse_attention(q, k, v, BlockSelection(indices, selection.grid), impl="cpp")


def test_an_unselected_block_gets_gradients_of_zero(layer):
    q, k, v, selection = layer
    indices = torch.where(selection.indices == 5, -1, selection.indices).sort(-1).values
    _, _, _, dk, dv = run_layer(q, k, v, BlockSelection(indices, selection.grid))
    assert not dk[:, :, 80:96].any() and not dv[:, :, 80:96].any()
    assert bool((dk[:, :, :80].abs().amax((0, 1, 3)) > 0).all())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_attention_compiles_without_a_graph_break(layer, backend):
    q, k, v, selection = layer

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, selection)[0]

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = torch.compile(attend, fullgraph=True, backend=backend)(*leaves)
    assert torch.equal(out, attend(q, k, v))
    out.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


def test_the_operators_pass_opcheck(layer, make_router, routing_inputs):
    q, k, v, selection = layer
    names = ("test_schema", "test_autograd_registration", "test_faketensor")
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    options = (torch.zeros(6, requires_grad=True), 64, 16, True, 0.2, 0.0)
    empty, documents = torch.full_like(selection.indices, -1), torch.tensor([[0, 0, 300], [1, 7, 363]])
    for lists in ((selection.indices, None), (empty, documents)):
        torch.library.opcheck(ops.forward.default, (*tensors, *lists, *options), test_utils=names)
    router, inputs = make_router(mass_threshold=0.01), routing_inputs(230)
    plan, tiles = make_plan(router.config, inputs.grid(16, 16)), torch.arange(15)
    with torch.no_grad():
        f = FeatureMaker(router, inputs, plan.grid).features(tiles)
    features = (f.coarse_queries, f.real, f.router_keys, f.queries, f.reps, f.keys, tiles, [0])
    torch.library.opcheck(
        ops.select.default,
        (*features, 230, 16, 16, plan.sink, plan.columns, plan.width, plan.threshold),
        test_utils=names,
    )
    with pytest.raises(ValueError, match=f"may keep more than the {plan.width - 1} blocks of its list"):
        ops.select(*features, 230, 16, 16, plan.sink, plan.columns, plan.width - 1, plan.threshold)
    torch.library.opcheck(ops.coarse_scores.default, (f.coarse_queries, f.real, f.router_keys), test_utils=names)
    torch.library.opcheck(
        ops.block_mass.default, (f.queries, f.reps, f.keys, tiles, None, 230, 16, 16), test_utils=names
    )
    torch.library.opcheck(ops.pooled_features.default, (k, 16), test_utils=names)


# -- what is refused, and what happens where nothing can be compiled ---------------------------------------------------


def test_inputs_that_are_not_supported_are_named(layer):
    q, k, v, selection = layer
    for tensors, message in (
        (
            (q.double(), k.double(), v.double()),
            r'impl="cpp": dtype=torch.float64 is not supported; supported: torch.float32',
        ),
        ((q[..., :31], k[..., :31], v[..., :31]), r'impl="cpp": a width of 31 .*impl="torch"'),
    ):
        with pytest.raises(ValueError, match=message):
            block_sparse_attention(*tensors, selection, impl="cpp")
        assert block_sparse_attention(*tensors, selection)[0].dtype == tensors[0].dtype  # the default takes another
    assert "block_size=8" in support.unsupported(q, block_size=8)
    assert 'device "meta"' in support.unsupported(q.to("meta"), block_size=16)
    with pytest.raises(ValueError, match="scores have no gradient"):
        kernels.pooled_features(k.detach().requires_grad_(), 16, impl="cpp")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A machine on which nothing was compiled yet."""
    monkeypatch.setenv("HF_SPARSE_ATTN_CACHE", str(tmp_path))
    monkeypatch.delenv(compiling.LEVEL_VARIABLE, raising=False)
    caches = (compiling._load, implementations._decide)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path / "kernels"
    for cache in caches:
        cache.cache_clear()


def test_without_a_compiler_torch_is_used_and_the_named_implementation_refused(fresh, layer, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    q, k, v, selection = layer
    with pytest.raises(
        ValueError,
        match=r'impl="cpp": no C\+\+ compiler was found; install g\+\+ .*CXX .*no-such-compiler.*, or use impl="torch"',
    ):
        block_sparse_attention(q, k, v, selection, impl="cpp")
    with caplog.at_level(logging.WARNING):
        out, _ = block_sparse_attention(q, k, v, selection)
        block_sparse_attention(q, k, v, selection)
    assert torch.equal(out, block_sparse_attention(q, k, v, selection, impl="torch")[0])
    assert caplog.text.count("implementation 'torch' (without compiled kernels: no C++ compiler was found") == 1


@pytest.mark.parametrize(
    ("level", "message"), [("none", "HF_SPARSE_ATTN_CPU=none forbids it"), ("avx10", "'avx10' is not supported")]
)
def test_the_level_of_the_processor_can_be_chosen(fresh, monkeypatch, level, message):
    monkeypatch.setenv(compiling.LEVEL_VARIABLE, level)
    assert message in compiling.unavailable() and not fresh.exists()
    assert implementations.default_choice("cpu")[0] == "torch"


def test_another_processor_is_refused_by_name(fresh, monkeypatch):
    monkeypatch.setattr(compiling, "processor_levels", lambda: ())
    assert "supported: Linux on x86-64 with AVX2" in compiling.unavailable()


def test_a_build_without_the_sources_is_refused_by_name(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "SOURCE", tmp_path)
    assert "its C++ sources are not in" in compiling.unavailable()


def test_a_process_that_only_imports_the_kernels_compiles_nothing(tmp_path):
    code = "import hf_sparse_attn, hf_sparse_attn_kernels, sys; print('torch.utils.cpp_extension' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/nowhere", "HOME": str(tmp_path), "HF_SPARSE_ATTN_CACHE": str(tmp_path)},
    )
    assert done.stdout.strip() == "False" and list(tmp_path.iterdir()) == []
