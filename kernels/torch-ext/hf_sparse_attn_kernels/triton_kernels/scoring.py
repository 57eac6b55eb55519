"""Kernels of the routers and their teacher: pooled features, tile scores, softmax mass by block."""

# Shape legend: B batch, G KV heads, D head dim (DP: up to a power of two), T query tile, S block size.

import triton
import triton.language as tl

from .primitives import LN2, LOG2E, cast, dot, load_rows


# f_b = [max_j k_j ; min_j k_j ; mean_j k_j] over the keys j of block b.
@triton.jit
def features_kernel(
    k_ptr, out_ptr, k_sb, k_sh, k_sn, groups, blocks, D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr
):
    """Program (whole block, group, batch row): max, min and mean of its keys, ``out`` [B, G, blocks, 3·D]
    contiguous.
    """
    block, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    within = tl.arange(0, S)
    base = k_ptr + batch * k_sb + group.to(tl.int64) * k_sh + block.to(tl.int64) * S * k_sn
    k = load_rows(base, within, k_sn, within < S, D, DP).to(tl.float32)
    d = tl.arange(0, DP)
    out_ptr += ((batch * groups + group) * blocks + block) * (3 * D) + d
    TYPE: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr, cast(tl.max(k, 0), TYPE), mask=d < D)
    tl.store(out_ptr + D, cast(tl.min(k, 0), TYPE), mask=d < D)
    tl.store(out_ptr + 2 * D, cast(tl.sum(k, 0) / S, TYPE), mask=d < D)


