"""Backward kernels. The weights are recomputed from the stored log-sum-exp; nothing is summed by atomics.

With P the softmax weights, dP = dO·Vᵀ and delta = rowsum(dO ∘ O) − dLSE: dS = P ∘ (dP − delta), times 1 − (s / softcap)² for
capped scores s; dQ = scale · dS·K, dK = scale · dSᵀ·Q, dV = Pᵀ·dO.
"""

import triton
import triton.language as tl

from .primitives import (
    LN2,
    LOG2E,
    cast,
    document,
    dot,
    empty_entries,
    finite,
    listed_keys,
    load_queries,
    load_rows,
    log2_scores,
    store_rows,
    tile_queries,
)


@triton.jit
def delta_kernel(
    out_ptr, do_ptr, dlse_ptr, delta_ptr, do_sb, do_sh, do_sn, heads, q_len, D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Program (row block, head, batch row): delta [B, H, Q] = rowsum(dO ∘ O) − dLSE; all contiguous but dO."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < q_len
    batch = tl.program_id(2).to(tl.int64)
    at = (batch * heads + tl.program_id(1)) * q_len + rows
    out = load_rows(out_ptr, at, D, valid, D, DP).to(tl.float32)
    do = load_rows(do_ptr + batch * do_sb + tl.program_id(1).to(tl.int64) * do_sh, rows, do_sn, valid, D, DP).to(tl.float32)
    dlse = tl.load(dlse_ptr + at, mask=valid, other=0.0)
    tl.store(delta_ptr + at, tl.sum(out * do, 1) - dlse, mask=valid)


@triton.jit
def load_lse(lse_ptr, at, valid):
    """Log-sum-exp in units of log 2; +inf, which makes every weight 0, for a row that saw nothing."""
    lse = tl.load(lse_ptr + at, mask=valid, other=float("inf"))
    return tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)


@triton.jit
def score_gradient(p, s, dp, delta, softcap, SOFTCAP: tl.constexpr):
    """Gradient of the scores before the cap; ``s`` is capped, in units of log 2; ``delta`` broadcasts against the rest."""
    ds = p * (dp - delta)
    if SOFTCAP:
        t = s * (LN2 / softcap)
        ds *= 1.0 - t * t
    return ds


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
    """Program (tile · row part, group, document): dQ [B, H, Q, D], contiguous. Same walk over the list as `forward_kernel`."""
    PARTS: tl.constexpr = (T * HG + BLOCK_M - 1) // BLOCK_M
    OWN: tl.constexpr = T // S if CAUSAL and T > S else 1
    PER_STEP: tl.constexpr = BLOCK_N // S if BLOCK_N > S else 1
    STEPS: tl.constexpr = S // BLOCK_N if S > BLOCK_N else 1
    part = tl.program_id(0) % PARTS
    index = tiles - 1 - tl.program_id(0) // PARTS
    group = tl.program_id(1)
    row, first, keys, start, head, q_pos, q_row, valid = tile_queries(part, index, docs_ptr, q_len, kv_len, HG, T, BLOCK_M, HAS_DOCS)
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
    whole = tl.maximum(width - OWN - empty, 0) // PER_STEP
    for step in range(0, whole * STEPS):
        pos, listed = listed_keys(list_ptr, empty, step * BLOCK_N, width, S, BLOCK_N, False)
        k = load_rows(k_base, pos, k_sn, listed, D, DP, False)
        v = load_rows(v_base, pos, v_sn, listed, D, DP, False)
        s = log2_scores(dot(q, tl.trans(k)), scale, softcap, SOFTCAP)
        ds = score_gradient(tl.exp2(s - lse[:, None]), s, dot(do, tl.trans(v)), delta[:, None], softcap, SOFTCAP)
        dq = dot(cast(ds, k.dtype), k, dq)
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


