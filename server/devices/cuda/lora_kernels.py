"""The LoRA kernels for CUDA, in Triton; `lora.py` launches them.

Shrink makes h = x A^T, expand brings h B, gain and bias into the base's output, over the segments of a step:
one token of a segment at a time (`rows`), or a tile of tokens (`tiles`).

Shape suffixes: T tokens, K in_features, R rank, O out_features, S splits, G segments, M modules.
"""

# Triton kernels have no Python types to state, and `triton.jit` is untyped:
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from server.devices.cuda.jit import constexpr, jit, tile_of, tl
from server.lora.kernels.interface import Part

A, B, GAIN, BIAS = constexpr(Part.A), constexpr(Part.B), constexpr(Part.GAIN), constexpr(Part.BIAS)
PARTS = constexpr(len(Part))


@jit()
def _entry(slots, weights, offsets, ranks, e, module, n_modules):
    """Entry e of the step: offsets of A and B in the arena, rank, weight."""
    slot = tl.load(slots + e).to(tl.int64)
    where = slot * n_modules + module
    # 64 bytes of alignment (ArenaView) are 16 elements at least: loads of 16 bytes a thread
    a_offset = tl.multiple_of(tl.load(offsets + PARTS * where + A), 16)
    b_offset = tl.multiple_of(tl.load(offsets + PARTS * where + B), 16)
    return a_offset, b_offset, tl.load(ranks + where), tl.load(weights + e)


@jit()
def _add_parts(
    gain_O, bias_O, touched, data, offsets, slots, weights, e, module, n_modules, o_O, out_features
):
    """The sums of weight * gain and of weight * bias, with entry e's; `touched` counts what it has."""
    where = tl.load(slots + e).to(tl.int64) * n_modules + module
    weight = tl.load(weights + e)
    gain, bias = tl.load(offsets + PARTS * where + GAIN), tl.load(offsets + PARTS * where + BIAS)
    if gain != 0:
        part_O = tl.load(data + tl.multiple_of(gain, 16) + o_O, mask=o_O < out_features, other=0.0)
        gain_O += weight * part_O.to(tl.float32)
        touched += 1
    if bias != 0:
        part_O = tl.load(data + tl.multiple_of(bias, 16) + o_O, mask=o_O < out_features, other=0.0)
        bias_O += weight * part_O.to(tl.float32)
        touched += 1
    return gain_O, bias_O, touched


@jit()
def _outputs(block, width_0, width_1, width_2, BLOCK_O: tl.constexpr, ALIGNED: tl.constexpr):
    """Of modules side by side: which one a block of outputs is of, how many outputs it has, which of them is
    the block's first, and how many outputs come before its own.
    """
    blocks_0 = tl.cdiv(width_0, BLOCK_O)
    blocks_1 = blocks_0 + tl.cdiv(width_1, BLOCK_O)
    m, width, before, first = 0, width_0, 0, block
    if block >= blocks_1:
        m, width, before, first = 2, width_2, width_0 + width_1, block - blocks_1
    elif block >= blocks_0:
        m, width, before, first = 1, width_1, width_0, block - blocks_0
    if ALIGNED:  # which the compiler no longer sees, and needs for loads of 16 bytes
        width, before = tl.multiple_of(width, 16), tl.multiple_of(before, 16)
    return m, width, first * BLOCK_O, before


