"""Backward kernels of the keys, by the inverse index; the formulas are those of `backward_queries`."""

# Shape legend: B batch, G KV heads, N keys, D head dim (DP: up to a power of two), T query tile, S block size, HG query
# heads of a KV head.

import triton
import triton.language as tl

from .primitives import cast, document, dot, load_lse, load_queries, load_rows, log2_scores, score_gradient, store_rows


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
    """Program (work item, part of the block): dK and dV of a key block from at most ``chunk`` of the tiles that kept
    it.

    The tables are those of `InverseIndex`. A block with one work item is stored in dK, dV [B, G, N, D] (contiguous),
    one with several in the workspace [2, slots, S, D] that `reduce_kernel` sums. Rows are (tile, head of the group,
    token).
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
    # work item `number` takes the next `chunk` of the tiles that kept the block
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
        # from a position in the document to a slot of the call, and from that to a row of its queries
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
        # P = 2^(s − lse) in units of log 2; dV += Pᵀ dO, dK += dSᵀ Q
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
    # a fixed order of float32 sums: results do not change from run to run
    for number in range(0, tl.cdiv(tl.load(bin_ptr + bin + 1) - tl.load(bin_ptr + bin), chunk)):
        total += load_rows(part_ptr, (slot + number) * S + within, D, within < S, D, DP)
    k_pos = bin % blocks * S + within
    at = (row * groups + group) * kv_len + first + k_pos
    if which == 0:
        store_rows(dk_ptr, at, D, k_pos < keys, total, D, DP)
    else:
        store_rows(dv_ptr, at, D, k_pos < keys, total, D, DP)
