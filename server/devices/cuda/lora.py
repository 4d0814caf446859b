"""LoRA on CUDA: shrink (x A^T), then expand (y with h B, gain and bias) over the segments of a step.

After Punica's SGMV (Chen et al. 2023) and S-LoRA's kernels for unequal ranks (Sheng et al. 2023). What is
particular here:

- Ranks are read on the device and every loop runs to the adapter's own rank: nothing is padded.
- The adapters of a token's mix share one row of the intermediate h, side by side: an entry of a segment
  owns the columns that follow those of the entries before it. Expand adds a whole mix in one pass over
  the output, with no race and one rounding.
- Modules that read the same x (Q, K and V; gate and up) are one launch: each has its own columns of h and of
  the output, and its own tasks.
- Shrink is split over `in_features` until its tasks fill the chip. Each split stores its partial sum and
  expand adds them in a fixed order, so results do not change from run to run (no atomics).
- What is done is read on the device, from a list of items that the host makes once a step (`prepare`). Grids
  are as many programs as fill the chip, so a captured CUDA graph can replay with other contents, and splits
  its work for what there is, not for what there is room for.

Two paths. Rows, when no segment is longer than one token (decode): vector products, bound by the bytes of
A and B. Tiles, otherwise: up to BLOCK_T tokens of one segment at a time on the tensor cores, so that tokens
that share an adapter read it once.

Shape suffixes: T tokens, K in_features, R rank, O out_features, S splits, M modules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch

from server.devices.cuda.jit import launch_options, power_of_2, triton
from server.devices.cuda.levers import USUAL, Levers
from server.devices.cuda.lora_kernels import expand_rows, expand_tiles, shrink_rows, shrink_tiles
from server.devices.cuda.lora_work import ROWS, TILES, longest_of, lora_work
from server.devices.cuda.side_stream import SideStream
from server.lora.kernels.interface import ArenaView, Begun, Modules
from server.lora.segments import Segments, SegmentWork

_MOST_SPLITS = 32
_MOST_H_BYTES = 2**26  # of h, where it can be less by fewer splits
_MOST_SHARERS = 4  # programs that share an adapter's rank
# Room for items from which shrink runs beside the base's product. A fork and a join cost the device some 1.5
# us; alone, shrink of one item of rank 16 takes 2.5, of which its neighbour would hide no more than 1.
_LEAST_BESIDE = 8


@dataclass(frozen=True)
class Tiling:
    """Block shapes and grids of one `begin`: a table and a few rules, from host-known bounds alone."""

    block_t: int  # tokens of a tile; 1: the rows path
    most_splits: int  # of in_features
    block_k: int
    block_r: int  # of B
    block_o: int
    shrink_programs: int
    expand_programs: int

    @property
    def num_warps(self) -> int:
        return 8 if self.block_t == TILES else 4

    @classmethod
    @lru_cache(maxsize=1024)  # the same for all layers of a step, and of many steps
    def choose(
        cls,
        longest: int,
        room: int,
        tokens: int,
        in_features: int,
        widths: tuple[int, ...],
        element_size: int,
        programs: int,
        h_token_bytes: int,
    ) -> Tiling:
        """`longest`, `room`: of the work; `programs`: how many fill the chip; `h_token_bytes`: of a token and
        split in h.
        """
        widest = max(16, power_of_2(max(widths)))
        if longest == ROWS:
            # 16 KB of B at a time in bfloat16, summed over ranks within a thread; less where items are few
            wide = room * sum(widths) >= 1024 * (programs // 4)
            block_k, block_r, block_o = 256, *((8, 1024) if wide and widest >= 1024 else (16, 256))
        elif longest < TILES:
            block_k, block_r, block_o = 256, 32, 128
        else:
            block_k, block_r, block_o = 128, 32, 128
        if element_size == 4 and longest > ROWS:  # operands of twice the size, in three parts (tf32x3)
            block_k, block_o = 32 if longest == TILES else 64, 64
        block_k, block_o = min(block_k, max(16, power_of_2(in_features))), min(block_o, widest)
        splits = min(_MOST_SPLITS, -(-in_features // block_k), _MOST_H_BYTES // (tokens * h_token_bytes))
        most_splits = max(1, splits)
        tasks = room * len(widths) * most_splits * _MOST_SHARERS
        blocks = room * sum(-(-width // block_o) for width in widths)
        return cls(
            longest, most_splits, block_k, block_r, block_o, min(programs, tasks), min(programs, blocks)
        )


class TritonKernels:
    """`LoraKernels` on CUDA, for float32, bfloat16 and float16.

    `max_mix_rank` is the width of h: the ranks of a mix's adapters on one module may sum up to it, however
    many tokens a step has (h takes 4 * tokens * splits * modules * max_mix_rank bytes from `begin` to
    `finish`; only live columns are touched, and splits fall as tokens grow). A wider mix gives NaN.
    `programs` is how many programs fill the chip; default: four for each multiprocessor. Raises RuntimeError
    without Triton.

    In captured steps with room for `_LEAST_BESIDE` items and more, shrink runs on a stream of its own, beside
    what the caller enqueues between `begin` and `finish`: the base's product.
    """

    def __init__(self, max_mix_rank: int = 512, programs: int | None = None, levers: Levers = USUAL) -> None:
        if triton is None:
            raise RuntimeError("the CUDA kernels need Triton, which is not installed: pip install triton")
        self._width = max_mix_rank
        self._programs = programs
        self._levers, self._side = levers, SideStream()

    def max_mix_rank(self, tokens: int) -> int:
        """As much as there is room for in h."""
        return self._width

    def prepare(self, segments: Segments) -> Segments:
        """See `LoraKernels.prepare`: with the list of items."""
        return replace(segments, work=lora_work(segments, longest_of(segments.max_tokens)))

    def begin(self, x_TI: torch.Tensor, modules: Modules, segments: Segments, arena: ArenaView) -> Begun:
        """See `LoraKernels.begin`. Enqueues shrink on the current stream, `finish` expand; neither waits.

        Both raise ValueError on a layout or dtype that the kernels would misread, and on segments that were
        not prepared.
        """
        work = segments.work
        if work is None:
            raise ValueError("the segments have no list of items: `prepare` makes it")
        _check(x_TI, modules, segments, arena)
        programs, count = self._programs or _fill(x_TI.device), len(modules.widths)
        tiling = Tiling.choose(
            work.longest,
            work.room,
            max(1, segments.num_tokens),
            x_TI.shape[1],
            modules.widths,
            x_TI.element_size(),
            programs,
            h_token_bytes=4 * count * self._width,
        )
        # From the caching allocator, so that each captured graph owns its buffer and no stream shares one.
        h_STMR = torch.empty(
            (tiling.most_splits, segments.num_tokens, count, self._width),
            dtype=torch.float32,
            device=x_TI.device,
        )
        beside = self._levers.shrink_beside and work.room >= _LEAST_BESIDE and self._side.is_open
        side = self._side if beside else None
        dependent = self._levers.dependent_launch
        begun = _Begun(x_TI, h_STMR, modules, segments, work, arena, tiling, programs, side, dependent)
        begun.start()
        return begun


@dataclass(frozen=True)
class _Begun:
    """See `Begun`; h is on its way."""

    x: torch.Tensor  # held until all is done: a stream beside may still read it
    h: torch.Tensor  # [splits, T, modules, max_mix_rank] float32
    modules: Modules
    segments: Segments
    work: SegmentWork
    arena: ArenaView
    tiling: Tiling
    programs: int
    side: SideStream | None  # that shrink runs on
    dependent: bool

    def start(self) -> None:
        if not self._any:
            return
        if self.side is None:
            self._shrink()
            return
        with self.side.fork():
            self._shrink()

    def _shrink(self) -> None:
        tiling, x = self.tiling, self.x
        grid, strides = (tiling.shrink_programs,), (x.stride(0), *self._h_strides)
        if tiling.block_t == ROWS:
            shrink_rows[grid](
                x, self.h, *self._tables, *self._counts, *strides,
                BLOCK_R=16, BLOCK_K=tiling.block_k, STAGES=3, **self._options,
            )  # fmt: skip
        else:
            shrink_tiles[grid](
                x, self.h, *self._tables, *self._counts, *strides,
                BLOCK_T=tiling.block_t, BLOCK_R=32, BLOCK_K=tiling.block_k, PRECISION=self._precision,
                num_stages=3, num_warps=tiling.num_warps, **self._options,
            )  # fmt: skip

    def finish(self, y_TO: torch.Tensor) -> None:
        tiling, widths = self.tiling, self.modules.widths
        if not self._any:
            return
        _check_output(y_TO, self.modules, self.segments)
        if self.side is not None:
            self.side.join()
        grid = (tiling.expand_programs,)
        sizes = *(*widths, 0, 0)[:3], y_TO.stride(0), *self._h_strides
        aligned = all(width % 16 == 0 for width in widths)
        if tiling.block_t == ROWS:
            expand_rows[grid](
                y_TO, self.h, *self._tables, *self._counts, *sizes,
                BLOCK_S=_MOST_SPLITS, BLOCK_R=tiling.block_r, BLOCK_K=tiling.block_k, BLOCK_O=tiling.block_o,
                ALIGNED=aligned, STAGES=2 if aligned else 1,  # values that lie anyhow are copied one by one
                **self._options,
            )  # fmt: skip
        else:
            expand_tiles[grid](
                y_TO, self.h, *self._tables, *self._counts, *sizes,
                BLOCK_T=tiling.block_t, BLOCK_R=tiling.block_r, BLOCK_K=tiling.block_k,
                BLOCK_O=tiling.block_o, ALIGNED=aligned, PRECISION=self._precision,
                num_stages=2, num_warps=tiling.num_warps, **self._options,
            )  # fmt: skip

    @property
    def _options(self) -> dict[str, bool]:
        """Of a launch: one beside a fork or a join has more than one to wait for."""
        return launch_options(dependent=self.dependent and self.side is None)

    @property
    def _any(self) -> bool:
        return self.segments.num_tokens > 0 and self.work.room > 0

    @property
    def _tables(self) -> tuple[torch.Tensor, ...]:
        """The arguments that every kernel takes in the same order, from `data` to `weights`."""
        segments, arena = self.segments, self.arena
        return arena.data, arena.offsets, arena.ranks, self.work.items, segments.slots, segments.weights

    @property
    def _counts(self) -> tuple[int, ...]:
        """And from `module` to `most_splits`: what both kernels share their tasks out by."""
        modules = self.modules
        return (
            modules.first, self.arena.ranks.shape[1], len(modules.widths),
            self.x.shape[1], self.programs, self.tiling.most_splits,
        )  # fmt: skip

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
