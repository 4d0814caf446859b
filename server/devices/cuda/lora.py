"""The LoRA kernels for CUDA, in Triton: shrink (x A^T) and expand (y += h B) over the segments of a step.

After Punica's SGMV (Chen et al. 2023) and S-LoRA's kernels for unequal ranks (Sheng et al. 2023). What is
particular here:

- Ranks are read on the device and every loop runs to the adapter's own rank: nothing is padded.
- The adapters of a token's mix share one row of the intermediate h, side by side: an entry of a segment
  owns the columns that follow those of the entries before it. Expand adds a whole mix in one pass over
  `out`, with no race and one rounding.
- Modules that read the same x (Q, K and V; gate and up) are one launch: each has its own columns of h and of
  `out`, and is another program of the grid.
- Shrink is split over `in_features` until the launch fills the chip. Each split stores its partial sum and
  expand adds them in a fixed order, so results do not change from run to run (no atomics).
- Grids follow from what the host knows (`num_tokens`, `max_tokens`, `num_segments`, shapes), and programs
  past the live contents return early, so a captured CUDA graph can replay with other contents. A replay
  may hold fewer segments than the capture: repeat the last value of `token_starts` and `entry_starts`.

Two paths. Rows, when no segment is longer than one token (decode): vector products, bound by the bytes of
A and B. Tiles, otherwise: up to BLOCK_T tokens of one segment at a time on the tensor cores, so that tokens
that share an adapter read it once.

Shape suffixes: T tokens, K in_features, R rank, O out_features, S splits, G segments, M modules.
"""

# Triton kernels have no Python types to state, and `triton.jit` is untyped:
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from server.devices.cuda.jit import jit, power_of_2, power_of_2_below, tile_of, tl, triton
from server.lora.kernels.interface import ArenaView
from server.lora.segments import Segments


