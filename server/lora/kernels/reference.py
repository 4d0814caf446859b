"""The oracle: a plain loop over segments. Other kernels are tested against it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from server.lora.kernels.interface import SCRATCH_BYTES, ArenaView, Begun, Modules, Part
from server.lora.segments import Segments


class ReferenceKernels:
    """`LoraKernels` in a few lines of torch; `dtype` is what it computes in."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def max_mix_rank(self, tokens: int) -> int:
        """x A^T of one adapter at a time."""
        return SCRATCH_BYTES // (self.dtype.itemsize * tokens)

    def prepare(self, segments: Segments) -> Segments:
        return segments

    def begin(self, x_TI: torch.Tensor, modules: Modules, segments: Segments, arena: ArenaView) -> Begun:
        return _Begun(x_TI, modules, segments, arena, self.dtype)


@dataclass(frozen=True)
class _Begun:
    """Nothing is computed before Wx is there."""

    x: torch.Tensor  # [T, in_features]
    modules: Modules
    segments: Segments
    arena: ArenaView
    dtype: torch.dtype

    def finish(self, y_TO: torch.Tensor) -> None:
        for module, out_TO in self.modules.each(y_TO):
            self._finish(module, out_TO)

    def _finish(self, module: int, y_TO: torch.Tensor) -> None:
        token_starts, entry_starts = self.segments.token_starts.tolist(), self.segments.entry_starts.tolist()
        slots, weights = self.segments.slots.tolist(), self.segments.weights.tolist()
        for g in range(self.segments.num_segments):
            tokens = slice(token_starts[g], token_starts[g + 1])
            base_TO = y_TO[tokens].to(self.dtype)
            sum_TO = base_TO.clone()
            for e in range(entry_starts[g], entry_starts[g + 1]):
                sum_TO += weights[e] * self._entry(self.x[tokens], base_TO, slots[e], module)
            y_TO[tokens] = sum_TO.to(y_TO.dtype)

    def _entry(self, x_TI: torch.Tensor, base_TO: torch.Tensor, slot: int, module: int) -> torch.Tensor:
        """What one adapter adds to the base's output, at weight 1."""
        rank, starts = int(self.arena.ranks[slot, module]), self.arena.offsets[slot, module].tolist()
        width = base_TO.shape[1]
        added_TO = torch.zeros_like(base_TO)
        if rank:
            a_RI = self._part(starts[Part.A], rank * x_TI.shape[1]).view(rank, -1)
            b_RO = self._part(starts[Part.B], rank * width).view(rank, -1)
            added_TO += (x_TI.to(self.dtype) @ a_RI.T) @ b_RO
        if starts[Part.GAIN]:
            added_TO += self._part(starts[Part.GAIN], width) * base_TO
        if starts[Part.BIAS]:
            added_TO += self._part(starts[Part.BIAS], width)
        return added_TO

    def _part(self, start: int, elements: int) -> torch.Tensor:
        return self.arena.data[start : start + elements].to(self.dtype)
