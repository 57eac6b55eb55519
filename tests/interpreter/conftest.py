"""Runs the Triton kernels on CPU tensors (or on a GPU, if there is one). Run apart from the other tests:
make test-interpreter.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it deterministic products are refused
else:
    if "triton" in sys.modules:
        pytest.exit(
            "triton was imported before TRITON_INTERPRET could be set: run pytest --confcutdir tests/interpreter "
            "tests/interpreter",
            2,
        )
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="needs triton: pip install -c constraints.txt -e '.[dev,triton]'")

from hf_sparse_attn_kernels import BlockSelection, TileGrid, block_sparse_attention

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.filterwarnings("ignore:.*deterministic.*"))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that nothing was written to reads as NaN."""
    # some products of torch have no such kernel there
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def inputs(device):
    """(q, k, v) of a grid."""

    def make(grid, batch=2, groups=2, per_group=3, head_dim=16, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(batch, groups * per_group, grid.q_len, head_dim, generator=generator)
        k, v = (torch.randn(batch, groups, grid.kv_len, head_dim, generator=generator) for _ in range(2))
        return tuple(x.to(device, dtype) for x in (q, k, v))

    return make


@pytest.fixture(scope="session")
def select(device):
    """A random selection; with ``documents``, (batch row, first slot, end slot), one for each of them."""

    def keep(grid, groups, share, generator):
        block = torch.arange(grid.blocks)
        last = (grid.last_positions() // grid.block_size)[:, None] if grid.causal else grid.blocks - 1
        kept = (torch.rand(groups, grid.tiles, grid.blocks, generator=generator) < share) & (block <= last)
        return torch.where(kept, block, -1).sort(-1).values.int()

    def make(grid, batch=2, groups=2, share=0.5, documents=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        if documents is None:
            return BlockSelection(
                torch.stack([keep(grid, groups, share, generator) for _ in range(batch)]).to(device), grid
            )
        grids = {}
        for r, (_, first, end) in enumerate(documents):
            if (queries := end - max(first, grid.q_offset)) > 0:
                grids[r] = TileGrid(queries, end - first, grid.query_tile, grid.block_size, grid.causal)
        indices = torch.full(
            (len(documents), groups, max(g.tiles for g in grids.values()), grid.blocks), -1, dtype=torch.int32
        )
        for r, part in grids.items():
            indices[r, :, : part.tiles, grid.blocks - part.blocks :] = keep(part, groups, share, generator)
        return BlockSelection(indices.to(device), grid, None, torch.tensor(documents, device=device))

    return make


@pytest.fixture(scope="session")
def run():
    """{out, lse, dq, dk, dv[, dsinks]} of one implementation; ``dtype`` promotes the inputs first."""

    def attend(tensors, selection, impl, dtype=None, sinks=None, **options):
        leaves = [(t if dtype is None else t.to(dtype)).detach().clone().requires_grad_() for t in tensors]
        sink = None if sinks is None else sinks.to(dtype or sinks.dtype).clone().requires_grad_()
        out, lse = block_sparse_attention(*leaves, selection, impl=impl, return_lse=True, sinks=sink, **options)
        grad = (
            torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
            .to(out.device, tensors[0].dtype)
            .to(out.dtype)
        )
        out.backward(grad)
        result = {
            "out": out.detach(),
            "lse": lse.detach(),
            **dict(zip(("dq", "dk", "dv"), (x.grad for x in leaves), strict=True)),
        }
        return result if sink is None else {**result, "dsinks": sink.grad}

    return attend


@pytest.fixture(scope="session")
def judge(run):
    """Root-mean-square error against float64: at most that of eager attention in the same dtype, plus a tenth."""

    def check(tensors, selection, **options):
        exact = run(tensors, selection, "reference", torch.float64, **options)
        eager = run(tensors, selection, "reference", **options)
        ours = run(tensors, selection, "triton", **options)
        blind = exact["lse"] == -torch.inf
        assert torch.equal(ours["lse"] == -torch.inf, blind)
        assert not ours["out"][blind].any() and not ours["dq"][blind].any()
        for name, want in exact.items():
            error, allowed = (
                (x[name].double() - want)[want > -torch.inf].square().mean().sqrt().item() for x in (ours, eager)
            )
            assert error <= 1.1 * allowed + 1e-6, f"{name}: error {error:.3e}, eager {allowed:.3e}"

    return check
