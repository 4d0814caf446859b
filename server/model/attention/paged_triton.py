"""Paged attention for CUDA, in Triton: one kernel writes K and V, one attends, one joins splits.

The attention kernel is flash attention (Dao et al. 2022) over a paged cache (Kwon et al. 2023), the same for
decode, prefill and batches that mix them: a program takes a tile of query tokens of one run with *all* query
heads of one KV head, so that K and V are read once for the group. Decode is the case of small tiles. When
there are too few programs for the chip, the context is split among several (flash-decoding, Dao et al. 2023).

Grids follow from what the host knows (T, S, `max_query_len`, `max_context_len`); programs past the live
contents return early. So a captured CUDA graph can replay with fewer sequences: repeat the last value of
`query_starts`, and give the tokens that are left over a negative slot in `slot_mapping`.

Shape suffixes: T tokens, S sequences, M rows of a tile (tokens x heads of a group), N keys, D and E the
head dimensions of K and V, P splits, H heads.
"""

# Triton kernels have no Python types to state, and `triton.jit` is untyped:
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from server.model.attention.interface import AttentionPlan, LayerCache
from server.native.jit import jit, power_of_2, power_of_2_below, tile_of, tl, triton


@jit()
def _write(
    key, value, k_cache, v_cache, slot_mapping,
    key_stride_t, key_stride_h, value_stride_t, value_stride_h,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    KV_HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """K and V of one token, all heads, into the cache; grid (T,)."""
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
def _span(
    context, t_first, t_last, window, split,
    WINDOW: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Position of token 0, and the keys [begin, end) that one split of a tile's context attends to."""
    shift = context - t_last
    begin = 0
    if WINDOW:
        begin = tl.maximum(shift + t_first - window + 1, 0) // BLOCK_N * BLOCK_N
    end = tl.minimum(shift + t_first + BLOCK_T, context)
    split_size = tl.cdiv(end - begin, SPLITS * BLOCK_N) * BLOCK_N
    begin += split * split_size
    return shift, begin, tl.minimum(begin + split_size, end)


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


@jit("n_seqs", "lse_stride_p", "table_stride")
def _attend(
    query, k_cache, v_cache, out, lse, query_starts, context_lens, block_tables, sinks,
    n_seqs, scale, softcap, window,
    query_stride_t, query_stride_h, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    out_stride_p, out_stride_t, lse_stride_p, table_stride,
    RATIO: tl.constexpr, GROUP: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile's attention over one split of its context; grid (tiles, kv_heads, splits).

    GROUP is RATIO (query heads of a KV head) rounded up to a power of two. With SPLITS > 1, `out` takes each
    split's own softmax and `lse` its logarithm (base 2) of the sum of exponentials.
    """
    kv_head, split = tl.program_id(1), tl.program_id(2)
    s, t_first, t_last = tile_of(query_starts, n_seqs, tl.program_id(0), BLOCK_T, BLOCK_S)
    if t_first >= t_last:
        return
    row_M = tl.arange(0, BLOCK_T * GROUP)
    t_M = t_first + row_M // GROUP
    head_M = kv_head * RATIO + row_M % GROUP
    real_M = (t_M < t_last) & (row_M % GROUP < RATIO)
    d_D, e_E = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    from_M = query + t_M.to(tl.int64) * query_stride_t + head_M * query_stride_h
    q_MD = tl.load(from_M[:, None] + d_D[None, :], mask=real_M[:, None] & (d_D < K_DIM)[None, :], other=0.0)

    top_M = tl.full([BLOCK_T * GROUP], float("-inf"), dtype=tl.float32)
    sum_M = tl.zeros([BLOCK_T * GROUP], dtype=tl.float32)
    if SINKS and split == 0:
        top_M = tl.load(sinks + head_M, mask=real_M, other=0.0).to(tl.float32) * 1.4426950408889634  # log2(e)
        sum_M += 1.0
    sum_ME = tl.zeros([BLOCK_T * GROUP, BLOCK_E], dtype=tl.float32)
    context = tl.load(context_lens + s)
    shift, begin, end = _span(context, t_first, t_last, window, split, WINDOW, SPLITS, BLOCK_T, BLOCK_N)
    position_M = shift + t_M
    for n in range(begin, end, BLOCK_N):
        n_N = n + tl.arange(0, BLOCK_N)
        table_N = block_tables + s * table_stride + n_N // BLOCK_SIZE
        block_N = tl.load(table_N, mask=n_N < end, other=0).to(tl.int64)
        k_ND = _rows(
            k_cache, block_N, n_N, end, kv_head,
            k_stride_b, k_stride_h, k_stride_n, K_DIM, BLOCK_SIZE, BLOCK_D,
        )  # fmt: skip
        score_MN = _scores(q_MD, k_ND, scale, softcap, SOFTCAP, PRECISION)
        seen_MN = (n_N <= position_M[:, None]) & (n_N < end)[None, :]
        if WINDOW:
            seen_MN &= n_N[None, :] > position_M[:, None] - window
        score_MN = tl.where(seen_MN, score_MN, float("-inf"))
        p_MN, fade_M, top_M, sum_M = _soften(score_MN, top_M, sum_M)
        v_NE = _rows(
            v_cache, block_N, n_N, end, kv_head,
            v_stride_b, v_stride_h, v_stride_n, V_DIM, BLOCK_SIZE, BLOCK_E,
        )  # fmt: skip
        sum_ME = tl.dot(p_MN.to(v_NE.dtype), v_NE, sum_ME * fade_M[:, None], input_precision=PRECISION)

    sum_M = tl.where(sum_M == 0.0, 1.0, sum_M)  # a row that sees nothing in this split: lse = -inf
    to_M = out + split * out_stride_p + t_M.to(tl.int64) * out_stride_t + head_M * V_DIM
    out_ME = (sum_ME / sum_M[:, None]).to(out.dtype.element_ty)
    tl.store(to_M[:, None] + e_E[None, :], out_ME, mask=real_M[:, None] & (e_E < V_DIM)[None, :])
    if SPLITS > 1:
        at_M = lse + split * lse_stride_p + t_M * (tl.num_programs(1) * RATIO) + head_M
        tl.store(at_M, top_M + tl.log2(sum_M), mask=real_M)


@jit("lse_stride_p")
def _join(
    parts, lse, out, parts_stride_p, lse_stride_p,
    V_DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The splits of one token and head, weighted by their sums of exponentials; grid (T * H,)."""
    row = tl.program_id(0).to(tl.int64)
    p_P, e_E = tl.arange(0, SPLITS), tl.arange(0, BLOCK_E)
    lse_P = tl.load(lse + p_P * lse_stride_p + row)
    weight_P = tl.exp2(lse_P - tl.max(lse_P, axis=0))
    part_PE = tl.load(
        parts + (p_P * parts_stride_p)[:, None] + row * V_DIM + e_E[None, :],
        mask=(e_E < V_DIM)[None, :],
        other=0.0,
    )
    out_E = tl.sum(part_PE * weight_P[:, None], axis=0) / tl.sum(weight_P, axis=0)
    tl.store(out + row * V_DIM + e_E, out_E.to(out.dtype.element_ty), mask=e_E < V_DIM)


@dataclass(frozen=True)
class Launch:
    """Block shapes and grid of one attention launch, from host-known bounds alone."""

    group: int  # query heads of a KV head, rounded up to a power of two
    block_t: int  # query tokens of a tile
    block_s: int  # 0: each run is one tile; else a power of two over the number of runs
    tiles: int
    splits: int  # of each context, a power of two
    block_n: int  # keys of a step
    num_warps: int

    @classmethod
    def choose(
        cls, plan: AttentionPlan, tokens: int, ratio: int, kv_heads: int, row: int, programs: int
    ) -> Launch:
        """`row`: bytes of the larger of a K and a V row; `programs`: how many fill the chip."""
        group = power_of_2(ratio)
        rows, block_n = next(shape for bound, *shape in _SHAPES if row <= bound)
        block_t = max(1, 16 // group)  # 16 rows: the least that a tensor core takes
        if plan.max_query_len > block_t:
            block_t = max(1, rows // group)
        block_s, tiles = 0, plan.num_seqs
        if plan.max_query_len > block_t:
            block_s = max(16, power_of_2(plan.num_seqs))
            tiles = tokens // block_t + plan.num_seqs
        most_splits = min(32, -(-plan.max_context_len // (2 * block_n)))
        splits = power_of_2_below(max(1, min(most_splits, programs // (tiles * kv_heads))))
        return cls(
            group, block_t, block_s, tiles, splits, block_n, num_warps=8 if block_t * group > 64 else 4
        )


# Bytes of a row up to which, rows of a prefill tile, keys of a step: what fits registers and shared memory.
_SHAPES = ((256, 128, 64), (512, 64, 32), (1 << 30, 16, 32))


class PagedTritonAttention:
    """`AttentionBackend` on CUDA, for float32, bfloat16 and float16; any head dimensions and block size.

    `programs` is how many programs fill the chip; default: two for each multiprocessor. Raises RuntimeError
    without Triton.
    """

    def __init__(self, programs: int | None = None) -> None:
        if triton is None:
            raise RuntimeError(
                "paged attention on CUDA needs Triton, which is not installed: pip install triton"
            )
        self._programs = programs

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,
        plan: AttentionPlan,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.forward`. Enqueues two or three kernels and never waits for them.

        Rows of tokens that belong to no run hold anything. Raises ValueError on a layout or dtype that the
        kernels would misread.
        """
        _check(query, key, value, cache)
        tokens, heads, _ = query.shape
        out_THE = query.new_empty(tokens, heads, cache.v.shape[3])
        if tokens == 0:
            return out_THE
        _write_cache(key, value, cache, plan)
        kv_heads, row = cache.k.shape[1], max(cache.k.shape[3], cache.v.shape[3]) * cache.k.element_size()
        programs = self._programs or _fill(query.device)
        launch = Launch.choose(plan, tokens, heads // kv_heads, kv_heads, row, programs)
        # From the caching allocator, so that each captured graph owns its buffers and no stream shares them.
        parts_PTHE, lse_PTH = out_THE[None], out_THE
        if launch.splits > 1:
            parts_PTHE = out_THE.new_empty((launch.splits, *out_THE.shape), dtype=torch.float32)
            lse_PTH = parts_PTHE.new_empty(parts_PTHE.shape[:3])
        _launch_attend(query, cache, plan, launch, parts_PTHE, lse_PTH, scale, sliding_window, softcap, sinks)
        if launch.splits > 1:
            _join[(tokens * heads,)](
                parts_PTHE, lse_PTH, out_THE, parts_PTHE.stride(0), lse_PTH.stride(0),
                V_DIM=cache.v.shape[3], SPLITS=launch.splits, BLOCK_E=_dim_block(cache.v.shape[3]),
            )  # fmt: skip
        return out_THE


def _write_cache(key: torch.Tensor, value: torch.Tensor, cache: LayerCache, plan: AttentionPlan) -> None:
    _, kv_heads, block_size, k_dim = cache.k.shape
    v_dim = cache.v.shape[3]
    _write[(key.shape[0],)](
        key, value, cache.k, cache.v, plan.slot_mapping,
        *key.stride()[:2], *value.stride()[:2], *cache.k.stride()[:3], *cache.v.stride()[:3],
        KV_HEADS=kv_heads, K_DIM=k_dim, V_DIM=v_dim, BLOCK_SIZE=block_size,
        BLOCK_H=power_of_2(kv_heads), BLOCK_D=_dim_block(k_dim), BLOCK_E=_dim_block(v_dim),
    )  # fmt: skip


def _launch_attend(
    query: torch.Tensor,
    cache: LayerCache,
    plan: AttentionPlan,
    launch: Launch,
    parts_PTHE: torch.Tensor,
    lse_PTH: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    _, kv_heads, block_size, k_dim = cache.k.shape
    v_dim = cache.v.shape[3]
    _attend[(launch.tiles, kv_heads, launch.splits)](
        query, cache.k, cache.v, parts_PTHE, lse_PTH,
        plan.query_starts, plan.context_lens, plan.block_tables, query if sinks is None else sinks,
        plan.num_seqs, scale, softcap or 0.0, sliding_window or 0,
        *query.stride()[:2], *cache.k.stride()[:3], *cache.v.stride()[:3],
        *parts_PTHE.stride()[:2], lse_PTH.stride(0), plan.block_tables.stride(0),
        RATIO=query.shape[1] // kv_heads, GROUP=launch.group, K_DIM=k_dim, V_DIM=v_dim, BLOCK_SIZE=block_size,
        WINDOW=sliding_window is not None, SOFTCAP=softcap is not None, SINKS=sinks is not None,
        SPLITS=launch.splits, BLOCK_T=launch.block_t, BLOCK_N=launch.block_n,
        BLOCK_D=_dim_block(k_dim), BLOCK_E=_dim_block(v_dim), BLOCK_S=launch.block_s,
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",  # a float32 model stays one
        num_warps=launch.num_warps, num_stages=2,
    )  # fmt: skip


def _dim_block(dim: int) -> int:
    return max(16, power_of_2(dim))


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: LayerCache) -> None:
    tensors = (query, key, value, cache.k, cache.v)
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(
            f"query, key, value and cache differ in dtype: {[tensor.dtype for tensor in tensors]}"
        )
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError("the last dimension of query, key, value and cache must have stride 1")
    if query.shape[1] % cache.k.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads do not divide among {cache.k.shape[1]} KV heads")


@cache
def _fill(device: torch.device) -> int:
    """Programs that fill a device: two for each multiprocessor."""
    if device.type != "cuda":  # Triton's interpreter
        return 8
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count
