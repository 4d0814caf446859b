"""The arena: one flat buffer that holds every resident adapter, and the tables that say where each lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from server.lora.extents import ExtentAllocator
from server.lora.kernels.interface import ArenaView, Part
from server.lora.layout import ALIGN_BYTES, Layout

_STAGING_BYTES = 8 << 20  # for moves whose source and destination overlap


@dataclass(eq=False)
class Extent:
    """Room in the arena. Without a slot it is being written into, and is not moved."""

    start: int  # bytes from the end of the arena's first line; a multiple of 64
    nbytes: int
    slot: int | None = None
    layout: Layout | None = None  # of what lies in it, with a slot


class Arena:
    """Where resident adapters lie. Owned by the engine's thread.

    `nbytes` is rounded down to whole cache lines; `slots` (at least 1) is how many rows the tables have at
    first. On a CPU the buffer is only reserved: pages are touched
    when adapters are written. Moves and table updates go to the current stream of the device.
    """

    def __init__(
        self,
        nbytes: int,
        num_modules: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        slots: int = 64,
    ) -> None:
        self._extents = ExtentAllocator(nbytes // ALIGN_BYTES * ALIGN_BYTES)
        self._by_start: dict[int, Extent] = {}
        self._by_slot: dict[int, Extent] = {}
        self._free_slots = list(range(slots - 1, -1, -1))
        self._view = ArenaView(
            # One line in front, where no part of an adapter lies: offset 0 says that there is none.
            data=torch.empty(
                (self._extents.size + ALIGN_BYTES) // dtype.itemsize, dtype=dtype, device=device
            ),
            offsets=torch.zeros(slots, num_modules, len(Part), dtype=torch.int64, device=device),
            ranks=torch.zeros(slots, num_modules, dtype=torch.int32, device=device),
        )

    def view(self) -> ArenaView:
        """What kernels read. The same object, with the same tensors, until the tables have to grow."""
        return self._view

    @property
    def dtype(self) -> torch.dtype:
        return self._view.data.dtype

    @property
    def device(self) -> torch.device:
        return self._view.data.device

    @property
    def bytes_total(self) -> int:
        return self._extents.size

    @property
    def bytes_free(self) -> int:
        return self._extents.free

    @property
    def bytes_used(self) -> int:
        """Of resident adapters and of those being copied in."""
        return self._extents.size - self._extents.free

    @property
    def largest_hole(self) -> int:
        return self._extents.largest_hole

    def reserve(self, nbytes: int) -> Extent | None:
        """Room for `nbytes` in one piece, or None when there is no such piece (see `compact`)."""
        start = self._extents.take(-(-nbytes // ALIGN_BYTES) * ALIGN_BYTES)
        if start is None:
            return None
        extent = self._by_start[start] = Extent(start, nbytes)
        return extent

    def room(self, extent: Extent) -> torch.Tensor:
        """The extent's memory, [elements], to be written before `commit`."""
        first = self._element(extent.start)
        return self._view.data[first : first + extent.nbytes // self.dtype.itemsize]

    def commit(self, extent: Extent, layout: Layout) -> int:
        """The image lies in the extent's room: enter it into the tables. Returns its slot."""
        if not self._free_slots:
            self._grow()
        slot = extent.slot = self._free_slots.pop()
        self._by_slot[slot], extent.layout = extent, layout
        self._view.ranks[slot].copy_(layout.ranks)
        self._enter_offsets(slot, layout, extent.start)
        return slot

    def release(self, slot: int) -> None:
        """Free a committed extent and its slot. Raises KeyError when the slot is free."""
        extent = self._by_slot.pop(slot)
        self._view.ranks[slot].zero_()
        self._free_slots.append(slot)
        extent.slot = extent.layout = None
        self.abandon(extent)

    def abandon(self, extent: Extent) -> None:
        """Free an extent that was reserved and never committed."""
        del self._by_start[extent.start]
        self._extents.give(extent.start)

    def compact(self) -> int:
        """Slide committed extents together, so that free room becomes one piece; returns how many moved.

        Extents being written into stay, so the room may still be in several pieces.
        """
        fixed = {start for start, extent in self._by_start.items() if extent.slot is None}
        moves = self._extents.compact(fixed)
        for start, to, nbytes in moves:
            extent = self._by_start[to] = self._by_start.pop(start)
            extent.start = to
            self._move(self._element(start), self._element(to), nbytes // self.dtype.itemsize)
            assert extent.slot is not None
            assert extent.layout is not None
            self._enter_offsets(extent.slot, extent.layout, to)
        return len(moves)

    def _element(self, start: int) -> int:
        """Where in the buffer an extent begins that starts at `start` bytes."""
        return (ALIGN_BYTES + start) // self.dtype.itemsize

    def _enter_offsets(self, slot: int, layout: Layout, start: int) -> None:
        offsets = torch.where(layout.offsets < 0, 0, layout.offsets + self._element(start))
        self._view.offsets[slot].copy_(offsets)

    def _move(self, start: int, to: int, count: int) -> None:
        """Copy `count` elements towards the front. Overlapping ones go through a small copy, front first."""
        data = self._view.data
        if start - to >= count:
            data[to : to + count].copy_(data[start : start + count])
            return
        step = _STAGING_BYTES // self.dtype.itemsize
        for done in range(0, count, step):
            n = min(step, count - done)
            data[to + done : to + done + n].copy_(data[start + done : start + done + n].clone())

    def _grow(self) -> None:
        """Twice the slots. The tables are new tensors: whoever captured the old ones must look again."""
        old = self._view
        slots = old.ranks.shape[0]
        self._view = ArenaView(
            data=old.data,
            offsets=torch.cat([old.offsets, torch.zeros_like(old.offsets)]),
            ranks=torch.cat([old.ranks, torch.zeros_like(old.ranks)]),
        )
        self._free_slots.extend(range(2 * slots - 1, slots - 1, -1))
