"""The seam between the LoRA layers and the kernels that apply adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from typing import Protocol

import torch

from server.lora.segments import Segments

SCRATCH_BYTES = 256 * 2**20


class Part(IntEnum):
    """What an adapter has of one module; a column of `ArenaView.offsets`. Compiled code has the same list."""

    A = 0  # [rank, in_features]
    B = 1  # [rank, out_features], with the scaling folded in
    GAIN = 2  # [out_features], on top of 1: what the base's output is multiplied by (DoRA, Liu et al. 2024)
    BIAS = 3  # [out_features]


@dataclass(frozen=True)
class ArenaView:
    """What kernels read of the arena.

    For slot s and module m, part p lies at `data[offsets[s, m, p]:]`, row-major. `ranks[s, m]` is 0 where
    there is no A and B, the offset of a gain or a bias is 0 where there is none: no part lies there. Every
    offset is a multiple of 64 bytes.
    """

    data: torch.Tensor  # [elements], dtype of the base model
    offsets: torch.Tensor  # [slots, modules, parts] int64, in elements
    ranks: torch.Tensor  # [slots, modules] int32


@dataclass(frozen=True)
class Modules:
    """One to three modules that read the same x, as neighbouring columns of the arena's tables.

    Their outputs stand side by side.
    """

    first: int  # its column
    widths: tuple[int, ...]  # outputs of each

    def each(self, y_TO: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Each module's column, and its outputs in those of all."""
        ends = accumulate(self.widths)
        for i, (end, width) in enumerate(zip(ends, self.widths, strict=True)):
            yield self.first + i, y_TO[:, end - width : end]


class Begun(Protocol):
    """What one step's adapters make of one x."""

    def finish(self, y_TO: torch.Tensor) -> None:
        """Bring it into the base's output, in place: [T, sum of the widths], rows contiguous.

        Only the rows of segments are touched.
        """
        ...


class LoraKernels(Protocol):
    """y = (1 + sum of w * gain) * Wx + sum of w * (B A x + bias), over the entries of each segment's mix.

    Chen et al. 2023 (SGMV). For one adapter of weight 1 that is (1 + gain) * (Wx + delta) + bias where its B
    holds the factor too, as PEFT's DoRA computes it.

    """

    def max_mix_rank(self, tokens: int) -> int:
        """Most that the ranks of one mix's adapters may add up to on a module, in steps of so many tokens.

        Within it no step needs more than SCRATCH_BYTES for x A^T, whatever its adapters' ranks are.
        """
        ...

    def prepare(self, segments: Segments) -> Segments:
        """The segments of a step on the host, with what these kernels add; called once before `begin`s.

        Where they add nothing, that is the segments themselves.
        """
        ...

    def begin(self, x_TI: torch.Tensor, modules: Modules, segments: Segments, arena: ArenaView) -> Begun:
        """Begin what does not need Wx. x_TI: [T, in_features], rows contiguous.

        Finished once, before anything else is begun. Both products are accumulated in float32; x A^T is kept
        in it too, or for long segments in x's dtype.
        """
        ...
