"""The attention kernels for CUDA, in Triton; `attention.py` launches them.

The attention kernel is flash attention (Dao et al. 2022) over a paged cache (Kwon et al. 2023), the same for
decode, prefill and batches that mix them: a program takes a tile of query tokens of one run with *all* query
heads of one KV head, so that K and V are read once for the group. Decode is the case of small tiles.

Shape suffixes: T tokens, M rows of a tile (tokens x heads of a group), N keys, D and E the head dimensions of
K and V, P partial sums of a cut tile, H heads.
"""

# Triton kernels have no Python types to state, and `triton.jit` is untyped:
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from server.devices.cuda.jit import after_the_last, jit, kernel, tl


@kernel()
def write(
    key, value, k_cache, v_cache, slot_mapping,
    key_stride_t, key_stride_h, value_stride_t, value_stride_h,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    KV_HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """K and V of one token, all heads, into the cache; grid (T,)."""
    if PDL:
        after_the_last()
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + t)
    if slot < 0:
        return
    block, n = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    h_H, d_D, e_E = (
        tl.arange(0, BLOCK_H)[:, None],
        tl.arange(0, BLOCK_D)[None, :],
        tl.arange(0, BLOCK_E)[None, :],
    )
    mask_HD, mask_HE = (h_H < KV_HEADS) & (d_D < K_DIM), (h_H < KV_HEADS) & (e_E < V_DIM)
    k_HD = tl.load(key + t * key_stride_t + h_H * key_stride_h + d_D, mask=mask_HD)
    v_HE = tl.load(value + t * value_stride_t + h_H * value_stride_h + e_E, mask=mask_HE)
    tl.store(k_cache + block * k_stride_b + h_H * k_stride_h + n * k_stride_n + d_D, k_HD, mask=mask_HD)
    tl.store(v_cache + block * v_stride_b + h_H * v_stride_h + n * v_stride_n + e_E, v_HE, mask=mask_HE)


