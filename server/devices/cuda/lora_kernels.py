"""The LoRA kernels for CUDA, in Triton; `lora.py` launches them.

Shrink makes h = x A^T, expand brings h B, gain and bias into the base's output, over the items of a step
(`lora_work.py`): one token each (`rows`), or a tile of tokens (`tiles`).

Programs are as many as fill the chip, however many items a step has room for, and share its tasks out among
themselves. How finely an item is split follows from the items there are, which is read on the device: so a
captured graph splits its work as well for few items as for many.

Shape suffixes: T tokens, K in_features, R rank, O out_features, S splits.
"""

# Triton kernels have no Python types to state, and `triton.jit` is untyped:
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from server.devices.cuda.jit import after_the_last, constexpr, jit, kernel, tl
from server.lora.kernels.interface import Part

A, B, GAIN, BIAS = constexpr(Part.A), constexpr(Part.B), constexpr(Part.GAIN), constexpr(Part.BIAS)
PARTS = constexpr(len(Part))

# int arguments whose value never recompiles
COUNTS = ("module", "modules", "programs", "most_splits")


@jit()
def _shares(live, modules, in_features, programs, most_splits, BLOCK_K: tl.constexpr):
    """How shrink's work is shared: splits of K, features of each, programs that share an adapter's rank."""
    tasks = tl.maximum(live * modules, 1)
    splits = tl.minimum(tl.minimum(most_splits, tl.cdiv(in_features, BLOCK_K)), programs // tasks)
    splits = tl.maximum(splits, 1)
    split_size = tl.cdiv(in_features, splits * BLOCK_K) * BLOCK_K
    splits = tl.cdiv(in_features, split_size)
    return splits, split_size, tl.minimum(4, tl.maximum(1, programs // (tasks * splits)))


@jit()
def _part(task, live, modules, splits, split_size, in_features):
    """What of an item's shrink is this task: its module, its split and features [k, k_last) of it, and which
    of the programs that share the adapters' ranks it is."""
    m, split = task // live % modules, task // (live * modules) % splits
    k_first = split * split_size
    k_last = tl.minimum(k_first + split_size, in_features)
    return m, split, k_first, k_last, task // (live * modules * splits)


@jit()
def _item(items, i):
    """Item i of the step: first token, tokens, slot and weight of its first entry, its entries [e, e_end)."""
    row = items + 8 * (1 + i)
    weight = tl.load(row + 3).to(tl.float32, bitcast=True)
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), weight, tl.load(row + 4), tl.load(row + 5)


@jit()
def _next(slots, weights, e, e_end):
    """Slot and weight of the entry after e, if there is one: known before e's own work is done."""
    more = e + 1 < e_end
    return tl.load(slots + e + 1, mask=more, other=0), tl.load(weights + e + 1, mask=more, other=0.0)


@jit()
def _place(offsets, slot, module, n_modules, PART: tl.constexpr):
    """Where a part lies in the arena, 0: nowhere."""
    # 64 bytes of alignment (ArenaView) are 16 elements at least: loads of 16 bytes a thread
    return tl.multiple_of(tl.load(offsets + PARTS * (slot.to(tl.int64) * n_modules + module) + PART), 16)


@jit()
def _rank(ranks, slot, module, n_modules):
    return tl.load(ranks + slot.to(tl.int64) * n_modules + module)


@jit()
def _extent(offsets, ranks, slots, slot, e, e_end, module, n_modules):
    """Columns of h that an item's adapters take, and whether they do anything to the module at all."""
    columns, touched = 0, 0
    for _ in range(e, e_end):
        columns += _rank(ranks, slot, module, n_modules)
        parts = _place(offsets, slot, module, n_modules, GAIN) + _place(
            offsets, slot, module, n_modules, BIAS
        )
        touched |= parts != 0
        e += 1
        slot = tl.load(slots + e, mask=e < e_end, other=0)
    return columns, (columns > 0) | (touched != 0)


@jit()
def _add_parts(gain_O, bias_O, data, offsets, slot, weight, module, n_modules, o_O, out_features):
    """The sums of weight * gain and of weight * bias, with one entry's."""
    gain = _place(offsets, slot, module, n_modules, GAIN)
    bias = _place(offsets, slot, module, n_modules, BIAS)
    if gain != 0:
        part_O = tl.load(data + gain + o_O, mask=o_O < out_features, other=0.0)
        gain_O += weight * part_O.to(tl.float32)
    if bias != 0:
        part_O = tl.load(data + bias + o_O, mask=o_O < out_features, other=0.0)
        bias_O += weight * part_O.to(tl.float32)
    return gain_O, bias_O


@jit()
def _blocks(width_0, width_1, width_2, BLOCK_O: tl.constexpr):
    """Blocks of outputs of modules side by side."""
    return tl.cdiv(width_0, BLOCK_O) + tl.cdiv(width_1, BLOCK_O) + tl.cdiv(width_2, BLOCK_O)


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


@kernel(*COUNTS)
def shrink_rows(
    x, h, data, offsets, ranks, items, slots, weights,
    module, n_modules, modules, in_features, programs, most_splits,
    x_stride, h_stride_s, h_stride_t, h_width,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h[s, t, m, columns] = weight * x_t A^T over split s of K."""
    if PDL:
        after_the_last()
    live = tl.load(items)
    splits, split_size, sharers = _shares(live, modules, in_features, programs, most_splits, BLOCK_K)
    for task in range(tl.program_id(0), live * modules * splits * sharers, tl.num_programs(0)):
        t, _, slot, weight, e_first, e_end = _item(items, task % live)
        m, split, k_first, k_last, sharer = _part(task, live, modules, splits, split_size, in_features)
        from_x, to_h = x + t.to(tl.int64) * x_stride, h + t.to(tl.int64) * h_stride_t + m * h_width
        to_h += split * h_stride_s
        column = 0
        for e in range(e_first, e_end):
            next_slot, next_weight = _next(slots, weights, e, e_end)
            rank = _rank(ranks, slot, module + m, n_modules)
            from_a = data + _place(offsets, slot, module + m, n_modules, A)
            for r_first in range(sharer * BLOCK_R, rank, sharers * BLOCK_R):
                r_R = r_first + tl.arange(0, BLOCK_R)
                sum_RK = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
                for k in tl.range(k_first, k_last, BLOCK_K, num_stages=STAGES):
                    k_K = k + tl.arange(0, BLOCK_K)
                    a_RK = tl.load(
                        from_a + (r_R * in_features)[:, None] + k_K[None, :],
                        mask=(r_R < rank)[:, None] & (k_K < k_last)[None, :],
                        other=0.0,
                    )
                    x_K = tl.load(from_x + k_K, mask=k_K < k_last, other=0.0)
                    sum_RK += a_RK.to(tl.float32) * x_K.to(tl.float32)[None, :]
                held_R = (r_R < rank) & (column + r_R < h_width)
                tl.store(to_h + column + r_R, weight * tl.sum(sum_RK, axis=1), mask=held_R)
            column += rank
            slot, weight = next_slot, next_weight


@kernel(*COUNTS)
def expand_rows(
    out, h, data, offsets, ranks, items, slots, weights,
    module, n_modules, modules, in_features, programs, most_splits,
    width_0, width_1, width_2, out_stride, h_stride_s, h_stride_t, h_width,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
    ALIGNED: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out_t = (1 + gain) * out_t + bias + sum over entries and splits of h[s, t, m] B, gain and bias being
    weighted sums over entries too. `BLOCK_S` splits at most.
    """
    if PDL:
        after_the_last()
    live = tl.load(items)
    splits, _, _ = _shares(live, modules, in_features, programs, most_splits, BLOCK_K)
    s_S = tl.arange(0, BLOCK_S)
    tasks = live * _blocks(width_0, width_1, width_2, BLOCK_O)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        t, _, slot, weight, e_first, e_end = _item(items, task % live)
        m, out_features, o_first, before = _outputs(task // live, width_0, width_1, width_2, BLOCK_O, ALIGNED)
        columns, touched = _extent(offsets, ranks, slots, slot, e_first, e_end, module + m, n_modules)
        if touched:
            o_O = o_first + tl.arange(0, BLOCK_O)
            to_O = out + t.to(tl.int64) * out_stride + before + o_O
            y_O = tl.load(to_O, mask=o_O < out_features, other=0.0)  # on its way while the rest is computed
            from_S = h + s_S * h_stride_s + t.to(tl.int64) * h_stride_t + m * h_width
            added_O = tl.zeros([BLOCK_O], dtype=tl.float32)
            gain_O = tl.zeros([BLOCK_O], dtype=tl.float32)
            bias_O = tl.zeros([BLOCK_O], dtype=tl.float32)
            column = 0
            for e in range(e_first, e_end):
                next_slot, next_weight = _next(slots, weights, e, e_end)
                rank = _rank(ranks, slot, module + m, n_modules)
                from_b = data + _place(offsets, slot, module + m, n_modules, B)
                for r_first in tl.range(0, rank, BLOCK_R, num_stages=STAGES):
                    r_R = r_first + tl.arange(0, BLOCK_R)
                    b_RO = tl.load(
                        from_b + (r_R * out_features)[:, None] + o_O[None, :],
                        mask=(r_R < rank)[:, None] & (o_O < out_features)[None, :],
                        other=0.0,
                    )
                    held_R = (r_R < rank) & (column + r_R < h_width)
                    held_SR = (s_S < splits)[:, None] & held_R[None, :]
                    h_SR = tl.load(from_S[:, None] + column + r_R[None, :], mask=held_SR, other=0.0)
                    added_O += tl.sum(tl.sum(h_SR, axis=0)[:, None] * b_RO.to(tl.float32), axis=0)
                gain_O, bias_O = _add_parts(
                    gain_O, bias_O, data, offsets, slot, weight, module + m, n_modules, o_O, out_features
                )
                column += rank
                slot, weight = next_slot, next_weight
            added_O += bias_O
            if columns > h_width:  # wider than h: no answer rather than a wrong one
                added_O += float("nan")
            added_O += (1 + gain_O) * y_O.to(tl.float32)
            tl.store(to_O, added_O.to(out.dtype.element_ty), mask=o_O < out_features)


@kernel(*COUNTS)
def shrink_tiles(
    x, h, data, offsets, ranks, items, slots, weights,
    module, n_modules, modules, in_features, programs, most_splits,
    x_stride, h_stride_s, h_stride_t, h_width,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """As `shrink_rows`, for up to BLOCK_T tokens of one segment."""
    if PDL:
        after_the_last()
    live = tl.load(items)
    splits, split_size, sharers = _shares(live, modules, in_features, programs, most_splits, BLOCK_K)
    for task in range(tl.program_id(0), live * modules * splits * sharers, tl.num_programs(0)):
        t_first, tokens, slot, weight, e_first, e_end = _item(items, task % live)
        m, split, k_first, k_last, sharer = _part(task, live, modules, splits, split_size, in_features)
        t_T = t_first.to(tl.int64) + tl.arange(0, BLOCK_T)
        real_T = t_T < t_first + tokens
        to_T = h + t_T * h_stride_t + m * h_width + split * h_stride_s
        column = 0
        for e in range(e_first, e_end):
            next_slot, next_weight = _next(slots, weights, e, e_end)
            rank = _rank(ranks, slot, module + m, n_modules)
            from_a = data + _place(offsets, slot, module + m, n_modules, A)
            for r_first in range(sharer * BLOCK_R, rank, sharers * BLOCK_R):
                r_R = r_first + tl.arange(0, BLOCK_R)
                sum_TR = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
                for k in range(k_first, k_last, BLOCK_K):
                    k_K = k + tl.arange(0, BLOCK_K)
                    in_split_K = (k_K < k_last)[None, :]
                    x_TK = tl.load(
                        x + (t_T * x_stride)[:, None] + k_K[None, :],
                        mask=real_T[:, None] & in_split_K,
                        other=0.0,
                    )
                    a_RK = tl.load(
                        from_a + (r_R * in_features)[:, None] + k_K[None, :],
                        mask=(r_R < rank)[:, None] & in_split_K,
                        other=0.0,
                    )
                    sum_TR = tl.dot(x_TK, tl.trans(a_RK), sum_TR, input_precision=PRECISION)
                held_R = (r_R < rank) & (column + r_R < h_width)
                to_TR = to_T[:, None] + column + r_R[None, :]
                tl.store(to_TR, weight * sum_TR, mask=real_T[:, None] & held_R[None, :])
            column += rank
            slot, weight = next_slot, next_weight


@kernel(*COUNTS)
def expand_tiles(
    out, h, data, offsets, ranks, items, slots, weights,
    module, n_modules, modules, in_features, programs, most_splits,
    width_0, width_1, width_2, out_stride, h_stride_s, h_stride_t, h_width,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `expand_rows`, for up to BLOCK_T tokens of one segment.

    h stays float32: B is widened, and at PRECISION tf32 a bfloat16 B loses nothing.
    """
    if PDL:
        after_the_last()
    live = tl.load(items)
    splits, _, _ = _shares(live, modules, in_features, programs, most_splits, BLOCK_K)
    tasks = live * _blocks(width_0, width_1, width_2, BLOCK_O)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        t_first, tokens, slot, weight, e_first, e_end = _item(items, task % live)
        m, out_features, o_first, before = _outputs(task // live, width_0, width_1, width_2, BLOCK_O, ALIGNED)
        columns, touched = _extent(offsets, ranks, slots, slot, e_first, e_end, module + m, n_modules)
        if touched:
            t_T = t_first.to(tl.int64) + tl.arange(0, BLOCK_T)
            real_T = t_T < t_first + tokens
            o_O = o_first + tl.arange(0, BLOCK_O)
            in_out_O = (o_O < out_features)[None, :]
            from_T = h + t_T * h_stride_t + m * h_width
            sum_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
            gain_O = tl.zeros([BLOCK_O], dtype=tl.float32)
            bias_O = tl.zeros([BLOCK_O], dtype=tl.float32)
            column = 0
            for e in range(e_first, e_end):
                next_slot, next_weight = _next(slots, weights, e, e_end)
                rank = _rank(ranks, slot, module + m, n_modules)
                from_b = data + _place(offsets, slot, module + m, n_modules, B)
                for r_first in range(0, rank, BLOCK_R):
                    r_R = r_first + tl.arange(0, BLOCK_R)
                    b_RO = tl.load(
                        from_b + (r_R * out_features)[:, None] + o_O[None, :],
                        mask=(r_R < rank)[:, None] & in_out_O,
                        other=0.0,
                    )
                    held_TR = real_T[:, None] & ((r_R < rank) & (column + r_R < h_width))[None, :]
                    from_TR = from_T[:, None] + column + r_R[None, :]
                    h_TR = tl.load(from_TR, mask=held_TR, other=0.0)
                    for split in range(1, splits):
                        h_TR += tl.load(from_TR + split * h_stride_s, mask=held_TR, other=0.0)
                    sum_TO = tl.dot(h_TR, b_RO.to(tl.float32), sum_TO, input_precision=PRECISION)
                gain_O, bias_O = _add_parts(
                    gain_O, bias_O, data, offsets, slot, weight, module + m, n_modules, o_O, out_features
                )
                column += rank
                slot, weight = next_slot, next_weight
            sum_TO += bias_O[None, :]
            if columns > h_width:  # wider than h: no answer rather than a wrong one
                sum_TO += float("nan")
            to_TO = out + (t_T * out_stride)[:, None] + before + o_O[None, :]
            mask_TO = real_T[:, None] & in_out_O
            sum_TO += (1 + gain_O)[None, :] * tl.load(to_TO, mask=mask_TO, other=0.0).to(tl.float32)
            tl.store(to_TO, sum_TO.to(out.dtype.element_ty), mask=mask_TO)
