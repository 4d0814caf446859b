"""The oracle: a plain loop over segments. Other kernels are tested against it."""

from __future__ import annotations

import torch

from server.lora.kernels.interface import ArenaView, each_module
from server.lora.segments import Segments


class ReferenceKernels:
    """`LoraKernels` in a few lines of torch; `dtype` is what it computes in."""

    max_mix_rank = None

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def apply(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        module: int,
        segments: Segments,
        arena: ArenaView,
        widths: tuple[int, ...] | None = None,
    ) -> None:
        for column, part in each_module(out, module, widths):
            self._apply(part, x, column, segments, arena)

    def _apply(
        self, out: torch.Tensor, x: torch.Tensor, module: int, segments: Segments, arena: ArenaView
    ) -> None:
        token_starts, entry_starts = segments.token_starts.tolist(), segments.entry_starts.tolist()
        slots, weights = segments.slots.tolist(), segments.weights.tolist()
        for g in range(segments.num_segments):
            tokens = slice(token_starts[g], token_starts[g + 1])
            delta = torch.zeros_like(out[tokens], dtype=self.dtype)
            for e in range(entry_starts[g], entry_starts[g + 1]):
                rank = int(arena.ranks[slots[e], module])
                if rank == 0:
                    continue
                a_offset, b_offset = arena.offsets[slots[e], module].tolist()
                a_RI = arena.data[a_offset : a_offset + rank * x.shape[1]].view(rank, -1).to(self.dtype)
                b_RO = arena.data[b_offset : b_offset + rank * out.shape[1]].view(rank, -1).to(self.dtype)
                delta += weights[e] * ((x[tokens].to(self.dtype) @ a_RI.T) @ b_RO)
            out[tokens] = (out[tokens].to(self.dtype) + delta).to(out.dtype)
