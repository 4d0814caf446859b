"""LoRA on the CPU through the compiled kernels: one call for each module, no Python loop over adapters."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from server.devices.cpu.native import SUFFIXES, Mirror, compare, constant, library
from server.lora.kernels.interface import SCRATCH_BYTES, ArenaView, Begun, Modules, Part
from server.lora.segments import Segments

_MODULES_AT_ONCE = 3  # Q, K and V are computed side by side
_COLUMNS_AT_ONCE = 256  # of B, that a thread turns into panels: kLoraColumns in native/lora.h


class SegmentsStruct(Mirror):
    """`ChorusSegments` of devices/cpu/native/lora.h."""

    c_name = "ChorusSegments"
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
        ("products", ctypes.c_void_p),
        ("product_stride", ctypes.c_int64),
        ("product_starts", ctypes.c_void_p),
        ("deltas", ctypes.c_void_p),
        ("delta_stride", ctypes.c_int64),
        ("more", ctypes.c_int64),
    )


class CpuKernels:
    """`LoraKernels` in native/lora.h. What is the same for all modules of a step is passed once a step."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        compare(lib, SegmentsStruct)
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
        if (parts := constant(lib, "lora_parts")) != len(Part):
            raise RuntimeError(f"the compiled CPU kernels know {parts} parts of an adapter, not {len(Part)}")
        self._few_tokens = constant(lib, "few_tokens")
        self._prepared: tuple[Segments, ArenaView, torch.Tensor] | None = None
        self._step = SegmentsStruct()
        self._products = torch.empty(0)
        self._deltas = torch.empty(0)
        self._width = 0

    def max_mix_rank(self, tokens: int) -> int:
        """x A^T in float32 of the modules that are computed side by side, and the panels of each thread."""
        width = _MODULES_AT_ONCE * tokens + _COLUMNS_AT_ONCE * torch.get_num_threads()
        return SCRATCH_BYTES // (4 * width)

    def prepare(self, segments: Segments) -> Segments:
        return segments

    def begin(self, x_TI: torch.Tensor, modules: Modules, segments: Segments, arena: ArenaView) -> Begun:
        return _Begun(self, x_TI, modules, segments, arena)

    def finish(self, y_TO: torch.Tensor, x_TI: torch.Tensor, module: int, step: SegmentsStruct) -> None:
        """Both products of one module, added to the base's output."""
        self._functions[y_TO.dtype](
            step,
            module,
            y_TO.data_ptr(),
            y_TO.stride(0),
            x_TI.data_ptr(),
            x_TI.stride(0),
            x_TI.shape[1],
            y_TO.shape[1],
            torch.get_num_threads(),
        )

    def struct(self, segments: Segments, arena: ArenaView, width: int) -> SegmentsStruct:
        """The step's segments for compiled code; valid until it is asked for another step's.

        `width`: the outputs, at most, of linears that compiled code takes together because they share x.
        """
        if (
            self._prepared is None
            or self._prepared[0] is not segments
            or self._prepared[1] is not arena
            or self._width < width
        ):
            self._width = max(self._width, width)
            self._prepare(segments, arena)
        return self._step

    def _prepare(self, segments: Segments, arena: ArenaView) -> None:
        # Room for x A^T of any module: a segment's tokens times the ranks of its adapters there.
        ranks_EM = arena.ranks[segments.slots.long()]
        ends_EM = torch.cat([torch.zeros(1, ranks_EM.shape[1], dtype=torch.int64), ranks_EM.cumsum(0)])
        ranks_G = ends_EM[segments.entry_starts.long()].diff(dim=0).amax(dim=1)
        ends_G = (segments.token_starts.diff() * ranks_G).cumsum(0)
        starts_G = torch.cat([torch.zeros(1, dtype=torch.int64), ends_G])
        needed = int(starts_G[-1])
        self._products = _at_least(self._products, needed * _MODULES_AT_ONCE)
        self._deltas = _at_least(self._deltas, segments.num_segments * self._few_tokens * self._width)
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
            self._products.data_ptr(),
            needed,
            starts_G.data_ptr(),
            self._deltas.data_ptr(),
            self._width,
            bool(arena.offsets[:, :, Part.GAIN :][segments.slots.long()].any()),
        )
        self._prepared = (segments, arena, starts_G)  # keeps the tensors behind the pointers alive


@dataclass(frozen=True)
class _Begun:
    """All cores work on the base's product at the time, so nothing is computed before it is there."""

    kernels: CpuKernels
    x: torch.Tensor  # [T, in_features]
    modules: Modules
    segments: Segments
    arena: ArenaView

    def finish(self, y_TO: torch.Tensor) -> None:
        for module, out_TO in self.modules.each(y_TO):
            step = self.kernels.struct(self.segments, self.arena, out_TO.shape[1])
            self.kernels.finish(out_TO, self.x, module, step)


def _at_least(buffer: torch.Tensor, elements: int) -> torch.Tensor:
    return buffer if buffer.numel() >= elements else torch.empty(elements)


def cpu_kernels(dtype: torch.dtype) -> CpuKernels | None:
    """The compiled kernels, where they are there and know `dtype`."""
    lib = library()
    return None if lib is None or dtype not in SUFFIXES else CpuKernels(lib)