@triton.jit
def dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dk_ptr,
    dv_ptr,
    part_ptr,
    lse_ptr,
    delta_ptr,
    docs_ptr,
    tile_ptr,
    bin_ptr,
    work_ptr,
    slot_ptr,
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
    blocks,
    bins,
    chunk,
    slots,
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
    """Program (work item, part of the block): dK and dV of a key block from at most ``chunk`` of the tiles that kept it.

    The tables are those of `InverseIndex`. A block with one work item is stored in dK, dV [B, G, N, D] (contiguous), one
    with several in the workspace [2, slots, S, D] that `reduce_kernel` sums. Rows are (tile, head of the group, token).
    """
    ROWS: tl.constexpr = T * HG
    bin = tl.load(work_ptr + tl.program_id(0) * 2)
    if bin >= bins:
        return
    number = tl.load(work_ptr + tl.program_id(0) * 2 + 1)
    group = bin // blocks % groups
    row, first, keys, q_start = document(docs_ptr, bin // (blocks * groups), q_len, kv_len, HAS_DOCS)
    within = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_pos = bin % blocks * S + within
    real = k_pos < keys
    first64 = first.to(tl.int64)
    k = load_rows(k_ptr + row * k_sb + group.to(tl.int64) * k_sh + first64 * k_sn, k_pos, k_sn, real, D, DP)
    v = load_rows(v_ptr + row * v_sb + group.to(tl.int64) * v_sh + first64 * v_sn, k_pos, v_sn, real, D, DP)
    begin = tl.load(bin_ptr + bin)
    stop = tl.load(bin_ptr + bin + 1)
    several = stop - begin > chunk
    begin += number * chunk
    count = tl.minimum(stop - begin, chunk)

    dk = tl.zeros([BLOCK_N, DP], tl.float32)
    dv = tl.zeros([BLOCK_N, DP], tl.float32)
    for step in range(0, tl.cdiv(count * ROWS, BLOCK_M)):
        if ROWS % BLOCK_M == 0:  # the rows of a step belong to one tile: a scalar load
            inner = step * BLOCK_M % ROWS + tl.arange(0, BLOCK_M)
            index = tl.load(tile_ptr + begin + step * BLOCK_M // ROWS)
            valid = inner >= 0
        else:
            flat = step * BLOCK_M + tl.arange(0, BLOCK_M)
            inner = flat % ROWS
            valid = flat < count * ROWS
            index = tl.load(tile_ptr + begin + flat // ROWS, mask=valid, other=0)
        head = group * HG + inner // T
        q_pos = (q_start // T + index) * T + inner % T
        valid &= (q_pos >= q_start) & (q_pos < keys)
        q_row = q_pos + first - (kv_len - q_len)
        q = load_queries(q_ptr + row * q_sb, head, q_sh, q_row, q_sn, valid, D, DP)
        do = load_queries(do_ptr + row * do_sb, head, do_sh, q_row, do_sn, valid, D, DP)
        at = (row * groups * HG + head) * q_len + q_row
        lse = load_lse(lse_ptr, at, valid)
        delta = tl.load(delta_ptr + at, mask=valid, other=0.0)
        visible = valid[:, None] & real[None, :]
        if CAUSAL:
            visible &= k_pos[None, :] <= q_pos[:, None]
        s = log2_scores(dot(q, tl.trans(k)), scale, softcap, SOFTCAP)
        p = tl.where(visible, tl.exp2(s - lse[:, None]), 0.0)
        dv = dot(tl.trans(cast(p, do.dtype)), do, dv)
        ds = tl.where(visible, score_gradient(p, s, dot(do, tl.trans(v)), delta[:, None], softcap, SOFTCAP), 0.0)
        dk = dot(tl.trans(cast(ds, q.dtype)), q, dk)
    dk *= scale
    if several:
        slot = tl.load(slot_ptr + bin).to(tl.int64) + number
        inside = within < S
        store_rows(part_ptr, slot * S + within, D, inside, dk, D, DP)
        store_rows(part_ptr, (slots + slot) * S + within, D, inside, dv, D, DP)
    else:
        at = (row * groups + group) * kv_len + first + k_pos
        store_rows(dk_ptr, at, D, real, dk, D, DP)
        store_rows(dv_ptr, at, D, real, dv, D, DP)


@triton.jit
def reduce_kernel(
    part_ptr,
    dk_ptr,
    dv_ptr,
    docs_ptr,
    bin_ptr,
    slot_ptr,
    popular_ptr,
    groups,
    q_len,
    kv_len,
    blocks,
    bins,
    chunk,
    slots,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_DOCS: tl.constexpr,
):
    """Program (popular block, part of it, dK or dV): sum of its work items in the order of their numbers."""
    bin = tl.load(popular_ptr + tl.program_id(0))
    if bin >= bins:
        return
    row, first, keys, _ = document(docs_ptr, bin // (blocks * groups), q_len, kv_len, HAS_DOCS)
    group = bin // blocks % groups
    which = tl.program_id(2)
    within = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = which.to(tl.int64) * slots + tl.load(slot_ptr + bin)
    total = tl.zeros([BLOCK_N, DP], tl.float32)
    for number in range(0, tl.cdiv(tl.load(bin_ptr + bin + 1) - tl.load(bin_ptr + bin), chunk)):
        total += load_rows(part_ptr, (slot + number) * S + within, D, within < S, D, DP)
    k_pos = bin % blocks * S + within
    at = (row * groups + group) * kv_len + first + k_pos
    if which == 0:
        store_rows(dk_ptr, at, D, k_pos < keys, total, D, DP)
    else:
        store_rows(dv_ptr, at, D, k_pos < keys, total, D, DP)