@jit()
def _blocks(table, n_N, end, BLOCK_SIZE: tl.constexpr):
    """The cache's blocks that hold the keys n_N. Loaded a step ahead: no copy waits for its address."""
    return tl.load(table + n_N // BLOCK_SIZE, mask=n_N < end, other=0).to(tl.int64)


@jit()
def _rows(
    cache, block_N, n_N, end, kv_head, stride_b, stride_h, stride_n,
    DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """K or V of the keys n_N of one KV head; zero from `end` on."""
    from_N = cache + block_N * stride_b + kv_head * stride_h + n_N % BLOCK_SIZE * stride_n
    d_D = tl.arange(0, BLOCK_D)
    return tl.load(
        from_N[:, None] + d_D[None, :], mask=(n_N < end)[:, None] & (d_D < DIM)[None, :], other=0.0
    )


@jit()
def _scores(q_MD, k_ND, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Logits in base 2, so that the softmax can use exp2."""
    score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION) * scale
    if SOFTCAP:
        # tanh(y) = 1 - 2 / (exp(2y) + 1), and exp(2y) = inf gives 1
        score_MN = softcap * (1.0 - 2.0 / (tl.exp(2.0 * score_MN / softcap) + 1.0))
    return score_MN * 1.4426950408889634  # log2(e)


@jit()
def _soften(score_MN, top_M, sum_M):
    """Running softmax: exponentials, what the sums so far shrink by, new greatest logit, new sum."""
    new_top_M = tl.maximum(top_M, tl.max(score_MN, axis=1))
    base_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M)  # a row that has seen no key yet
    p_MN = tl.exp2(score_MN - base_M[:, None])
    fade_M = tl.exp2(top_M - base_M)
    return p_MN, fade_M, new_top_M, sum_M * fade_M + tl.sum(p_MN, axis=1)


@jit()
def _first_key(begin, position, window, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key of an item's steps: within the window of the item's first token."""
    if WINDOW:
        begin = tl.maximum(begin, tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N)
    return tl.multiple_of(begin, BLOCK_N)  # what the compiler does not see, and addresses are cheaper by


@jit()
def _seen(n_N, position_M, end, window, WINDOW: tl.constexpr):
    """Which keys each row sees."""
    seen_MN = (n_N <= position_M[:, None]) & (n_N < end)[None, :]
    if WINDOW:
        seen_MN &= n_N[None, :] > position_M[:, None] - window
    return seen_MN


@jit()
def _sinks(sinks, head_M, real_M, begin, SINKS: tl.constexpr, ROWS: tl.constexpr):
    """Where a softmax starts: its largest score (base 2), and its sum. A sink counts once for each tile."""
    top_M = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    sum_M = tl.zeros([ROWS], dtype=tl.float32)
    if SINKS and begin == 0:
        sink_M = tl.load(sinks + head_M, mask=real_M, other=0.0).to(tl.float32)
        top_M = sink_M * 1.4426950408889634  # log2(e)
        sum_M += 1.0
    return top_M, sum_M


@jit()
def _store(
    out, parts, lse, part, t_first, t_M, head_M, real_M, tile_tokens, out_stride_t,
    sum_ME, sum_M, top_M,
    RATIO: tl.constexpr, V_DIM: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """What an item has found, to the output; of a cut tile, to its place among the partial sums."""
    e_E = tl.arange(0, BLOCK_E)
    sum_M = tl.where(sum_M == 0.0, 1.0, sum_M)  # a row that sees no key of this item: lse = -inf
    out_ME = sum_ME / sum_M[:, None]
    mask_ME = real_M[:, None] & (e_E < V_DIM)[None, :]
    if part < 0:
        to_M = out + t_M.to(tl.int64) * out_stride_t + head_M * V_DIM
        tl.store(to_M[:, None] + e_E[None, :], out_ME.to(out.dtype.element_ty), mask=mask_ME)
    else:
        at_M = (part * tile_tokens + t_M - t_first) * (tl.num_programs(1) * RATIO) + head_M
        tl.store(parts + (at_M * V_DIM)[:, None] + e_E[None, :], out_ME, mask=mask_ME)
        tl.store(lse + at_M, top_M + tl.log2(sum_M), mask=real_M)


@kernel("tile_tokens", "table_stride")
def attend(
    query, k_cache, v_cache, out, parts, lse, items, block_tables, sinks,
    scale, softcap, window, tile_tokens,
    query_stride_t, query_stride_h, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    out_stride_t, table_stride,
    RATIO: tl.constexpr, GROUP: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One item; grid (items, kv_heads).

    GROUP is RATIO (query heads of a KV head) rounded up to a power of two. An item of a cut tile gives
    `parts` its own softmax and `lse` the logarithm (base 2) of its sum of exponentials.
    """
    if PDL:
        after_the_last()
    item, kv_head = items + tl.program_id(0) * 8, tl.program_id(1)
    tokens = tl.load(item + 2)
    if tokens == 0:
        return
    s, t_first, position, part = tl.load(item), tl.load(item + 1), tl.load(item + 3), tl.load(item + 6)
    begin, end = tl.load(item + 4), tl.load(item + 5)
    row_M = tl.arange(0, BLOCK_T * GROUP)
    t_M = t_first + row_M // GROUP
    head_M = kv_head * RATIO + row_M % GROUP
    real_M = (t_M < t_first + tokens) & (row_M % GROUP < RATIO)
    d_D = tl.arange(0, BLOCK_D)
    from_M = query + t_M.to(tl.int64) * query_stride_t + head_M * query_stride_h
    q_MD = tl.load(from_M[:, None] + d_D[None, :], mask=real_M[:, None] & (d_D < K_DIM)[None, :], other=0.0)

    top_M, sum_M = _sinks(sinks, head_M, real_M, begin, SINKS, BLOCK_T * GROUP)
    sum_ME = tl.zeros([BLOCK_T * GROUP, BLOCK_E], dtype=tl.float32)
    position_M = position - t_first + t_M
    table, first = block_tables + s * table_stride, _first_key(begin, position, window, WINDOW, BLOCK_N)
    block_N = _blocks(table, first + tl.arange(0, BLOCK_N), end, BLOCK_SIZE)
    for n in range(first, end, BLOCK_N):
        n_N = n + tl.arange(0, BLOCK_N)
        next_block_N = _blocks(table, n_N + BLOCK_N, end, BLOCK_SIZE)
        k_ND = _rows(
            k_cache, block_N, n_N, end, kv_head,
            k_stride_b, k_stride_h, k_stride_n, K_DIM, BLOCK_SIZE, BLOCK_D,
        )  # fmt: skip
        score_MN = _scores(q_MD, k_ND, scale, softcap, SOFTCAP, PRECISION)
        score_MN = tl.where(_seen(n_N, position_M, end, window, WINDOW), score_MN, float("-inf"))
        p_MN, fade_M, top_M, sum_M = _soften(score_MN, top_M, sum_M)
        v_NE = _rows(
            v_cache, block_N, n_N, end, kv_head,
            v_stride_b, v_stride_h, v_stride_n, V_DIM, BLOCK_SIZE, BLOCK_E,
        )  # fmt: skip
        sum_ME = tl.dot(p_MN.to(v_NE.dtype), v_NE, sum_ME * fade_M[:, None], input_precision=PRECISION)
        block_N = next_block_N

    _store(
        out, parts, lse, part, t_first, t_M, head_M, real_M, tile_tokens, out_stride_t,
        sum_ME, sum_M, top_M, RATIO, V_DIM, BLOCK_E,
    )  # fmt: skip


@kernel("tile_tokens")
def join(
    parts, lse, out, cuts, tile_tokens,
    V_DIM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Partial sums of a cut tile and one head, weighted by their sums of exponentials.

    Grid (cuts, programs that share a tile's tokens, H).
    """
    if PDL:
        after_the_last()
    cut = cuts + tl.program_id(0) * 4
    for token in range(tl.program_id(1), tl.load(cut + 1), tl.num_programs(1)):
        _join_token(parts, lse, out, cut, token, tile_tokens, V_DIM, BLOCK_P, BLOCK_E)


@jit()
def _join_token(
    parts, lse, out, cut, token, tile_tokens,
    V_DIM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    head, heads, first, count = tl.program_id(2), tl.num_programs(2), tl.load(cut + 2), tl.load(cut + 3)
    e_E = tl.arange(0, BLOCK_E)
    top_1 = tl.full([1], float("-inf"), dtype=tl.float32)
    sum_1 = tl.zeros([1], dtype=tl.float32)
    sum_1E = tl.zeros([1, BLOCK_E], dtype=tl.float32)
    for p in range(0, count, BLOCK_P):
        p_P = p + tl.arange(0, BLOCK_P)
        at_P = ((first + p_P) * tile_tokens + token) * heads + head
        lse_P = tl.load(lse + at_P, mask=p_P < count, other=float("-inf"))
        part_PE = tl.load(
            parts + (at_P * V_DIM)[:, None] + e_E[None, :],
            mask=(p_P < count)[:, None] & (e_E < V_DIM)[None, :],
            other=0.0,
        )
        weight_1P, fade_1, top_1, sum_1 = _soften(lse_P[None, :], top_1, sum_1)
        sum_1E = sum_1E * fade_1[:, None] + tl.sum(weight_1P[:, :, None] * part_PE[None, :, :], axis=1)
    out_1E = (sum_1E / sum_1[:, None]).to(out.dtype.element_ty)
    to_E = out + ((tl.load(cut) + token).to(tl.int64) * heads + head) * V_DIM + e_E
    tl.store(to_E[None, :], out_1E, mask=(e_E < V_DIM)[None, :])
