"""An adapter on disk becomes one contiguous extent, exactly as it will lie in the arena."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from server.registry.peft_format import WEIGHTS_NAME, LoraAdapter, LoraModule, TensorSpan

ALIGN_BYTES = 64  # a cache line; every tensor starts on one, so kernels may load vectors

# Elements per torch operation, just under what torch would spread over threads: packing runs beside a model
# step, and a second team of threads on the same cores makes both many times slower.
_SERIAL = 32_000


@dataclass(frozen=True)
class PackedAdapter:
    """One adapter as the arena holds it. For each module in turn: A as [rank, in], then B as [rank, out]
    with the scaling folded in; every tensor starts on a multiple of 64 bytes.
    """

    data: torch.Tensor  # [elements], dtype of the base model, on the host
    offsets: torch.Tensor  # [modules, 2] int64, elements from the start of `data` to A and to B
    ranks: torch.Tensor  # [modules] int32, 0 where the adapter leaves the module alone
    digest: str = ""

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def packed_bytes(adapter: LoraAdapter, dtype: torch.dtype) -> int:
    """Bytes of the packed extent, a multiple of 64; reads nothing."""
    return _elements(adapter, dtype) * dtype.itemsize


def pack(
    folder: Path,
    adapter: LoraAdapter,
    num_modules: int,
    dtype: torch.dtype,
    *,
    pin: bool = False,
    digest: str = "",
) -> PackedAdapter:
    """Read and pack a judged adapter. `num_modules` is the number of targets it was judged against.

    `pin` puts the data into page-locked memory, for copies to a GPU beside the step. Raises OSError when
    the file cannot be read or is shorter than it was when judged.
    """
    data = torch.empty(_elements(adapter, dtype), dtype=dtype, pin_memory=pin)
    offsets = [[0, 0] for _ in range(num_modules)]
    ranks = [0] * num_modules
    scratch = torch.empty(_scratch_bytes(adapter), dtype=torch.uint8)
    end = 0
    with (folder / WEIGHTS_NAME).open("rb", buffering=0) as file:
        for module, a_start, b_start in _layout(adapter, dtype):
            a = data[a_start : a_start + module.a.nbytes // _itemsize(module.a)]
            b_RO = data[b_start : b_start + module.b.nbytes // _itemsize(module.b)].view(module.rank, -1)
            data[end:a_start].zero_()
            data[a_start + a.numel() : b_start].zero_()
            end = b_start + b_RO.numel()
            _read_a(file.fileno(), module, a, scratch)
            _read_b(file.fileno(), module, b_RO, scratch)
            offsets[module.target] = [a_start, b_start]
            ranks[module.target] = module.rank
    data[end:].zero_()
    return PackedAdapter(
        data, torch.tensor(offsets, dtype=torch.int64), torch.tensor(ranks, dtype=torch.int32), digest
    )


def _layout(adapter: LoraAdapter, dtype: torch.dtype) -> Iterator[tuple[LoraModule, int, int]]:
    """Each module with the element offsets of its A and B."""
    start = 0
    for module in adapter.modules:
        b_start = start + _aligned(module.a, dtype)
        yield module, start, b_start
        start = b_start + _aligned(module.b, dtype)


def _elements(adapter: LoraAdapter, dtype: torch.dtype) -> int:
    return sum(_aligned(module.a, dtype) + _aligned(module.b, dtype) for module in adapter.modules)


def _aligned(span: TensorSpan, dtype: torch.dtype) -> int:
    """Elements of the tensor, rounded up to whole cache lines of `dtype`."""
    line = ALIGN_BYTES // dtype.itemsize
    return -(-(span.nbytes // _itemsize(span)) // line) * line


def _itemsize(span: TensorSpan) -> int:
    return _dtype(span).itemsize


def _dtype(span: TensorSpan) -> torch.dtype:
    dtype = getattr(torch, span.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _scratch_bytes(adapter: LoraAdapter) -> int:
    return max(max(module.a.nbytes, module.b.nbytes) for module in adapter.modules)


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
            raise OSError(f"the weights file ends inside tensor {span.name[:200]}")
        done += count
    return out
