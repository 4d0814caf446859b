"""Where an adapter's tensors lie, in its file and in its packed image: what is kept of a judged one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from server.lora.kernels.interface import Part
from server.messages import LoraTarget
from server.peft.format import LoraAdapter, LoraModule, TensorSpan

ALIGN_BYTES = 64  # a cache line; every tensor starts on one, so kernels may load vectors

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of weights files
_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
_ROW = np.dtype(
    [
        ("target", "i4"),
        ("rank", "i4"),
        ("scaling", "f8"),
        ("a_dtype", "u1"),  # index into _DTYPES
        ("a_offset", "i8"),  # bytes from the start of the file
        ("b_dtype", "u1"),
        ("b_offset", "i8"),
    ]
)


@dataclass(frozen=True, eq=False)
class Layout:
    """What a load needs of a judged adapter. True for ever of one digest and one base model.

    The packed image holds for each module in turn A as [rank, in], then B as [rank, out] with the scaling
    folded in; every tensor starts on a multiple of 64 bytes. Small, so that thousands can be remembered:
    12 KB for an adapter on 224 modules.
    """

    dtype: torch.dtype  # of the base model, and so of the image
    elements: int  # of the image, whole cache lines
    # [targets, parts] int64, elements from the start of the image to each part; -1: there is none
    offsets: torch.Tensor
    ranks: torch.Tensor  # [targets] int32, 0 where the adapter leaves the module alone
    file_bytes: int  # of the whole weights file
    _targets: Sequence[LoraTarget]  # that it was judged against, shared by all layouts
    _rows: np.ndarray[Any, Any]  # [modules] of _ROW

    @classmethod
    def of(cls, adapter: LoraAdapter, targets: Sequence[LoraTarget], dtype: torch.dtype) -> Layout:
        """For an adapter that was judged against `targets`, on a base model of `dtype`."""
        offsets = np.full((len(targets), len(Part)), -1, np.int64)
        ranks = np.zeros(len(targets), np.int32)
        rows, end, file_bytes = [], 0, 0
        for module in adapter.modules:
            a, b = module.a, module.b
            b_start = end + _whole_lines(module.rank * targets[module.target].in_features, dtype)
            offsets[module.target, [Part.A, Part.B]] = end, b_start
            ranks[module.target] = module.rank
            end = b_start + _whole_lines(module.rank * targets[module.target].out_features, dtype)
            file_bytes = max(file_bytes, a.offset + a.nbytes, b.offset + b.nbytes)
            kinds = _NAMES.index(a.dtype), _NAMES.index(b.dtype)
            rows.append((module.target, module.rank, module.scaling, kinds[0], a.offset, kinds[1], b.offset))
        tables = torch.from_numpy(offsets), torch.from_numpy(ranks)
        return cls(dtype, end, *tables, file_bytes, targets, np.array(rows, _ROW))

    @property
    def nbytes(self) -> int:
        """Of the image, a multiple of 64."""
        return self.elements * self.dtype.itemsize

    def modules(self) -> Iterator[LoraModule]:
        """What the adapter changes, in the order of the image."""
        for target, rank, scaling, a_dtype, a_offset, b_dtype, b_offset in self._rows.tolist():
            linear = self._targets[target]
            a = _span(f"{linear.name}.lora_A", a_dtype, (rank, linear.in_features), a_offset)
            b = _span(f"{linear.name}.lora_B", b_dtype, (linear.out_features, rank), b_offset)
            yield LoraModule(target, linear.name, rank, scaling, a, b)


class RecentLayouts:
    """By digest, of the `most` versions that were loaded last: these need not be judged again."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._layouts: OrderedDict[str, Layout] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self._layouts

    def __getitem__(self, digest: str) -> Layout:
        return self._layouts[digest]

    def get(self, digest: str) -> Layout | None:
        return self._layouts.get(digest)

    def remember(self, digest: str, layout: Layout) -> None:
        self._layouts[digest] = layout
        self._layouts.move_to_end(digest)
        if len(self._layouts) > self._most:
            self._layouts.popitem(last=False)

    def forget(self, digest: str) -> None:
        """Judge it again next time. Does nothing when it is not here."""
        self._layouts.pop(digest, None)


def _whole_lines(values: int, dtype: torch.dtype) -> int:
    """Elements of so many values, rounded up to whole cache lines."""
    line = ALIGN_BYTES // dtype.itemsize
    return -(-values // line) * line


def _span(name: str, kind: int, shape: tuple[int, int], offset: int) -> TensorSpan:
    return TensorSpan(name, _NAMES[kind], shape, offset, shape[0] * shape[1] * _DTYPES[kind].itemsize)