@jit("module")
def shrink_rows(
    x, h, data, offsets, ranks, token_starts, entry_starts, slots, weights,
    module, n_modules, in_features, x_stride, h_stride_s, h_stride_t, h_width, split_size,
    RANK_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h[s, t, m, columns] = weight * x_t A^T over split s of K; grid (segments, splits, M * rank blocks)."""
    g = tl.program_id(0)
    split = tl.program_id(1)
    m = tl.program_id(2) // RANK_BLOCKS
    module += m
    h += m * h_width
    token = tl.load(token_starts + g).to(tl.int64)
    if token >= tl.load(token_starts + g + 1):
        return
    k_first = split * split_size
    k_last = tl.minimum(k_first + split_size, in_features)
    column = 0
    for e in range(tl.load(entry_starts + g), tl.load(entry_starts + g + 1)):
        a_offset, _, rank, weight = _entry(slots, weights, offsets, ranks, e, module, n_modules)
        for r_first in range(tl.program_id(2) % RANK_BLOCKS * BLOCK_R, rank, RANK_BLOCKS * BLOCK_R):
            r_R = r_first + tl.arange(0, BLOCK_R)
            a_R = data + a_offset + r_R * in_features
            sum_RK = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
            for k in range(k_first, k_last, BLOCK_K):
                k_K = k + tl.arange(0, BLOCK_K)
                a_RK = tl.load(
                    a_R[:, None] + k_K[None, :],
                    mask=(r_R < rank)[:, None] & (k_K < k_last)[None, :],
                    other=0.0,
                )
                x_K = tl.load(x + token * x_stride + k_K, mask=k_K < k_last, other=0.0)
                sum_RK += a_RK.to(tl.float32) * x_K.to(tl.float32)[None, :]
            to_R = h + split * h_stride_s + token * h_stride_t + column + r_R
            tl.store(to_R, weight * tl.sum(sum_RK, axis=1), mask=(r_R < rank) & (column + r_R < h_width))
        column += rank


@jit("module")
def expand_rows(
    out, h, data, offsets, ranks, token_starts, entry_starts, slots, weights,
    module, n_modules, width_0, width_1, width_2, out_stride, h_stride_s, h_stride_t, h_width,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """out_t = (1 + gain) * out_t + bias + sum over entries and splits of h[s, t, m] B, gain and bias being
    weighted sums over entries too; grid (segments, blocks of all outputs).
    """
    g = tl.program_id(0)
    token = tl.load(token_starts + g).to(tl.int64)
    if token >= tl.load(token_starts + g + 1):
        return
    m, out_features, o_first, before = _outputs(tl.program_id(1), width_0, width_1, width_2, BLOCK_O, ALIGNED)
    module += m
    h += m * h_width
    out += before
    o_O = o_first + tl.arange(0, BLOCK_O)
    from_S = h + tl.arange(0, SPLITS) * h_stride_s + token * h_stride_t
    sum_RO = tl.zeros([BLOCK_R, BLOCK_O], dtype=tl.float32)
    gain_O = tl.zeros([BLOCK_O], dtype=tl.float32)
    bias_O = tl.zeros([BLOCK_O], dtype=tl.float32)
    column, touched = 0, 0
    for e in range(tl.load(entry_starts + g), tl.load(entry_starts + g + 1)):
        _, b_offset, rank, _ = _entry(slots, weights, offsets, ranks, e, module, n_modules)
        for r_first in range(0, rank, BLOCK_R):
            r_R = r_first + tl.arange(0, BLOCK_R)
            b_RO = tl.load(
                data + b_offset + (r_R * out_features)[:, None] + o_O[None, :],
                mask=(r_R < rank)[:, None] & (o_O < out_features)[None, :],
                other=0.0,
            )
            held_R = (r_R < rank) & (column + r_R < h_width)
            h_SR = tl.load(from_S[:, None] + column + r_R[None, :], mask=held_R[None, :], other=0.0)
            sum_RO += tl.sum(h_SR, axis=0)[:, None] * b_RO.to(tl.float32)
        column += rank
        touched += rank
        gain_O, bias_O, touched = _add_parts(
            gain_O, bias_O, touched, data, offsets, slots, weights, e, module, n_modules, o_O, out_features
        )
    if touched > 0:
        y_O = tl.sum(sum_RO, axis=0) + bias_O
        if column > h_width:  # wider than h: no answer rather than a wrong one
            y_O += float("nan")
        to_O = out + token * out_stride + o_O
        y_O += (1 + gain_O) * tl.load(to_O, mask=o_O < out_features, other=0.0).to(tl.float32)
        tl.store(to_O, y_O.to(out.dtype.element_ty), mask=o_O < out_features)


@jit("module", "n_segments")
def shrink_tiles(
    x, h, data, offsets, ranks, token_starts, entry_starts, slots, weights,
    module, n_modules, n_segments, in_features, x_stride, h_stride_s, h_stride_t, h_width, split_size,
    RANK_BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `shrink_rows`, for BLOCK_T tokens of one segment; grid (tiles, splits, M * rank blocks)."""
    split = tl.program_id(1)
    m = tl.program_id(2) // RANK_BLOCKS
    module += m
    h += m * h_width
    g, t_first, t_last = tile_of(token_starts, n_segments, tl.program_id(0), BLOCK_T, BLOCK_G)
    if t_first >= t_last:
        return
    t_T = t_first.to(tl.int64) + tl.arange(0, BLOCK_T)
    x_T = x + t_T * x_stride
    k_first = split * split_size
    k_last = tl.minimum(k_first + split_size, in_features)
    column = 0
    for e in range(tl.load(entry_starts + g), tl.load(entry_starts + g + 1)):
        a_offset, _, rank, weight = _entry(slots, weights, offsets, ranks, e, module, n_modules)
        for r_first in range(tl.program_id(2) % RANK_BLOCKS * BLOCK_R, rank, RANK_BLOCKS * BLOCK_R):
            r_R = r_first + tl.arange(0, BLOCK_R)
            a_R = data + a_offset + r_R * in_features
            sum_TR = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
            for k in range(k_first, k_last, BLOCK_K):
                k_K = k + tl.arange(0, BLOCK_K)
                in_split_K = (k_K < k_last)[None, :]
                x_TK = tl.load(
                    x_T[:, None] + k_K[None, :], mask=(t_T < t_last)[:, None] & in_split_K, other=0.0
                )
                a_RK = tl.load(
                    a_R[:, None] + k_K[None, :], mask=(r_R < rank)[:, None] & in_split_K, other=0.0
                )
                sum_TR = tl.dot(x_TK, tl.trans(a_RK), sum_TR, input_precision=PRECISION)
            to_TR = h + split * h_stride_s + (t_T * h_stride_t)[:, None] + column + r_R[None, :]
            held_R = (r_R < rank) & (column + r_R < h_width)
            tl.store(to_TR, weight * sum_TR, mask=(t_T < t_last)[:, None] & held_R[None, :])
        column += rank


@jit("module", "n_segments")
def expand_tiles(
    out, h, data, offsets, ranks, token_starts, entry_starts, slots, weights,
    module, n_modules, n_segments, width_0, width_1, width_2, out_stride, h_stride_s, h_stride_t, h_width,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_G: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `expand_rows`, for BLOCK_T tokens of one segment; grid (tiles, blocks of all outputs).

    h stays float32: B is widened, and at PRECISION tf32 a bfloat16 B loses nothing.
    """
    g, t_first, t_last = tile_of(token_starts, n_segments, tl.program_id(0), BLOCK_T, BLOCK_G)
    if t_first >= t_last:
        return
    m, out_features, o_first, before = _outputs(tl.program_id(1), width_0, width_1, width_2, BLOCK_O, ALIGNED)
    module += m
    h += m * h_width
    out += before
    t_T = t_first.to(tl.int64) + tl.arange(0, BLOCK_T)
    o_O = o_first + tl.arange(0, BLOCK_O)
    in_out_O = (o_O < out_features)[None, :]
    sum_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    gain_O = tl.zeros([BLOCK_O], dtype=tl.float32)
    bias_O = tl.zeros([BLOCK_O], dtype=tl.float32)
    column, touched = 0, 0
    for e in range(tl.load(entry_starts + g), tl.load(entry_starts + g + 1)):
        _, b_offset, rank, _ = _entry(slots, weights, offsets, ranks, e, module, n_modules)
        for r_first in range(0, rank, BLOCK_R):
            r_R = r_first + tl.arange(0, BLOCK_R)
            b_RO = tl.load(
                data + b_offset + (r_R * out_features)[:, None] + o_O[None, :],
                mask=(r_R < rank)[:, None] & in_out_O,
                other=0.0,
            )
            held_TR = (t_T < t_last)[:, None] & ((r_R < rank) & (column + r_R < h_width))[None, :]
            from_TR = h + (t_T * h_stride_t)[:, None] + column + r_R[None, :]
            h_TR = tl.load(from_TR, mask=held_TR, other=0.0)
            for split in range(1, SPLITS):
                h_TR += tl.load(from_TR + split * h_stride_s, mask=held_TR, other=0.0)
            sum_TO = tl.dot(h_TR, b_RO.to(tl.float32), sum_TO, input_precision=PRECISION)
        column += rank
        touched += rank
        gain_O, bias_O, touched = _add_parts(
            gain_O, bias_O, touched, data, offsets, slots, weights, e, module, n_modules, o_O, out_features
        )
    if touched > 0:
        sum_TO += bias_O[None, :]
        if column > h_width:  # wider than h: no answer rather than a wrong one
            sum_TO += float("nan")
        to_TO = out + (t_T * out_stride)[:, None] + o_O[None, :]
        mask_TO = (t_T < t_last)[:, None] & in_out_O
        sum_TO += (1 + gain_O)[None, :] * tl.load(to_TO, mask=mask_TO, other=0.0).to(tl.float32)
        tl.store(to_TO, sum_TO.to(out.dtype.element_ty), mask=mask_TO)
