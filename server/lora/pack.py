"""An adapter on disk becomes one contiguous image, exactly as it will lie in the arena."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch

from server.errors import InvalidAdapter
from server.lora.kernels.interface import Part
from server.lora.layout import Layout, parts_of_module
from server.peft.format import WEIGHTS_NAME
from server.peft.header import TensorSpan

# Elements per torch operation, just under what torch would spread over threads: packing runs beside a model
# step, and a second team of threads on the same cores makes both many times slower.
_SERIAL = 32_000


def pack(folder: Path, layout: Layout, image_E: torch.Tensor) -> None:
    """Read an adapter's tensors into its image, [layout.elements] of the layout's dtype on the host.

    Every byte of the image is written. Raises OSError when the file cannot be read, InvalidAdapter when it
    is not as long as it was when judged.
    """
    modules = list(layout.modules())
    scratch = torch.empty(max(span.nbytes for module in modules for span in module.spans), dtype=torch.uint8)
    end = 0
    with (folder / WEIGHTS_NAME).open("rb", buffering=0) as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes != layout.file_bytes:
            raise _changed(f"has {nbytes} bytes, it had {layout.file_bytes} when it was judged")
        for module in modules:
            starts = layout.offsets[module.target].tolist()
            for part, span in parts_of_module(module):
                image_E[end : starts[part]].zero_()
                end = starts[part] + math.prod(span.shape)
                room = image_E[starts[part] : end]
                if part is Part.A:
                    _read_a(file.fileno(), span, room, scratch)
                else:
                    _read_b(file.fileno(), span, module.scaling, room, scratch)
    image_E[end:].zero_()


def _changed(how: str) -> InvalidAdapter:
    return InvalidAdapter(f"`{WEIGHTS_NAME}` {how}", param=WEIGHTS_NAME)


def _dtype(span: TensorSpan) -> torch.dtype:
    dtype = getattr(torch, span.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _read_a(fd: int, span: TensorSpan, out: torch.Tensor, scratch: torch.Tensor) -> None:
    if out.dtype == _dtype(span):
        _read(fd, span, out.view(torch.uint8))
    else:
        source = _read(fd, span, scratch[: span.nbytes]).view(_dtype(span))
        for there, here in zip(torch.split(out, _SERIAL), torch.split(source, _SERIAL), strict=True):
            there.copy_(here)


def _read_b(fd: int, span: TensorSpan, scaling: float, out: torch.Tensor, scratch: torch.Tensor) -> None:
    """B [out, rank] or its bias [out], times scaling, transposed: [rank, out] in `out`, or [out].

    The product is made in float32 and rounded once.
    """
    scaled = _read(fd, span, scratch[: span.nbytes]).view(_dtype(span))
    if scaled.dtype == out.dtype:
        for piece in torch.split(scaled, _SERIAL):
            piece.mul_(scaling)  # torch multiplies half precision by a number in float32
    else:
        source, scaled = scaled, torch.empty(scaled.numel(), dtype=out.dtype)
        for there, here in zip(torch.split(scaled, _SERIAL), torch.split(source, _SERIAL), strict=True):
            there.copy_(here.float().mul_(scaling))
    # NumPy transposes several times faster, and on one thread. It has no bfloat16: move the bits.
    bits = torch.int32 if out.dtype == torch.float32 else torch.int16
    out_RO = out.view(bits).view(*reversed(span.shape)).numpy()
    np.copyto(out_RO, scaled.view(bits).view(span.shape).numpy().T)


def _read(fd: int, span: TensorSpan, out: torch.Tensor) -> torch.Tensor:
    """Fill `out` (uint8) from the file. Not a memory map: a file cut short is an error here, not a crash."""
    buffer = out.numpy().data
    done = 0
    while done < span.nbytes:
        count = os.preadv(fd, [buffer[done:]], span.offset + done)
        if count == 0:
            raise _changed(f"ends inside {span.name[:200]}")
        done += count
    return out