@jit()
def _entry(slots, weights, offsets, ranks, e, module, n_modules):
    """Entry e of the step: offsets of A and B in the arena, rank, weight."""
    slot = tl.load(slots + e).to(tl.int64)
    where = slot * n_modules + module
    # 64 bytes of alignment (ArenaView) are 16 elements at least: loads of 16 bytes a thread
    a_offset = tl.multiple_of(tl.load(offsets + 2 * where), 16)
    b_offset = tl.multiple_of(tl.load(offsets + 2 * where + 1), 16)
    return a_offset, b_offset, tl.load(ranks + where), tl.load(weights + e)


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
def _shrink_rows(
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
def _expand_rows(
    out, h, data, offsets, ranks, token_starts, entry_starts, slots, weights,
    module, n_modules, width_0, width_1, width_2, out_stride, h_stride_s, h_stride_t, h_width,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """out_t += sum over entries and splits of h[s, t, m] B; grid (segments, blocks of all outputs)."""
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
    column = 0
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
    if column > 0:
        y_O = tl.sum(sum_RO, axis=0)
        if column > h_width:  # wider than h: no answer rather than a wrong one
            y_O += float("nan")
        to_O = out + token * out_stride + o_O
        y_O += tl.load(to_O, mask=o_O < out_features, other=0.0).to(tl.float32)
        tl.store(to_O, y_O.to(out.dtype.element_ty), mask=o_O < out_features)


@jit("module", "n_segments")
def _shrink_tiles(
    x, h, data, offsets, ranks, token_starts, entry_starts, slots, weights,
    module, n_modules, n_segments, in_features, x_stride, h_stride_s, h_stride_t, h_width, split_size,
    RANK_BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_shrink_rows`, for BLOCK_T tokens of one segment; grid (tiles, splits, M * rank blocks)."""
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
def _expand_tiles(
    out, h, data, offsets, ranks, token_starts, entry_starts, slots, weights,
    module, n_modules, n_segments, width_0, width_1, width_2, out_stride, h_stride_s, h_stride_t, h_width,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_G: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_expand_rows`, for BLOCK_T tokens of one segment; grid (tiles, blocks of all outputs).

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
    column = 0
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
    if column > 0:
        if column > h_width:  # wider than h: no answer rather than a wrong one
            sum_TO += float("nan")
        to_TO = out + (t_T * out_stride)[:, None] + o_O[None, :]
        mask_TO = (t_T < t_last)[:, None] & in_out_O
        sum_TO += tl.load(to_TO, mask=mask_TO, other=0.0).to(tl.float32)
        tl.store(to_TO, sum_TO.to(out.dtype.element_ty), mask=mask_TO)


@dataclass(frozen=True)
class Launch:
    """Block shapes and grid of one `apply`: a table and a few rules, from host-known bounds alone."""

    block_t: int  # tokens of a tile; 1: the rows path
    block_g: int  # 0: each segment is one tile; else a power of two over the number of segments
    tiles: int
    splits: int  # of in_features, a power of two
    split_size: int
    rank_blocks: int  # programs that share an adapter's rank in shrink
    block_k: int
    block_o: int

    @property
    def num_warps(self) -> int:
        return 8 if self.block_t == 64 else 4

    def output_blocks(self, widths: tuple[int, ...]) -> int:
        return sum(-(-width // self.block_o) for width in widths)

    @classmethod
    def choose(
        cls,
        segments: Segments,
        in_features: int,
        out_features: int,
        element_size: int,
        programs: int,
        modules: int = 1,
    ) -> Launch:
        """`programs`: how many shrink needs to fill the chip; `out_features`: those of the widest module."""
        if segments.max_tokens == 1:
            block_t, block_k, block_o = 1, 256, 256
        elif segments.max_tokens <= 16:
            block_t, block_k, block_o = 16, 256, 128
        else:
            block_t, block_k, block_o = 64, 128, 128
        if element_size == 4 and block_t > 1:  # operands of twice the size, in three parts (tf32x3)
            block_k, block_o = 64, 64
        block_g, tiles = 0, segments.num_segments
        if segments.max_tokens > block_t:
            block_g = max(16, power_of_2(segments.num_segments))
            tiles = segments.num_tokens // block_t + segments.num_segments
        block_k = min(block_k, max(16, power_of_2(in_features)))
        block_o = min(block_o, max(16, power_of_2(out_features)))
        tasks = tiles * modules
        most_splits = min(32, -(-in_features // block_k))
        splits = power_of_2_below(max(1, min(most_splits, programs // tasks)))
        split_size = -(-in_features // (splits * block_k)) * block_k
        rank_blocks = max(1, min(4, programs // (tasks * splits)))
        return cls(block_t, block_g, tiles, splits, split_size, rank_blocks, block_k, block_o)


class TritonKernels:
    """`LoraKernels` on CUDA, for float32, bfloat16 and float16.

    `max_mix_rank` is the width of h: the ranks of a mix's adapters on one module may sum up to it (h takes
    4 * tokens * splits * modules * max_mix_rank bytes while `apply` runs; only live columns are touched). A
    wider mix gives NaN. `programs` is how many programs fill the chip; default: four for each multiprocessor.
    Raises RuntimeError without Triton.
    """

    def __init__(self, max_mix_rank: int = 512, programs: int | None = None) -> None:
        if triton is None:
            raise RuntimeError("the CUDA kernels need Triton, which is not installed: pip install triton")
        self.max_mix_rank = max_mix_rank
        self._programs = programs

    def apply(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        module: int,
        segments: Segments,
        arena: ArenaView,
        widths: tuple[int, ...] | None = None,
    ) -> None:
        """See `LoraKernels.apply`. Enqueues two kernels on the current stream and never waits for them.

        Raises ValueError on a layout or dtype that the kernels would misread.
        """
        if segments.num_tokens == 0 or segments.num_entries == 0:
            return
        widths = widths or (out.shape[1],)
        _check(out, x, segments, arena, widths)
        programs = self._programs or _fill(x.device)
        launch = Launch.choose(
            segments, x.shape[1], max(widths), x.element_size(), programs, modules=len(widths)
        )
        # From the caching allocator, so that each captured graph owns its buffer and no stream shares one.
        h_STMR = torch.empty(
            (launch.splits, segments.num_tokens, len(widths), self.max_mix_rank),
            dtype=torch.float32,
            device=x.device,
        )
        if launch.block_t == 1:
            _apply_rows(out, x, h_STMR, module, segments, arena, widths, launch)
        else:
            _apply_tiles(out, x, h_STMR, module, segments, arena, widths, launch)


def _apply_rows(
    out: torch.Tensor,
    x: torch.Tensor,
    h_STMR: torch.Tensor,
    module: int,
    segments: Segments,
    arena: ArenaView,
    widths: tuple[int, ...],
    launch: Launch,
) -> None:
    tables = _tables(segments, arena)
    n_modules, h_strides = arena.ranks.shape[1], (*h_STMR.stride()[:2], h_STMR.shape[3])
    _shrink_rows[(launch.tiles, launch.splits, len(widths) * launch.rank_blocks)](
        x, h_STMR, *tables,
        module, n_modules, x.shape[1], x.stride(0), *h_strides, launch.split_size,
        RANK_BLOCKS=launch.rank_blocks, BLOCK_R=16, BLOCK_K=launch.block_k,
    )  # fmt: skip
    _expand_rows[(launch.tiles, launch.output_blocks(widths))](
        out, h_STMR, *tables,
        module, n_modules, *_three(widths), out.stride(0), *h_strides,
        SPLITS=launch.splits, BLOCK_R=16, BLOCK_O=launch.block_o, ALIGNED=_aligned(widths),
    )  # fmt: skip


def _apply_tiles(
    out: torch.Tensor,
    x: torch.Tensor,
    h_STMR: torch.Tensor,
    module: int,
    segments: Segments,
    arena: ArenaView,
    widths: tuple[int, ...],
    launch: Launch,
) -> None:
    tables = _tables(segments, arena)
    n_modules, h_strides = arena.ranks.shape[1], (*h_STMR.stride()[:2], h_STMR.shape[3])
    # a float32 model keeps float32 (three tf32 products); else operands have 8 or 11 bits and tf32 holds them
    precision = "tf32x3" if x.dtype == torch.float32 else "tf32"
    _shrink_tiles[(launch.tiles, launch.splits, len(widths) * launch.rank_blocks)](
        x, h_STMR, *tables,
        module, n_modules, segments.num_segments, x.shape[1], x.stride(0), *h_strides, launch.split_size,
        RANK_BLOCKS=launch.rank_blocks, BLOCK_T=launch.block_t, BLOCK_R=32, BLOCK_K=launch.block_k,
        BLOCK_G=launch.block_g, PRECISION=precision, num_stages=3, num_warps=launch.num_warps,
    )  # fmt: skip
    _expand_tiles[(launch.tiles, launch.output_blocks(widths))](
        out, h_STMR, *tables,
        module, n_modules, segments.num_segments, *_three(widths), out.stride(0), *h_strides,
        SPLITS=launch.splits, BLOCK_T=launch.block_t, BLOCK_R=32, BLOCK_O=launch.block_o,
        BLOCK_G=launch.block_g, ALIGNED=_aligned(widths), PRECISION=precision,
        num_stages=2, num_warps=launch.num_warps,
    )  # fmt: skip


def _tables(segments: Segments, arena: ArenaView) -> tuple[torch.Tensor, ...]:
    """The arguments that every kernel takes in the same order, from `data` to `weights`."""
    return (
        arena.data, arena.offsets, arena.ranks,
        segments.token_starts, segments.entry_starts, segments.slots, segments.weights,
    )  # fmt: skip


def _three(widths: tuple[int, ...]) -> tuple[int, ...]:
    return (*widths, 0, 0)[:3]


def _aligned(widths: tuple[int, ...]) -> bool:
    return all(width % 16 == 0 for width in widths)


def _check(
    out: torch.Tensor, x: torch.Tensor, segments: Segments, arena: ArenaView, widths: tuple[int, ...]
) -> None:
    if len(widths) > 3 or sum(widths) != out.shape[1]:
        raise ValueError(f"out has {out.shape[1]} columns for at most three modules of {widths}")
    if x.dtype != arena.data.dtype:
        raise ValueError(f"x is {x.dtype} but the arena holds {arena.data.dtype}")
    if x.stride(-1) != 1 or out.stride(-1) != 1:
        raise ValueError("the last dimension of x and out must have stride 1")
    if min(x.shape[0], out.shape[0]) < segments.num_tokens:
        raise ValueError(f"segments cover {segments.num_tokens} rows; x {x.shape[0]}, out {out.shape[0]}")
    if not (arena.offsets.is_contiguous() and arena.ranks.is_contiguous()):
        raise ValueError("the arena's tables must be contiguous")


@cache
def _fill(device: torch.device) -> int:
    """Programs that fill a device: four for each multiprocessor."""
    if device.type != "cuda":  # Triton's interpreter
        return 8
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count
