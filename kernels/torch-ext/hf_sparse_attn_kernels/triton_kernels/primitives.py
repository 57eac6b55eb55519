"""Small device functions that the kernels share: documents, key positions, loads, scores."""

# Shape legend: n rows, D head dim (DP: up to a power of two), T query tile, S block size, HG query heads of a group.

import triton
import triton.language as tl
from triton import knobs

INTERPRET = tl.constexpr(knobs.runtime.interpret)
# exp(x) = 2^(x · LOG2E): GPUs have an instruction for powers of two
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc=None):
    """``a @ b + acc`` in float32. The interpreter multiplies bfloat16 bit patterns, so there the operands are widened
    first.
    """
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(x, TYPE: tl.constexpr):
    """Float32 ``x`` in another type, rounded to nearest; the interpreter would cut bits off for bfloat16."""
    if INTERPRET and tl.bfloat16 == TYPE:
        # 0x8000, half of the last kept bit, is added where that bit is odd, else 0x7FFF: ties go to even
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(TYPE)


@triton.jit
def document(docs_ptr, r, q_len, kv_len, HAS_DOCS: tl.constexpr):
    """(batch row, first slot, keys, content position of the first query) of document r;
    it has queries if the last is below keys.
    """
    if HAS_DOCS:
        row = tl.load(docs_ptr + r * 3)
        first = tl.load(docs_ptr + r * 3 + 1).to(tl.int32)
        end = tl.load(docs_ptr + r * 3 + 2).to(tl.int32)
    else:
        row = r.to(tl.int64)
        first = 0
        end = kv_len
    return row, first, end - first, tl.maximum(kv_len - q_len - first, 0)


@triton.jit
def tile_queries(
    part,
    index,
    docs_ptr,
    q_len,
    kv_len,
    HG: tl.constexpr,
    T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_DOCS: tl.constexpr,
):
    """Rows of the program (.., group, document) for row part ``part`` of tile ``index``: tokens × heads of the group.

    Returns (batch row, first slot, keys, content position of the tile, [BLOCK_M] each: head, content position, row of
    the call's queries, and whether it is a query of the document). None is if the tile lies behind the document's end.
    """
    row, first, keys, q_start = document(docs_ptr, tl.program_id(2), q_len, kv_len, HAS_DOCS)
    start = (q_start // T + index) * T
    m_row = part * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1) * HG + m_row // T
    q_pos = start + m_row % T
    valid = (m_row < T * HG) & (q_pos >= q_start) & (q_pos < keys)
    return row, first, keys, start, head, q_pos, q_pos + first - (kv_len - q_len), valid


@triton.jit
def load_queries(base, head, stride_head, q_row, stride_row, valid, D: tl.constexpr, DP: tl.constexpr):
    """Rows ``q_row`` of heads ``head`` [n] of one batch row: [n, DP];
    zeros where not ``valid`` and in the columns from D on.
    """
    d = tl.arange(0, DP)
    # int64: a tensor may have more than 2^31 elements
    at = head.to(tl.int64)[:, None] * stride_head + q_row.to(tl.int64)[:, None] * stride_row + d[None, :]
    return tl.load(base + at, mask=valid[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_rows(base, positions, stride, valid, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr = True):
    """Rows of ``base`` at ``positions`` [n]: [n, DP]; zeros where not ``valid`` and in the columns from D on."""
    d = tl.arange(0, DP)
    pointers = base + positions.to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED:
        if D == DP:
            return tl.load(pointers, mask=valid[:, None], other=0.0)
        return tl.load(pointers, mask=valid[:, None] & (d < D)[None, :], other=0.0)
    if D == DP:
        return tl.load(pointers)
    return tl.load(pointers, mask=(d < D)[None, :], other=0.0)


@triton.jit
def store_rows(base, positions, stride, valid, x, D: tl.constexpr, DP: tl.constexpr):
    """Float32 ``x`` [n, DP] to the rows of ``base`` at ``positions`` where ``valid``."""
    d = tl.arange(0, DP)
    pointers = base + positions.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(pointers, cast(x, base.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])


@triton.jit
def empty_entries(list_ptr, width):
    """How many entries of a list are −1; they come first."""
    count = 0
    for start in range(0, width, 256):
        column = start + tl.arange(0, 256)
        count += tl.sum((tl.load(list_ptr + column, mask=column < width, other=0) < 0).to(tl.int32), 0)
    return count


@triton.jit
def listed_keys(list_ptr, column, flat, width, S: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """Content positions of keys ``flat`` ... of the blocks listed from ``column`` on: (int32 [BLOCK_N], boolean:
    it is listed).
    """
    offset = tl.arange(0, BLOCK_N)
    if S >= BLOCK_N:  # one block holds the whole key tile: a scalar load
        at = column + flat // S
        block = tl.load(list_ptr + at, mask=at < width, other=-1) if MASKED else tl.load(list_ptr + at)
        pos = block * S + flat % S + offset
    else:
        at = column + (flat + offset) // S
        block = tl.load(list_ptr + at, mask=at < width, other=-1) if MASKED else tl.load(list_ptr + at)
        pos = block * S + offset % S
    return pos, pos >= 0


@triton.jit
def tanh(x):
    """Hyperbolic tangent; a series where the closed form would cancel."""
    # series: x − x³/3 + 2x⁵/15 − 17x⁷/315 + 62x⁹/2835; closed form: 1 − 2 / (1 + e^(2x))
    xx = x * x
    series = x * (1.0 + xx * (-1.0 / 3 + xx * (2.0 / 15 + xx * (-17.0 / 315 + xx * (62.0 / 2835)))))
    return tl.where(xx < 0.0625, series, 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E))))


@triton.jit
def log2_scores(s, scale, softcap, SOFTCAP: tl.constexpr):
    """Scaled, capped scores in units of log 2."""
    if SOFTCAP:
        return tanh(s * (scale / softcap)) * (softcap * LOG2E)
    return s * (scale * LOG2E)


@triton.jit
def finite(x):
    """True where x is neither NaN nor infinite."""
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def load_lse(lse_ptr, at, valid):
    """Log-sum-exp in units of log 2; +inf, which makes every weight 0, for a row that saw nothing."""
    lse = tl.load(lse_ptr + at, mask=valid, other=float("inf"))
    return tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)


@triton.jit
def score_gradient(p, s, dp, delta, softcap, SOFTCAP: tl.constexpr):
    """Gradient of the scores before the cap; ``s`` is capped, in units of log 2;
    ``delta`` broadcasts against the rest.
    """
    # dS = P ∘ (dP − δ) ∘ (1 − (s / softcap)²)
    ds = p * (dp - delta)
    if SOFTCAP:
        t = s * (LN2 / softcap)
        ds *= 1.0 - t * t
    return ds