# s_b = log Σ_r exp(scale · ρ_r · κ_b), computed as LN2 · (top + log2 Σ_r 2^(s_r − top)).
@triton.jit
def coarse_kernel(
    queries_ptr,
    real_ptr,
    router_keys_ptr,
    scores_ptr,
    k_sb,
    k_sh,
    k_sn,
    groups,
    tiles,
    blocks,
    scale,
    D: tl.constexpr,
    DP: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (tile part, block part, batch row · group):
    ``scores`` [B, G, tiles, blocks], log-sum-exp over a tile's real runs.
    """
    row = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * (BLOCK_T * RUNS) + tl.arange(0, BLOCK_T * RUNS)
    valid = m < tiles * RUNS
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    q = load_rows(queries_ptr + row * tiles * RUNS * D, m, D, valid, D, DP)
    k = load_rows(router_keys_ptr + row // groups * k_sb + row % groups * k_sh, n, k_sn, n < blocks, D, DP)
    s = dot(q, tl.trans(k)) * (scale * LOG2E)
    if RUNS > 1:
        real = tl.load(real_ptr + m, mask=valid, other=0)
        s = tl.where((real != 0)[:, None], s, -float("inf"))
        s = tl.reshape(s, [BLOCK_T, RUNS, BLOCK_N])
        top = tl.max(s, 1)
        # without a real run all are −inf, and −inf − (−inf) would be NaN
        top = tl.where(top == -float("inf"), 0.0, top)
        total = tl.sum(tl.exp2(s - top[:, None, :]), 1)
        s = tl.where(total == 0, -float("inf"), top + tl.log2(tl.where(total == 0, 1.0, total)))
    tile = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    at = (row * tiles + tile)[:, None] * blocks + n[None, :]
    tl.store(scores_ptr + at, s * LN2, mask=(tile < tiles)[:, None] & (n < blocks)[None, :])


@triton.jit
def candidate_scores(
    q,
    q_pos,
    real,
    k_base,
    k_sn,
    list_ptr,
    flat,
    width,
    kv_len,
    scale,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Scores (log2) of keys ``flat`` ... of the tile's candidate blocks; −inf where a query may not see the key."""
    offset = flat + tl.arange(0, BLOCK_N)
    column = offset // S
    block = tl.load(list_ptr + column, mask=column < width, other=-1).to(tl.int32) if LISTED else column
    k_pos = block * S + offset % S
    ok = (k_pos >= 0) & (k_pos < kv_len)
    k = load_rows(k_base, k_pos, k_sn, ok, D, DP)
    visible = real[:, None] & ok[None, :] & (k_pos[None, :] <= q_pos[:, None])
    return tl.where(visible, dot(q, tl.trans(k)) * (scale * LOG2E), -float("inf"))


@triton.jit
def tile_rows(tiles_ptr, reps_ptr, rows, count, q_start, kv_len, T: tl.constexpr):
    """(content positions of a tile's sampled queries, boolean: the query is one of the call's)."""
    rep = tl.load(reps_ptr + rows, mask=rows < count, other=0).to(tl.int32)
    q_pos = (tl.load(tiles_ptr + tl.program_id(1)).to(tl.int32) + q_start // T) * T + rep
    return q_pos, (rows < count) & (q_pos >= q_start) & (q_pos < kv_len)


@triton.jit
def row_lse_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    blocks_ptr,
    tiles_ptr,
    reps_ptr,
    k_sb,
    k_sh,
    k_sn,
    groups,
    tiles,
    count,
    q_start,
    kv_len,
    width,
    scale,
    D: tl.constexpr,
    DP: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LISTED: tl.constexpr,
):
    """First pass, program (row part, tile, batch row · group): log-sum-exp (log2) of each query over all candidates.

    ``q`` [B·G, tiles, count, D] holds the sampled queries of the tiles; +inf is stored for a query that sees nothing.
    """
    row = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_pos, real = tile_rows(tiles_ptr, reps_ptr, rows, count, q_start, kv_len, T)
    at = (row * tiles + tl.program_id(1)) * count
    q = load_rows(q_ptr + at * D, rows, D, real, D, DP)
    k_base = k_ptr + row // groups * k_sb + row % groups * k_sh
    list_ptr = blocks_ptr + (row * tiles + tl.program_id(1)) * width
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    # without a list all blocks are candidates: those after the last query are left out
    keys = width * S if LISTED else tl.max(tl.where(real, q_pos, -1), 0) + 1
    for step in range(0, tl.cdiv(keys, BLOCK_N)):
        s = candidate_scores(
            q, q_pos, real, k_base, k_sn, list_ptr, step * BLOCK_N, width, kv_len, scale, D, DP, S, BLOCK_N, LISTED
        )
        top = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(top == -float("inf"), 0.0, top)
        l = l * tl.exp2(m - shift) + tl.sum(tl.exp2(s - shift[:, None]), 1)
        m = top
    lse = tl.where(l == 0, float("inf"), m + tl.log2(tl.where(l == 0, 1.0, l)))
    tl.store(lse_ptr + at + rows, lse, mask=rows < count)


# m_b = 1 / queries · Σ_i Σ_{j ∈ b} 2^(s_ij − lse_i), s and lse in units of log 2.
@triton.jit
def mass_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    mass_ptr,
    blocks_ptr,
    tiles_ptr,
    reps_ptr,
    k_sb,
    k_sh,
    k_sn,
    groups,
    tiles,
    count,
    q_start,
    kv_len,
    width,
    scale,
    D: tl.constexpr,
    DP: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Second pass, program (block part, tile, batch row · group):
    ``mass`` [B·G, tiles, width], the mean over the real queries.
    """
    row = tl.program_id(2).to(tl.int64)
    at = (row * tiles + tl.program_id(1)) * count
    k_base = k_ptr + row // groups * k_sb + row % groups * k_sh
    list_ptr = blocks_ptr + (row * tiles + tl.program_id(1)) * width
    mass = tl.zeros([BLOCK_N], tl.float32)
    queries = 0
    for start in range(0, count, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q_pos, real = tile_rows(tiles_ptr, reps_ptr, rows, count, q_start, kv_len, T)
        q = load_rows(q_ptr + at * D, rows, D, real, D, DP)
        flat = tl.program_id(0) * BLOCK_N
        s = candidate_scores(
            q, q_pos, real, k_base, k_sn, list_ptr, flat, width, kv_len, scale, D, DP, S, BLOCK_N, LISTED
        )
        lse = tl.load(lse_ptr + at + rows, mask=rows < count, other=float("inf"))
        mass += tl.sum(tl.exp2(s - lse[:, None]), 0)
        queries += tl.sum(real.to(tl.int32), 0)
    COLUMNS: tl.constexpr = BLOCK_N // S
    by_block = tl.sum(tl.reshape(mass, [COLUMNS, S]), 1) / queries
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(mass_ptr + (row * tiles + tl.program_id(1)) * width + column, by_block, mask=column < width)
