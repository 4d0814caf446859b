"""A Linear whose weight is packed for the CPU once, at load; see devices/cpu/native/linear.h."""

from __future__ import annotations

import ctypes
import functools
import logging

import torch
from torch import nn

from server.devices.cpu.native import SUFFIXES, Mirror, compare, library

log = logging.getLogger(__name__)


class LinearStruct(Mirror):
    """`ChorusLinear` of devices/cpu/native/linear.h."""

    c_name = "ChorusLinear"
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("module", ctypes.c_int64),
    )


class PackedLinear(nn.Module):
    """y = x W^T + bias through the compiled kernel. The unpacked weight is not kept."""

    def __init__(self, linear: nn.Linear, lib: ctypes.CDLL) -> None:
        super().__init__()
        compare(lib, LinearStruct)
        weight_OI = linear.weight.detach().contiguous()
        self.out_features, self.in_features = weight_OI.shape
        suffix = SUFFIXES[weight_OI.dtype]
        elements = lib[f"chorus_packed_elements_{suffix}"]
        elements.restype = ctypes.c_int64
        elements.argtypes = [ctypes.c_int64] * 2
        self._packed = torch.empty(elements(self.out_features, self.in_features), dtype=weight_OI.dtype)
        pack = lib[f"chorus_pack_{suffix}"]
        pack.restype = None
        pack.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3]
        pack(self._packed.data_ptr(), weight_OI.data_ptr(), *weight_OI.shape, torch.get_num_threads())
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self._struct = self.struct(module=0)
        self._function = lib[f"chorus_linear_{suffix}"]
        self._function.restype = None
        matrix = (ctypes.c_void_p, ctypes.c_int64)
        self._function.argtypes = [
            ctypes.POINTER(LinearStruct),
            *matrix,
            ctypes.c_int64,
            *matrix,
            ctypes.c_int64,
        ]

    def struct(self, module: int) -> LinearStruct:
        """Where the weights lie, for compiled code; `module` is the layer's column of the arena's tables."""
        bias = None if self.bias is None else self.bias.data_ptr()
        return LinearStruct(self._packed.data_ptr(), bias, self.in_features, self.out_features, module)

    def tensors(self) -> list[torch.Tensor]:
        """What a struct points to."""
        return [self._packed] if self.bias is None else [self._packed, self.bias]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        x_TI = x.reshape(-1, self.in_features)
        if x_TI.stride(-1) != 1:
            x_TI = x_TI.contiguous()
        y_TO = x.new_empty(x_TI.shape[0], self.out_features)
        self._function(
            self._struct,
            x_TI.data_ptr(),
            x_TI.stride(0),
            x_TI.shape[0],
            y_TO.data_ptr(),
            self.out_features,
            torch.get_num_threads(),
        )
        return y_TO.view(*x.shape[:-1], self.out_features)


def packed(layer: nn.Module) -> nn.Module:
    """A plain Linear packed, where the compiled kernels are there and know its type; else `layer` itself."""
    lib = library()
    if lib is None or type(layer) is not nn.Linear or layer.weight.dtype not in SUFFIXES:
        return layer
    return PackedLinear(layer, lib) if _proven(lib) else layer


@functools.cache
def _proven(lib: ctypes.CDLL) -> bool:
    """Whether a small product comes out right; a processor newer than the code may come."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(96, 80, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.normal_(generator=generator)
    x = torch.randn(50, 96, generator=generator).bfloat16()
    want = x.float() @ linear.weight.float().T
    error = float((PackedLinear(linear, lib)(x).float() - want).norm() / want.norm())
    if error < 0.01:
        return True
    log.error(
        "the compiled CPU kernels compute wrongly here (error %.2g); using the slower torch paths", error
    )
    return False
