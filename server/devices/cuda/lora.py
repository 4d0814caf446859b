"""LoRA on CUDA: shrink (x A^T), then expand (y with h B, gain and bias) over the segments of a step.

After Punica's SGMV (Chen et al. 2023) and S-LoRA's kernels for unequal ranks (Sheng et al. 2023). What is
particular here:

- Ranks are read on the device and every loop runs to the adapter's own rank: nothing is padded.
- The adapters of a token's mix share one row of the intermediate h, side by side: an entry of a segment
  owns the columns that follow those of the entries before it. Expand adds a whole mix in one pass over
  the output, with no race and one rounding.
- Modules that read the same x (Q, K and V; gate and up) are one launch: each has its own columns of h and of
  the output, and is another program of the grid.
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

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from server.devices.cuda.jit import power_of_2, power_of_2_below, triton
from server.devices.cuda.lora_kernels import expand_rows, expand_tiles, shrink_rows, shrink_tiles
from server.lora.kernels.interface import ArenaView, Begun, Modules
from server.lora.segments import Segments


@dataclass(frozen=True)
class Tiling:
    """Block shapes and grids of one `begin`: a table and a few rules, from host-known bounds alone."""

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
    ) -> Tiling:
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

    `max_mix_rank` is the width of h: the ranks of a mix's adapters on one module may sum up to it, however
    many tokens a step has (h takes 4 * tokens * splits * modules * max_mix_rank bytes from `begin` to
    `finish`; only live columns are touched, and splits fall as tokens grow). A wider mix gives NaN.
    `programs` is how many programs fill the chip; default: four for each multiprocessor. Raises RuntimeError
    without Triton.
    """

    def __init__(self, max_mix_rank: int = 512, programs: int | None = None) -> None:
        if triton is None:
            raise RuntimeError("the CUDA kernels need Triton, which is not installed: pip install triton")
        self._width = max_mix_rank
        self._programs = programs

    def max_mix_rank(self, tokens: int) -> int:
        """As much as there is room for in h."""
        return self._width

    def begin(self, x_TI: torch.Tensor, modules: Modules, segments: Segments, arena: ArenaView) -> Begun:
        """See `LoraKernels.begin`. Enqueues shrink on the current stream, `finish` expand; neither waits.

        Both raise ValueError on a layout or dtype that the kernels would misread.
        """
        _check(x_TI, modules, segments, arena)
        tiling = Tiling.choose(
            segments,
            x_TI.shape[1],
            max(modules.widths),
            x_TI.element_size(),
            self._programs or _fill(x_TI.device),
            modules=len(modules.widths),
        )
        # From the caching allocator, so that each captured graph owns its buffer and no stream shares one.
        h_STMR = torch.empty(
            (tiling.splits, segments.num_tokens, len(modules.widths), self._width),
            dtype=torch.float32,
            device=x_TI.device,
        )
        begun = _Begun(h_STMR, modules, segments, arena, tiling)
        begun.shrink(x_TI)
        return begun


