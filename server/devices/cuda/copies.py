"""Copies between the host and a GPU beside its steps: page-locked memory, a stream for each thread."""

# torch has no type hints for its streams and events:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch

from server.lora.copies import Lane, Mark, Pieces, parts_of

_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every context of this process


class CudaCopies:
    """`Copies` to one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def lock_pages(self, memory: torch.Tensor) -> Callable[[], None]:
        """Exactly these bytes, by cudaHostRegister: torch's own page-locked memory comes in powers of two."""
        memory.zero_()  # many threads make the pages here; the driver would make them on one
        cudart = torch.cuda.cudart()
        error = int(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE))
        if error:
            raise ValueError(
                f"a host cache of {memory.nbytes} bytes cannot be page-locked (CUDA error {error}); "
                "see --host-cache-bytes"
            )
        return partial(_unlock_pages, memory.data_ptr())

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self._device).record_event()

    def lane(self) -> Lane:
        return _CudaLane(self._device)


class _CudaLane:
    """Growing its staging memory, page-locked, stalls the driver; that ends with the largest adapter."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._staging = torch.empty(0, dtype=torch.uint8)

    def staging(self, nbytes: int) -> torch.Tensor:
        if self._staging.numel() < nbytes:
            self._staging = torch.empty(0, dtype=torch.uint8)  # the old one goes first
            self._staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return self._staging[:nbytes]

    def copy(self, image: Pieces, room_E: torch.Tensor, after: Mark | None) -> None:
        copied = torch.cuda.Event(blocking=True)  # the thread sleeps until then
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(cast(torch.cuda.Event, after))
            for part, piece in parts_of(room_E.view(torch.uint8), image):
                part.copy_(piece, non_blocking=True)
            copied.record(self._stream)
        # Not the stream's own synchronize: torch.cuda.set_sync_debug_mode refuses that on every thread.
        copied.synchronize()


def begin_read(tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """See `Operators.read`."""
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[torch.Tensor]:
        copied.synchronize()
        return copies

    return read


def _unlock_pages(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
