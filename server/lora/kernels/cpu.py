"""LoRA on the CPU through the compiled kernels: one call for each module, no Python loop over adapters."""

from __future__ import annotations

import ctypes

import torch

from server.lora.kernels.interface import ArenaView, LoraKernels
from server.lora.kernels.reference import ReferenceKernels
from server.lora.segments import Segments
from server.native import SUFFIXES, library

_MODULES_AT_ONCE = 3  # Q, K and V are computed side by side


class SegmentsStruct(ctypes.Structure):
    """`ChorusSegments` of native/lora.h."""

    _fields_ = (
        ("token_starts", ctypes.c_void_p),
        ("entry_starts", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("num_segments", ctypes.c_int64),
        ("modules", ctypes.c_int64),
        ("arena", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("scratch_stride", ctypes.c_int64),
        ("scratch_starts", ctypes.c_void_p),
        ("max_tokens", ctypes.c_int64),
    )


class CpuKernels:
    """`LoraKernels` in native/lora.h. What is the same for all modules of a step is passed once a step."""

    max_mix_rank = None

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._functions = {dtype: lib[f"chorus_lora_{suffix}"] for dtype, suffix in SUFFIXES.items()}
        for function in self._functions.values():
            function.restype = None
            matrix = (ctypes.c_void_p, ctypes.c_int64)
            function.argtypes = [
                ctypes.POINTER(SegmentsStruct),
                ctypes.c_int64,
                *matrix,
                *matrix,
                *[ctypes.c_int64] * 3,
            ]
        self._prepared: tuple[Segments, ArenaView, torch.Tensor] | None = None
        self._step = SegmentsStruct()
        self._scratch = torch.empty(0)

    def apply(
        self, out: torch.Tensor, x: torch.Tensor, module: int, segments: Segments, arena: ArenaView
    ) -> None:
        self._functions[out.dtype](
            self.struct(segments, arena),
            module,
            out.data_ptr(),
            out.stride(0),
            x.data_ptr(),
            x.stride(0),
            x.shape[1],
            out.shape[1],
            torch.get_num_threads(),
        )

    def struct(self, segments: Segments, arena: ArenaView) -> SegmentsStruct:
        """The step's segments for compiled code; valid until it is asked for another step's."""
        if self._prepared is None or self._prepared[0] is not segments or self._prepared[1] is not arena:
            self._prepare(segments, arena)
        return self._step

    def _prepare(self, segments: Segments, arena: ArenaView) -> None:
        # Room for x A^T of any module: each entry's tokens times its adapter's largest rank.
        tokens_E = segments.token_starts.diff().repeat_interleave(segments.entry_starts.diff())
        ends_E = (tokens_E * arena.ranks[segments.slots.long()].amax(dim=1)).cumsum(0)
        starts_E = torch.zeros_like(ends_E)
        starts_E[1:] = ends_E[:-1]
        needed = int(ends_E[-1]) if len(ends_E) else 0
        if self._scratch.numel() < needed * _MODULES_AT_ONCE:
            self._scratch = torch.empty(needed * _MODULES_AT_ONCE)
        self._step = SegmentsStruct(
            segments.token_starts.data_ptr(),
            segments.entry_starts.data_ptr(),
            segments.slots.data_ptr(),
            segments.weights.data_ptr(),
            segments.num_segments,
            arena.ranks.shape[1],
            arena.data.data_ptr(),
            arena.offsets.data_ptr(),
            arena.ranks.data_ptr(),
            self._scratch.data_ptr(),
            needed,
            starts_E.data_ptr(),
            segments.max_tokens,
        )
        self._prepared = (segments, arena, starts_E)  # keeps the tensors behind the pointers alive


def cpu_kernels(dtype: torch.dtype) -> LoraKernels:
    """The compiled kernels where they are there and know `dtype`, the reference elsewhere."""
    lib = library()
    if lib is None or dtype not in SUFFIXES:
        return ReferenceKernels()
    return CpuKernels(lib)