@dataclass(frozen=True)
class _Begun:
    """See `Begun`; h is on its way."""

    h: torch.Tensor  # [splits, T, modules, max_mix_rank] float32
    modules: Modules
    segments: Segments
    arena: ArenaView
    tiling: Tiling

    def shrink(self, x: torch.Tensor) -> None:
        tiling, widths = self.tiling, self.modules.widths
        if not self._any:
            return
        grid = (tiling.tiles, tiling.splits, len(widths) * tiling.rank_blocks)
        sizes = x.shape[1], x.stride(0), *self._h_strides, tiling.split_size
        if tiling.block_t == 1:
            shrink_rows[grid](
                x, self.h, *self._tables, *self._columns, *sizes,
                RANK_BLOCKS=tiling.rank_blocks, BLOCK_R=16, BLOCK_K=tiling.block_k,
            )  # fmt: skip
        else:
            shrink_tiles[grid](
                x, self.h, *self._tables, *self._columns, self.segments.num_segments, *sizes,
                RANK_BLOCKS=tiling.rank_blocks, BLOCK_T=tiling.block_t, BLOCK_R=32, BLOCK_K=tiling.block_k,
                BLOCK_G=tiling.block_g, PRECISION=self._precision, num_stages=3, num_warps=tiling.num_warps,
            )  # fmt: skip

    def finish(self, y_TO: torch.Tensor) -> None:
        tiling, widths = self.tiling, self.modules.widths
        if not self._any:
            return
        _check_output(y_TO, self.modules, self.segments)
        grid = (tiling.tiles, tiling.output_blocks(widths))
        sizes = *(*widths, 0, 0)[:3], y_TO.stride(0), *self._h_strides
        aligned = all(width % 16 == 0 for width in widths)
        if tiling.block_t == 1:
            expand_rows[grid](
                y_TO, self.h, *self._tables, *self._columns, *sizes,
                SPLITS=tiling.splits, BLOCK_R=16, BLOCK_O=tiling.block_o, ALIGNED=aligned,
            )  # fmt: skip
        else:
            expand_tiles[grid](
                y_TO, self.h, *self._tables, *self._columns, self.segments.num_segments, *sizes,
                SPLITS=tiling.splits, BLOCK_T=tiling.block_t, BLOCK_R=32, BLOCK_O=tiling.block_o,
                BLOCK_G=tiling.block_g, ALIGNED=aligned, PRECISION=self._precision,
                num_stages=2, num_warps=tiling.num_warps,
            )  # fmt: skip

    @property
    def _any(self) -> bool:
        return self.segments.num_tokens > 0 and self.segments.num_entries > 0

    @property
    def _tables(self) -> tuple[torch.Tensor, ...]:
        """The arguments that every kernel takes in the same order, from `data` to `weights`."""
        segments, arena = self.segments, self.arena
        return (
            arena.data, arena.offsets, arena.ranks,
            segments.token_starts, segments.entry_starts, segments.slots, segments.weights,
        )  # fmt: skip

    @property
    def _columns(self) -> tuple[int, int]:
        """Of the arena's tables: the first module's, and how many there are."""
        return self.modules.first, self.arena.ranks.shape[1]

    @property
    def _h_strides(self) -> tuple[int, int, int]:
        """From split to split and from token to token, and the width of a module."""
        return self.h.stride(0), self.h.stride(1), self.h.shape[3]

    @property
    def _precision(self) -> str:
        """A float32 model keeps float32 (three tf32 products); else tf32 holds the operands' 8 or 11 bits."""
        return "tf32x3" if self.arena.data.dtype == torch.float32 else "tf32"


def _check(x: torch.Tensor, modules: Modules, segments: Segments, arena: ArenaView) -> None:
    if not 1 <= len(modules.widths) <= 3:
        raise ValueError(f"{len(modules.widths)} modules at once, where three are the most")
    if modules.first + len(modules.widths) > arena.ranks.shape[1]:
        raise ValueError(f"the arena's tables have {arena.ranks.shape[1]} columns: none for the last module")
    if x.dtype != arena.data.dtype:
        raise ValueError(f"x is {x.dtype} but the arena holds {arena.data.dtype}")
    if x.stride(-1) != 1:
        raise ValueError("the last dimension of x must have stride 1")
    if x.shape[0] < segments.num_tokens:
        raise ValueError(f"segments cover {segments.num_tokens} rows, x has {x.shape[0]}")
    if not (arena.offsets.is_contiguous() and arena.ranks.is_contiguous()):
        raise ValueError("the arena's tables must be contiguous")


def _check_output(y: torch.Tensor, modules: Modules, segments: Segments) -> None:
    if sum(modules.widths) != y.shape[1]:
        raise ValueError(f"y has {y.shape[1]} columns for modules of {modules.widths}")
    if y.stride(-1) != 1:
        raise ValueError("the last dimension of y must have stride 1")
    if y.shape[0] < segments.num_tokens:
        raise ValueError(f"segments cover {segments.num_tokens} rows, y has {y.shape[0]}")


@cache
def _fill(device: torch.device) -> int:
    """Programs that fill a device: four for each multiprocessor."""
    if device.type != "cuda":  # Triton's interpreter
        return 8
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count
