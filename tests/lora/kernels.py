"""What tests of LoRA kernels share: adapters with every part, kernels as one call."""

from __future__ import annotations

import torch

from server.lora.kernels.interface import ArenaView, LoraKernels, Modules, Part
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
    """What the adapters make of x, brought into y; `widths` of modules side by side, else there is one.

    `segments`: on the host, or prepared.
    """
    if segments.work is None:
        segments = kernels.prepare(segments).to(x.device)
    kernels.begin(x, Modules(module, widths or (y.shape[1],)), segments, arena).finish(y)


def random_arena(
    ranks_SM: list[list[int]], shapes: list[tuple[int, int]], dtype: torch.dtype, seed: int
) -> ArenaView:
    """An arena filled with random adapters; `shapes` are (in, out) of each module.

    Every third adapter of a module has a gain, every other one a bias.
    """
    generator = torch.Generator().manual_seed(seed)
    align = 64 // dtype.itemsize
    offsets, end = torch.zeros(len(ranks_SM), len(shapes), len(Part), dtype=torch.int64), align
    for s, ranks in enumerate(ranks_SM):
        for m, (rank, (n_in, n_out)) in enumerate(zip(ranks, shapes, strict=True)):
            sizes = {Part.A: rank * n_in, Part.B: rank * n_out}
            if (s + m) % 3 == 0:
                sizes[Part.GAIN] = n_out
            if (s + m) % 2 == 0:
                sizes[Part.BIAS] = n_out
            for part, size in sizes.items():
                offsets[s, m, part] = end
                end += -(-size // align) * align
    data = torch.randn(end, generator=generator).mul_(0.3).to(dtype)
    return ArenaView(data, offsets, torch.tensor(ranks_SM, dtype=torch.int32))
