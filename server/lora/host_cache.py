"""Packed adapters in host memory, one copy away from the arena: one slab, asked for once."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate

import torch

from server.lora.copies import Copies, HostCopies, Pieces
from server.lora.extents import ExtentAllocator
from server.lora.layout import ALIGN_BYTES


class HostCache:
    """Packed images in one buffer of `nbytes`, rounded down to whole cache lines.

    `copies` makes the slab ready to be copied from, once, at start: to lock each image's pages would stall a
    GPU's driver for milliseconds.

    An image lies in one piece where a hole is large enough, and in several where none is. So what leaves
    is decided by age alone, every free byte can be used, and no image is ever moved: to slide gigabytes
    together would hold the engine's thread for seconds.

    The engine's thread owns this. A loader's thread writes into rooms that are not kept yet and reads images
    that may not leave meanwhile. Raises ValueError when the memory cannot be page-locked.
    """

    def __init__(self, nbytes: int, copies: Copies | None = None) -> None:
        self._extents = ExtentAllocator(nbytes // ALIGN_BYTES * ALIGN_BYTES)
        self._slab = torch.empty(self._extents.size, dtype=torch.uint8)
        self._rooms: dict[str, list[tuple[int, int]]] = {}  # digest -> (start, bytes) of its pieces
        self._kept: OrderedDict[str, int] = OrderedDict()  # whole images, least recently used first -> bytes
        unlock = (copies or HostCopies()).lock_pages(self._slab) if self._extents.size else None
        if unlock is not None:
            weakref.finalize(self, unlock)

    @property
    def bytes_used(self) -> int:
        """Of images, and of rooms that they are being read into."""
        return self._extents.size - self._extents.free

    @property
    def digests(self) -> tuple[str, ...]:
        """Of whole images, most recently used last."""
        return tuple(self._kept)

    def __contains__(self, digest: str) -> bool:
        """Whether its whole image is here."""
        return digest in self._kept

    def pieces(self, digest: str) -> Pieces:
        """The room of an image, whole or not; none where it has no room."""
        return tuple(self._slab[start : start + nbytes] for start, nbytes in self._rooms.get(digest, ()))

    def reserve(self, digest: str, nbytes: int, may_leave: Callable[[str], bool]) -> bool:
        """Room for an image of whole cache lines that is about to be read; False when there is none.

        Least recently used images that may leave are dropped for it, if that is enough. Raises ValueError
        when the digest has room already.
        """
        if digest in self._rooms:
            raise ValueError(f"{digest} has room already")
        leaving = list(filter(may_leave, self._kept))
        frees = accumulate((self._kept[other] for other in leaving), initial=self._extents.free)
        count = next((count for count, free in enumerate(frees) if free >= nbytes), None)
        if count is None:
            return False
        for other in leaving[:count]:
            self.drop(other)
        self._rooms[digest] = self._take(nbytes)
        return True

    def keep(self, digest: str) -> None:
        """Its image lies in its room."""
        self._kept[digest] = sum(nbytes for _, nbytes in self._rooms[digest])
        self.touch(digest)

    def touch(self, digest: str) -> None:
        """It was used just now."""
        self._kept.move_to_end(digest)

    def drop(self, digest: str) -> None:
        """Free the room of an image, whole or not, if it has one."""
        self._kept.pop(digest, None)
        for start, _ in self._rooms.pop(digest, ()):
            self._extents.give(start)

    def _take(self, nbytes: int) -> list[tuple[int, int]]:
        """In the largest holes where none is large enough, so that the pieces are few."""
        room = []
        while nbytes:
            size = min(nbytes, self._extents.largest_hole)
            start = self._extents.take(size)
            assert start is not None
            room.append((start, size))
            nbytes -= size
        return room
