"""The likeliest token of each row of logits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from server.devices.cpu.native import SUFFIXES, library
from server.model.sampler import torch_argmax


def argmax(scores_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Operators.argmax`. Compiled where it can be, else torch's."""
    lib = library()
    if lib is not None and scores_NV.dtype in SUFFIXES and scores_NV.stride(1) == 1:
        return _compiled(lib[f"chorus_argmax_{SUFFIXES[scores_NV.dtype]}"], scores_NV)
    return torch_argmax(scores_NV)


def _compiled(function: Callable[..., None], scores_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = scores_NV.shape
    indices_N, finite_N = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.bool)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (scores_NV, indices_N, finite_N)]
    sizes = [ctypes.c_int64(size) for size in (scores_NV.stride(0), rows, width)]
    function(pointers[0], *sizes, *pointers[1:], ctypes.c_int64(torch.get_num_threads()))
    return indices_N, finite_N
