"""The likeliest token of each row of logits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from server.devices.cpu.native import SUFFIXES, library
from server.model.sampler import torch_argmax


def argmax(scores_NV: torch.Tensor) -> tuple[list[int], list[bool]]:
    """See `Operators.argmax`. Compiled where it can be, else torch's."""
    lib = library()
    if lib is not None and scores_NV.dtype in SUFFIXES and scores_NV.stride(1) == 1:
        return _compiled(lib[f"chorus_argmax_{SUFFIXES[scores_NV.dtype]}"], scores_NV)
    return torch_argmax(scores_NV)


def _compiled(function: Callable[..., None], scores_NV: torch.Tensor) -> tuple[list[int], list[bool]]:
    rows, width = scores_NV.shape
    indices = (ctypes.c_int64 * rows)()
    finite = (ctypes.c_bool * rows)()
    matrix = ctypes.c_void_p(scores_NV.data_ptr()), ctypes.c_int64(scores_NV.stride(0))
    sizes = ctypes.c_int64(rows), ctypes.c_int64(width)
    function(*matrix, *sizes, indices, finite, ctypes.c_int64(torch.get_num_threads()))
    return list(indices), list(finite)
