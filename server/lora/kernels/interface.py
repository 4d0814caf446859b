"""The seam between the LoRA layers and the kernels that apply adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from server.lora.segments import Segments


@dataclass(frozen=True)
class ArenaView:
    """What kernels read of the arena.

    For slot s and module m, A lies at `data[offsets[s, m, 0]:]` as [rank, in_features] and B at
    `data[offsets[s, m, 1]:]` as [rank, out_features] with the scaling folded in, both row-major;
    `ranks[s, m]` is 0 where the adapter leaves the module alone. Every offset is a multiple of 64 bytes.
    """

    data: torch.Tensor  # [elements], dtype of the base model
    offsets: torch.Tensor  # [slots, modules, 2] int64, in elements
    ranks: torch.Tensor  # [slots, modules] int32


def each_module(
    out: torch.Tensor, module: int, widths: tuple[int, ...] | None
) -> Iterator[tuple[int, torch.Tensor]]:
    """The arguments of `LoraKernels.apply` taken apart: each module's column, and its outputs in `out`."""
    end = 0
    for i, width in enumerate(widths or (out.shape[1],)):
        yield module + i, out[:, end : (end := end + width)]


class LoraKernels(Protocol):
    """y += sum over entries of weight * (x A^T) B, for every segment of a step (Chen et al. 2023, SGMV).

    `max_mix_rank` is the most that the ranks of one mix's adapters may add up to on a module; None: any.
    """

    @property
    def max_mix_rank(self) -> int | None: ...

    def apply(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        module: int,
        segments: Segments,
        arena: ArenaView,
        widths: tuple[int, ...] | None = None,
    ) -> None:
        """Add the adapters' deltas to `out` in place.

        out: [T, out_features], x: [T, in_features], rows contiguous (the last dimension has stride 1); only
        the first `segments.num_tokens` rows are touched. `module` is the column of the arena's tables.
        `widths`: of up to three modules that read the same x and whose columns follow each other, `module`
        the first, the outputs of each; they stand side by side in `out`. None: there is one.
        Both products are accumulated in float32; x A^T is kept in it too, or for long segments in x's dtype.
        """
        ...
