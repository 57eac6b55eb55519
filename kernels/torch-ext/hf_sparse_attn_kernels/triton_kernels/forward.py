"""Forward kernels: a query tile against its list of kept blocks, and the merge of split lists."""

# Shape legend: B batch, H query heads, Q queries, D head dim (DP: up to a power of two), T query tile, S block size,
# HG query heads of a KV head.

import triton
import triton.language as tl

from .primitives import (
    LN2,
    LOG2E,
    cast,
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


# m' = max(m, max_j s_j), l' = 2^(m − m') · l + Σ_j 2^(s_j − m'), acc' = 2^(m − m') · acc + Σ_j 2^(s_j − m') · v_j;
# the caller adds the last sum. FlashAttention, arXiv 2205.14135, algorithm 1, in base 2.
@triton.jit
def softmax_step(s, m, l, acc):
    """Online softmax: new maximum, rescaled sum and accumulator, and the weights of scores ``s`` (log2)."""
    m_new = tl.maximum(m, tl.max(s, 1))
    # of a row that has seen nothing, −inf − (−inf) would be NaN
    shift = tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.exp2(s - shift[:, None])
    alpha = tl.exp2(m - shift)
    return m_new, l * alpha + tl.sum(p, 1), acc * alpha[:, None], p


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    list_ptr,
    docs_ptr,
    sinks_ptr,
    q_sb,
    q_sh,
    q_sn,
    k_sb,
    k_sh,
    k_sn,
    v_sb,
    v_sh,
    v_sn,
    batch,
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
    SPLITS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Program (tile · row part · split, group, document): ``out`` [SPLITS, B, H, Q, D] and ``lse`` [SPLITS, B, H, Q],
    contiguous.

    Rows are the tile's tokens × the heads of the group. Whole blocks before the tile's own need no mask; the tail
    (the tile's own blocks and what does not fill a key tile) is masked. With SPLITS > 1 each program takes a part of
    the unmasked steps and the last one the tail.
    """
    PARTS: tl.constexpr = (T * HG + BLOCK_M - 1) // BLOCK_M
    # the tile's own blocks end its list; a step reads PER_STEP blocks, or one of STEPS parts of a block
    OWN: tl.constexpr = T // S if CAUSAL and T > S else 1
    PER_STEP: tl.constexpr = BLOCK_N // S if BLOCK_N > S else 1
    STEPS: tl.constexpr = S // BLOCK_N if S > BLOCK_N else 1
    split = tl.program_id(0) % SPLITS
    part = tl.program_id(0) // SPLITS % PARTS
    index = tiles - 1 - tl.program_id(0) // (SPLITS * PARTS)  # the longest lists first
    group = tl.program_id(1)
    row, first, keys, start, head, q_pos, q_row, valid = tile_queries(
        part, index, docs_ptr, q_len, kv_len, HG, T, BLOCK_M, HAS_DOCS
    )
    if start >= keys:
        return

    q = load_queries(q_ptr + row * q_sb, head, q_sh, q_row, q_sn, valid, D, DP)
    k_base = k_ptr + row * k_sb + group.to(tl.int64) * k_sh + first.to(tl.int64) * k_sn
    v_base = v_ptr + row * v_sb + group.to(tl.int64) * v_sh + first.to(tl.int64) * v_sn

    acc = tl.zeros([BLOCK_M, DP], tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:  # a sink is a key that was seen before all others, by the first split only
        sink = tl.load(sinks_ptr + head, mask=valid, other=0.0).to(tl.float32) * LOG2E
        m = tl.where(split == 0, sink, m)
        l = tl.where(split == 0, 1.0, l)

    list_ptr += ((tl.program_id(2).to(tl.int64) * groups + group) * tiles + index) * width
    empty = empty_entries(list_ptr, width)
    # steps full of blocks before the tile's own, which every row sees: no mask
    whole = tl.maximum(width - OWN - empty, 0) // PER_STEP
    each = tl.cdiv(whole * STEPS, SPLITS)
    for step in range(split * each, tl.minimum((split + 1) * each, whole * STEPS)):
        pos, listed = listed_keys(list_ptr, empty, step * BLOCK_N, width, S, BLOCK_N, False)
        k = load_rows(k_base, pos, k_sn, listed, D, DP, False)
        s = log2_scores(dot(q, tl.trans(k)), scale, softcap, SOFTCAP)
        m, l, acc, p = softmax_step(s, m, l, acc)
        v = load_rows(v_base, pos, v_sn, listed, D, DP, False)
        acc = dot(cast(p, v.dtype), v, acc)
    if split == SPLITS - 1:
        # the rest: blocks that do not fill a step, and the tile's own
        tail = empty + whole * PER_STEP
        last = tl.minimum(start + T, keys) if CAUSAL else keys
        for step in tl.range(0, tl.cdiv(width - tail, PER_STEP) * STEPS, num_stages=1):
            pos, listed = listed_keys(list_ptr, tail, step * BLOCK_N, width, S, BLOCK_N, True)
            listed &= pos < last
            k = load_rows(k_base, pos, k_sn, listed, D, DP)
            visible = valid[:, None] & listed[None, :]
            if CAUSAL:
                visible &= pos[None, :] <= q_pos[:, None]
            s = tl.where(visible, log2_scores(dot(q, tl.trans(k)), scale, softcap, SOFTCAP), -float("inf"))
            m, l, acc, p = softmax_step(s, m, l, acc)
            v = load_rows(v_base, pos, v_sn, listed, D, DP)
            if CAUSAL:  # a value that is not finite reaches only the rows that see it: 0 · NaN is NaN
                good = finite(v)
                bad_key = tl.max(tl.where(good, 0, 1), 1)
                touched = tl.max(tl.where(visible, bad_key[None, :], 0), 1)
                acc = tl.where(touched[:, None] > 0, float("nan"), acc)
                v = tl.where(good, v, 0.0).to(v.dtype)
            acc = dot(cast(p, v.dtype), v, acc)

    out = acc / tl.where(l == 0, 1.0, l)[:, None]
    at = ((split * batch + row) * groups * HG + head) * q_len + q_row
    store_rows(out_ptr, at, D, valid, out, D, DP)
    tl.store(lse_ptr + at, tl.where(l == 0, -float("inf"), (m + tl.log2(tl.where(l == 0, 1.0, l))) * LN2), mask=valid)


# lse = log Σ_s exp lse_s, out = Σ_s exp(lse_s − lse) · out_s over the splits s of a list.
@triton.jit
def combine_kernel(
    part_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    rows,
    D: tl.constexpr,
    DP: tl.constexpr,
    SPLITS: tl.constexpr,
    SP: tl.constexpr,
):
    """Program (row): merge ``part`` [SPLITS, rows, D] and its log-sum-exps [SPLITS, rows];
    SP is SPLITS up to a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SP)
    at = split.to(tl.int64) * rows + row
    lse = tl.load(part_lse_ptr + at, mask=split < SPLITS, other=-float("inf"))
    top = tl.max(lse, 0)
    weight = tl.exp2((lse - tl.where(top == -float("inf"), 0.0, top)) * LOG2E)
    total = tl.sum(weight, 0)
    part = load_rows(part_ptr, at, D, split < SPLITS, D, DP)
    total = tl.where(top == -float("inf"), 1.0, total)
    share = weight / total
    out = tl.sum(part * share[:, None], 0)
    d = tl.arange(0, DP)
    tl.store(out_ptr + row * D + d, cast(out, out_ptr.dtype.element_ty), mask=d < D)
    tl.store(lse_ptr + row, top + tl.log2(total) * LN2)
