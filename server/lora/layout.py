"""Where an adapter's tensors lie, in its file and in its packed image: what is kept of a judged one."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from server.lora.kernels.interface import Part
from server.messages import LoraTarget
from server.peft.format import LoraAdapter, LoraModule
from server.peft.header import TensorSpan

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
        ("bias_dtype", "u1"),
        ("bias_offset", "i8"),  # -1: there is none
    ]
)


@dataclass(frozen=True, eq=False)
class Layout:
    """What a load needs of a judged adapter. True for ever of one digest and one base model.

    The packed image holds for each module in turn A as [rank, in], then B as [rank, out] and perhaps a bias
    as [out] with the scaling folded in; every tensor starts on a multiple of 64 bytes. Small, so that
    thousands can be remembered: 18 KB for an adapter on 224 modules.
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
            ranks[module.target] = module.rank
            for part, span in parts_of_module(module):
                offsets[module.target, part] = end
                end += _whole_lines(math.prod(span.shape), dtype)
                file_bytes = max(file_bytes, span.offset + span.nbytes)
            places = _place(module.a), _place(module.b), _place(module.bias)
            rows.append((module.target, module.rank, module.scaling, *chain(*places)))
        tables = torch.from_numpy(offsets), torch.from_numpy(ranks)
        return cls(dtype, end, *tables, file_bytes, targets, np.array(rows, _ROW))

    @property
    def nbytes(self) -> int:
        """Of the image, a multiple of 64."""
        return self.elements * self.dtype.itemsize

    def modules(self) -> Iterator[LoraModule]:
        """What the adapter changes, in the order of the image."""
        for target, rank, scaling, *spans in self._rows.tolist():
            a_dtype, a_offset, b_dtype, b_offset, bias_dtype, bias_offset = spans
            linear = self._targets[target]
            a = _span(f"{linear.name}.lora_A", a_dtype, (rank, linear.in_features), a_offset)
            b = _span(f"{linear.name}.lora_B", b_dtype, (linear.out_features, rank), b_offset)
            bias = None
            if bias_offset >= 0:
                bias = _span(f"{linear.name}.lora_B.bias", bias_dtype, (linear.out_features,), bias_offset)
            yield LoraModule(target, linear.name, rank, scaling, a, b, bias)


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


def parts_of_module(module: LoraModule) -> Iterator[tuple[Part, TensorSpan]]:
    """Those that there are, in the order of the image."""
    yield Part.A, module.a
    yield Part.B, module.b
    if module.bias is not None:
        yield Part.BIAS, module.bias


def _whole_lines(values: int, dtype: torch.dtype) -> int:
    """Elements of so many values, rounded up to whole cache lines."""
    line = ALIGN_BYTES // dtype.itemsize
    return -(-values // line) * line


def _place(span: TensorSpan | None) -> tuple[int, int]:
    """The last columns of a row: dtype and offset."""
    return (0, -1) if span is None else (_NAMES.index(span.dtype), span.offset)


def _span(name: str, kind: int, shape: tuple[int, ...], offset: int) -> TensorSpan:
    return TensorSpan(name, _NAMES[kind], shape, offset, math.prod(shape) * _DTYPES[kind].itemsize)
