"""An adapter on disk becomes one contiguous image, exactly as it will lie in the arena."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from server.errors import InvalidAdapter
from server.lora.kernels.interface import Part
from server.lora.layout import Layout
from server.peft.format import WEIGHTS_NAME, LoraModule, TensorSpan

# Elements per torch operation, just under what torch would spread over threads: packing runs beside a model
# step, and a second team of threads on the same cores makes both many times slower.
_SERIAL = 32_000


def pack(folder: Path, layout: Layout, image_E: torch.Tensor) -> None:
    """Read an adapter's tensors into its image, [layout.elements] of the layout's dtype on the host.

    Every byte of the image is written. Raises OSError when the file cannot be read, InvalidAdapter when it
    is not as long as it was when judged.
    """
    modules = list(layout.modules())
    scratch = torch.empty(max(max(m.a.nbytes, m.b.nbytes) for m in modules), dtype=torch.uint8)
    end = 0
    with (folder / WEIGHTS_NAME).open("rb", buffering=0) as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes != layout.file_bytes:
            raise _changed(f"has {nbytes} bytes, it had {layout.file_bytes} when it was judged")
        for module in modules:
            a_start, b_start = layout.offsets[module.target, [Part.A, Part.B]].tolist()
            a = image_E[a_start : a_start + module.a.shape[0] * module.a.shape[1]]
            b_RO = image_E[b_start : b_start + module.b.shape[0] * module.b.shape[1]].view(module.rank, -1)
            image_E[end:a_start].zero_()
            image_E[a_start + a.numel() : b_start].zero_()
            end = b_start + b_RO.numel()
            _read_a(file.fileno(), module, a, scratch)
            _read_b(file.fileno(), module, b_RO, scratch)
    image_E[end:].zero_()


def _changed(how: str) -> InvalidAdapter:
    return InvalidAdapter(f"`{WEIGHTS_NAME}` {how}", param=WEIGHTS_NAME)


def _dtype(span: TensorSpan) -> torch.dtype:
    dtype = getattr(torch, span.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _read_a(fd: int, module: LoraModule, out: torch.Tensor, scratch: torch.Tensor) -> None:
    if out.dtype == _dtype(module.a):
        _read(fd, module.a, out.view(torch.uint8))
    else:
        source = _read(fd, module.a, scratch[: module.a.nbytes]).view(_dtype(module.a))
        for there, here in zip(torch.split(out, _SERIAL), torch.split(source, _SERIAL), strict=True):
            there.copy_(here)


def _read_b(fd: int, module: LoraModule, out_RO: torch.Tensor, scratch: torch.Tensor) -> None:
    """B [out, rank] times scaling, transposed. The product is made in float32 and rounded once."""
    scaled = _read(fd, module.b, scratch[: module.b.nbytes]).view(_dtype(module.b))
    if scaled.dtype == out_RO.dtype:
        for piece in torch.split(scaled, _SERIAL):
            piece.mul_(module.scaling)  # torch multiplies half precision by a number in float32
    else:
        source, scaled = scaled, torch.empty(scaled.numel(), dtype=out_RO.dtype)
        for there, here in zip(torch.split(scaled, _SERIAL), torch.split(source, _SERIAL), strict=True):
            there.copy_(here.float().mul_(module.scaling))
    # NumPy transposes several times faster, and on one thread. It has no bfloat16: move the bits.
    bits = torch.int32 if out_RO.dtype == torch.float32 else torch.int16
    np.copyto(out_RO.view(bits).numpy(), scaled.view(bits).view(-1, module.rank).T.numpy())


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
