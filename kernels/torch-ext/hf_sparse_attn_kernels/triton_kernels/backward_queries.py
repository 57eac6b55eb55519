"""Backward kernels of the queries. The weights are recomputed from the stored log-sum-exp; nothing is summed by
atomics.

With P the softmax weights, dP = dO·Vᵀ and delta = rowsum(dO ∘ O) − dLSE: dS = P ∘ (dP − delta), times 1 − (s /
softcap)² for capped scores s; dQ = scale · dS·K, dK = scale · dSᵀ·Q, dV = Pᵀ·dO (`backward_keys`).
"""

# Shape legend: B batch, H query heads, Q queries, D head dim (DP: up to a power of two), T query tile, S block size,
# HG query heads of a KV head. Source of the formulas: FlashAttention, arXiv 2205.14135, appendix B.

import triton
import triton.language as tl

from .primitives import (
    cast,
    dot,
    empty_entries,
    finite,
    listed_keys,
    load_lse,
    load_queries,
    load_rows,
    log2_scores,
    score_gradient,
    store_rows,
    tile_queries,
)


@triton.jit
def delta_kernel(
    out_ptr,
    do_ptr,
    dlse_ptr,
    delta_ptr,
    do_sb,
    do_sh,
    do_sn,
    heads,
    q_len,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Program (row block, head, batch row): delta [B, H, Q] = rowsum(dO ∘ O) − dLSE; all contiguous but dO."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < q_len
    batch = tl.program_id(2).to(tl.int64)
    at = (batch * heads + tl.program_id(1)) * q_len + rows
    out = load_rows(out_ptr, at, D, valid, D, DP).to(tl.float32)
    do = load_rows(do_ptr + batch * do_sb + tl.program_id(1).to(tl.int64) * do_sh, rows, do_sn, valid, D, DP).to(
        tl.float32
    )
    dlse = tl.load(dlse_ptr + at, mask=valid, other=0.0)
    tl.store(delta_ptr + at, tl.sum(out * do, 1) - dlse, mask=valid)


@triton.jit
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,
    list_ptr,
    docs_ptr,
    q_sb,
    q_sh,
    q_sn,
    k_sb,
    k_sh,
    k_sn,
    v_sb,
    v_sh,
    v_sn,
    do_sb,
    do_sh,
    do_sn,
    groups,
    q_len,
    kv_len,
    tiles,
    width,
    scale,
    softcap,
    HG: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Program (tile · row part, group, document): dQ [B, H, Q, D], contiguous.
    Same walk over the list as `forward_kernel`.
    """
    PARTS: tl.constexpr = (T * HG + BLOCK_M - 1) // BLOCK_M
    OWN: tl.constexpr = T // S if CAUSAL and T > S else 1
    PER_STEP: tl.constexpr = BLOCK_N // S if BLOCK_N > S else 1
    STEPS: tl.constexpr = S // BLOCK_N if S > BLOCK_N else 1
    part = tl.program_id(0) % PARTS
    index = tiles - 1 - tl.program_id(0) // PARTS
    group = tl.program_id(1)
    row, first, keys, start, head, q_pos, q_row, valid = tile_queries(
        part, index, docs_ptr, q_len, kv_len, HG, T, BLOCK_M, HAS_DOCS
    )
    if start >= keys:
        return

    q = load_queries(q_ptr + row * q_sb, head, q_sh, q_row, q_sn, valid, D, DP)
    do = load_queries(do_ptr + row * do_sb, head, do_sh, q_row, do_sn, valid, D, DP)
    at = (row * groups * HG + head) * q_len + q_row
    lse = load_lse(lse_ptr, at, valid)
    delta = tl.load(delta_ptr + at, mask=valid, other=0.0)
    k_base = k_ptr + row * k_sb + group.to(tl.int64) * k_sh + first.to(tl.int64) * k_sn
    v_base = v_ptr + row * v_sb + group.to(tl.int64) * v_sh + first.to(tl.int64) * v_sn

    dq = tl.zeros([BLOCK_M, DP], tl.float32)
    list_ptr += ((tl.program_id(2).to(tl.int64) * groups + group) * tiles + index) * width
    empty = empty_entries(list_ptr, width)
    # blocks before the tile's own, in steps that are full: no mask. Rows of no query have lse = +inf, so no weight
    whole = tl.maximum(width - OWN - empty, 0) // PER_STEP
    for step in range(0, whole * STEPS):
        pos, listed = listed_keys(list_ptr, empty, step * BLOCK_N, width, S, BLOCK_N, False)
        k = load_rows(k_base, pos, k_sn, listed, D, DP, False)
        v = load_rows(v_base, pos, v_sn, listed, D, DP, False)
        s = log2_scores(dot(q, tl.trans(k)), scale, softcap, SOFTCAP)
        ds = score_gradient(tl.exp2(s - lse[:, None]), s, dot(do, tl.trans(v)), delta[:, None], softcap, SOFTCAP)
        dq = dot(cast(ds, k.dtype), k, dq)
    # the rest: blocks that do not fill a step, and the tile's own
    tail = empty + whole * PER_STEP
    last = tl.minimum(start + T, keys) if CAUSAL else keys
    for step in tl.range(0, tl.cdiv(width - tail, PER_STEP) * STEPS, num_stages=1):
        pos, listed = listed_keys(list_ptr, tail, step * BLOCK_N, width, S, BLOCK_N, True)
        listed &= pos < last
        k = load_rows(k_base, pos, k_sn, listed, D, DP)
        v = load_rows(v_base, pos, v_sn, listed, D, DP)
        visible = valid[:, None] & listed[None, :]
        if CAUSAL:
            visible &= pos[None, :] <= q_pos[:, None]
        s = log2_scores(dot(q, tl.trans(k)), scale, softcap, SOFTCAP)
        ds = score_gradient(tl.exp2(s - lse[:, None]), s, dot(do, tl.trans(v)), delta[:, None], softcap, SOFTCAP)
        ds = tl.where(visible, ds, 0.0)
        if CAUSAL:  # a row that sees a key that is not finite has a NaN in ds; it must not reach the other rows
            k = tl.where(finite(k), k, 0.0).to(k.dtype)
        dq = dot(cast(ds, k.dtype), k, dq)
    store_rows(dq_ptr, at, D, valid, dq * scale, D, DP)
