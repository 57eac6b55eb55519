"""Dtypes, head dims, block sizes and heads of a KV group in combination:
all on a GPU, a part in the interpreter, which is slow.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hf_sparse_attn_kernels import TileGrid

ON_GPU = torch.cuda.is_available()
DTYPES, HEAD_DIMS, BLOCK_SIZES, PER_GROUP = (
    (torch.bfloat16, torch.float16, torch.float32),
    (64, 80, 128, 256),
    (16, 64),
    (1, 4, 8),
)
# every kernel is compiled for each of them, which takes most of the time: the heads of a KV group take turns
CASES = [(*case, PER_GROUP[i % 3]) for i, case in enumerate(itertools.product(DTYPES, HEAD_DIMS, BLOCK_SIZES))]
DOCUMENTS = [(0, 0, 17), (0, 17, 80), (0, 80, 150), (1, 3, 100)]


def _label(case):
    dtype, head_dim, size, per_group = case
    return f"{str(dtype).removeprefix('torch.')}-D{head_dim}-S{size}-{per_group}"


@pytest.mark.parametrize("case", CASES if ON_GPU else CASES[4:5], ids=_label)
@pytest.mark.parametrize("kind", ["prefill", "documents", "decode"])
def test_forward_and_gradients(inputs, select, judge, kind, case):
    dtype, head_dim, size, per_group = case
    grid = TileGrid(3, 150, 1, size) if kind == "decode" else TileGrid(150, 150, 64, size)
    documents = DOCUMENTS if kind == "documents" else None
    judge(inputs(grid, per_group=per_group, head_dim=head_dim, dtype=dtype), select(grid, documents=documents))
