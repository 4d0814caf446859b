"""LoRA kernels as one call."""

from __future__ import annotations

import torch

from server.lora.kernels.interface import ArenaView, LoraKernels, Modules
from server.lora.segments import Segments


def apply(
    kernels: LoraKernels,
    y: torch.Tensor,
    x: torch.Tensor,
    module: int,
    segments: Segments,
    arena: ArenaView,
    widths: tuple[int, ...] | None = None,
) -> None:
    """What the adapters make of x, brought into y; `widths` of modules side by side, else there is one."""
    kernels.begin(x, Modules(module, widths or (y.shape[1],)), segments, arena).finish(y)
