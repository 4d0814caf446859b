"""The likeliest token of each row of logits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from server.native import SUFFIXES, library


def argmax(scores_NV: torch.Tensor) -> tuple[list[int], list[bool]]:
    """The index of each row's largest score, and whether that is finite (not in a row with a NaN).

    scores_NV: [N, vocabulary], any float type. Where it is not finite, the index means nothing.
    """
    lib = library() if scores_NV.device.type == "cpu" else None
    if lib is not None and scores_NV.dtype in SUFFIXES and scores_NV.stride(1) == 1:
        return _compiled(lib[f"chorus_argmax_{SUFFIXES[scores_NV.dtype]}"], scores_NV)
    indices_N = scores_NV.argmax(dim=-1)  # of a NaN where there is one
    finite_N = torch.isfinite(scores_NV.gather(1, indices_N[:, None])[:, 0])
    return indices_N.tolist(), finite_N.tolist()


def _compiled(function: Callable[..., None], scores_NV: torch.Tensor) -> tuple[list[int], list[bool]]:
    rows, width = scores_NV.shape
    indices = (ctypes.c_int64 * rows)()
    finite = (ctypes.c_bool * rows)()
    matrix = ctypes.c_void_p(scores_NV.data_ptr()), ctypes.c_int64(scores_NV.stride(0))
    sizes = ctypes.c_int64(rows), ctypes.c_int64(width)
    function(*matrix, *sizes, indices, finite, ctypes.c_int64(torch.get_num_threads()))
    return list(indices), list(finite)
