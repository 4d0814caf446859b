"""Tokens from rows of logits by devices/cpu/native/sampling.cpp, where it can be used, else torch's way."""

from __future__ import annotations

import ctypes
import functools

import torch

from server.devices.cpu.native import SUFFIXES, Mirror, compare, library
from server.model.sampler import torch_argmax, torch_draw
from server.model.sampling import Draws


class DrawsStruct(Mirror):
    """`ChorusDraws` of devices/cpu/native/sampling.cpp."""

    c_name = "ChorusDraws"
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "temperature", "top_k", "top_p", "min_p", "uniform")),
        ("count", ctypes.c_int64),
    )


def argmax(scores_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `SamplingOperators.argmax`."""
    function = _function("argmax", scores_NV)
    if function is None:
        return torch_argmax(scores_NV)
    rows, width = scores_NV.shape
    indices_N, finite_N = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.bool)
    function(
        ctypes.c_void_p(scores_NV.data_ptr()),
        *(ctypes.c_int64(size) for size in (scores_NV.stride(0), rows, width)),
        *(ctypes.c_void_p(out.data_ptr()) for out in (indices_N, finite_N)),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return indices_N, finite_N


def draw(scores_NV: torch.Tensor, draws: Draws) -> torch.Tensor:
    """See `SamplingOperators.draw`."""
    function = _function("draw", scores_NV)
    if function is None:
        return torch_draw(scores_NV, draws)
    uniforms = draws.uniforms()
    arrays = draws.rows, draws.temperature, draws.top_k, draws.top_p, draws.min_p, uniforms
    token_ids_D = torch.empty(len(uniforms), dtype=torch.int64)
    function(
        ctypes.c_void_p(scores_NV.data_ptr()),
        *(ctypes.c_int64(size) for size in (scores_NV.stride(0), scores_NV.shape[1])),
        ctypes.byref(DrawsStruct(*(array.ctypes.data for array in arrays), len(uniforms))),
        ctypes.c_void_p(token_ids_D.data_ptr()),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return token_ids_D


def _function(name: str, scores_NV: torch.Tensor) -> ctypes._NamedFuncPointer | None:
    lib = library()
    if lib is None or scores_NV.dtype not in SUFFIXES or scores_NV.stride(1) != 1:
        return None
    return _functions(lib)[name, scores_NV.dtype]


@functools.cache
def _functions(lib: ctypes.CDLL) -> dict[tuple[str, torch.dtype], ctypes._NamedFuncPointer]:
    compare(lib, DrawsStruct)
    return {
        (name, dtype): lib[f"chorus_{name}_{suffix}"]
        for name in ("argmax", "draw")
        for dtype, suffix in SUFFIXES.items()
    }
