"""How adapters get from the host into a device's memory beside its steps, and into memory that both share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

Pieces = tuple[torch.Tensor, ...]  # of host memory, uint8; one after the other they are an image
Mark = object  # a point in what the device was given to do


class Lane(Protocol):
    """What one thread copies with."""

    def staging(self, nbytes: int) -> torch.Tensor:
        """[nbytes] uint8 of host memory, the same at each call, for what is kept in no single piece.

        As large as the largest such adapter so far, not a window that an adapter passes through in parts:
        packing needs whole tensors, and an output head alone may be half an adapter.
        """
        ...

    def copy(self, image: Pieces, room_E: torch.Tensor, after: Mark | None) -> None:
        """Host to arena, once the device has passed `after`; returns when the image is there."""
        ...


class Copies(Protocol):
    """One device's way from the host."""

    def lock_pages(self, memory: torch.Tensor) -> Callable[[], None] | None:
        """Make host memory ready to be copied from beside steps; returns what undoes it, if anything.

        Raises ValueError when the system refuses.
        """
        ...

    def mark(self) -> Mark | None:
        """Where the device's steps have got to in what they were given; None where they run at once."""
        ...

    def lane(self) -> Lane:
        """For the thread that calls."""
        ...


class HostCopies:
    """`Copies` of a device that computes in the host's own memory."""

    def lock_pages(self, memory: torch.Tensor) -> None:
        """Nothing: the slab is only reserved, and pages are touched when images are written."""

    def mark(self) -> None:
        """Steps are over when the engine's thread goes on."""

    def lane(self) -> Lane:
        return _HostLane()


class _HostLane:
    def __init__(self) -> None:
        self._staging = torch.empty(0, dtype=torch.uint8)

    def staging(self, nbytes: int) -> torch.Tensor:
        if self._staging.numel() < nbytes:
            self._staging = torch.empty(nbytes, dtype=torch.uint8)
        return self._staging[:nbytes]

    def copy(self, image: Pieces, room_E: torch.Tensor, after: Mark | None) -> None:
        for part, piece in parts_of(room_E.view(torch.uint8), image):
            move(piece, part)


def parts_of(whole: torch.Tensor, pieces: Pieces) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The part of `whole`, [bytes] uint8, that each piece stands for, with the piece."""
    sizes = [piece.numel() for piece in pieces]
    if sum(sizes) != whole.numel():
        raise ValueError(f"room of {whole.numel()} bytes for an adapter of {sum(sizes)}")
    return list(zip(torch.split(whole, sizes), pieces, strict=True))


def move(source: torch.Tensor, target: torch.Tensor) -> None:
    """One memmove: torch's copy would start threads against those of the step."""
    np.copyto(target.numpy(), source.numpy())
