"""Packed adapters, to compare with what lies in an arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from server.lora.arena import Arena
from server.lora.layout import Layout
from server.lora.pack import pack
from server.messages import LoraTarget
from server.peft.format import judge
from tests.lora.adapter_folder import LIMITS, TARGETS


@dataclass(frozen=True)
class Image:
    """A packed adapter."""

    layout: Layout
    data: torch.Tensor  # [elements]

    def lies_in(self, arena: Arena, slot: int) -> bool:
        """Whether that row of the arena's tables leads to exactly this."""
        view = arena.view()
        there = self.layout.offsets >= 0
        start = int((view.offsets[slot] - self.layout.offsets)[there][0])
        return (
            torch.equal(view.offsets[slot], torch.where(there, self.layout.offsets + start, 0))
            and torch.equal(view.ranks[slot], self.layout.ranks)
            and torch.equal(view.data[start : start + self.data.numel()], self.data)
        )


def packed(
    folder: Path, targets: Sequence[LoraTarget] = TARGETS, dtype: torch.dtype = torch.float32
) -> Image:
    """The folder's adapter as a server with these targets packs it; every byte that it forgets is NaN."""
    layout = Layout.of(judge(folder, targets, LIMITS), targets, dtype)
    data = torch.full((layout.elements,), torch.nan, dtype=dtype)
    pack(folder, layout, data)
    return Image(layout, data)
