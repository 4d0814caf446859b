"""A model's decoder layers as one call of compiled code (native/decoder.cpp).

transformers runs a layer as some forty small operations; on the CPU a step of a few tokens spends more time
between them than in them. What is around the layers (embedding, positions, final norm, output head) is
transformers' own here; flat_model.py takes it over where it can.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from server.lora.kernels.cpu import CpuKernels, SegmentsStruct
from server.lora.linear import LoraStep
from server.model.attention.hf import PagedStep
from server.model.attention.interface import AttentionOptions, LayerCache
from server.model.attention.paged_cpu import PagedCpuAttention, PlanStruct
from server.model.layer_reader import LayerReader, LayerStruct, NormStruct, NotFusable
from server.native import SUFFIXES, constant, library


class _Decoder(ctypes.Structure):
    """`ChorusDecoder` of native/decoder.cpp."""

    _fields_ = (
        ("layers", ctypes.POINTER(LayerStruct)),
        ("num_layers", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("plan", ctypes.POINTER(PlanStruct)),
        ("segments", ctypes.POINTER(SegmentsStruct)),
        ("cos", ctypes.POINTER(ctypes.c_void_p)),
        ("sin", ctypes.POINTER(ctypes.c_void_p)),
        ("positions", ctypes.c_void_p),
        ("final_norm", NormStruct),
        ("sample_rows", ctypes.c_void_p),
        ("num_samples", ctypes.c_int64),
        ("sampled", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("hidden", "residual", "normed", "qkv", "attended")),
        *((name, ctypes.c_void_p) for name in ("projected", "activated")),
    )


@dataclass(frozen=True)
class _Widths:
    """Values per token of the buffers between the parts of a layer; the same in all layers of a model."""

    hidden: int
    qkv: int
    attended: int
    intermediate: int

    @property
    def side_by_side(self) -> int:
        """Outputs, at most, of linears that read the same x."""
        return max(self.hidden, self.qkv, 2 * self.intermediate)


class FusedLayers:
    """The layers of one model over its KV cache."""

    def __init__(
        self,
        layers: list[LayerStruct],
        widths: _Widths,
        keep_alive: list[torch.Tensor],
        paged: PagedStep,
        attention: PagedCpuAttention,
        lora: LoraStep,
        kernels: CpuKernels,
        block_size: int,
        dtype: torch.dtype,
        lib: ctypes.CDLL,
    ) -> None:
        self._layers = (LayerStruct * len(layers))(*layers)
        self._widths = widths
        self._keep_alive = keep_alive
        self._paged, self._attention = paged, attention
        self._lora, self._kernels = lora, kernels
        self._block_size = block_size
        self._dtype = dtype
        self._function = lib[f"chorus_decoder_{SUFFIXES[dtype]}"]
        self._function.restype = None
        self._function.argtypes = [ctypes.POINTER(_Decoder), ctypes.c_int64]
        self._cos = (ctypes.c_void_p * len(layers))()
        self._sin = (ctypes.c_void_p * len(layers))()
        self._rotated = [layer.rotary_dim > 0 for layer in layers]
        self.one_table = False  # whether all layers of the last forward got the same rotary tables
        self._embeddings: tuple[torch.Tensor, torch.Tensor] | None = None  # the layer before's
        self._tables = (0, 0, 0)  # pointers and width of the same
        self._in_use: list[torch.Tensor] = []  # what the two arrays point to
        self._kept: tuple[torch.Tensor, ...] = ()  # tables of all positions
        self._kept_tables: tuple[ctypes.Array[ctypes.c_void_p], ...] = ()  # pointers to them for each layer
        self._buffers: dict[str, torch.Tensor] = {}
        self._rows = 0

    def slots(self) -> tuple[LayerSlot, ...]:
        """What to put in the place of the layers."""
        last = len(self._layers) - 1
        return tuple(LayerSlot(self, i, last=i == last) for i in range(last + 1))

    def take_positions(self, layer: int, embeddings: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """The step's rotary tables of one layer, cos and sin, each [1, T, rotary_dim]."""
        if embeddings is None or not self._rotated[layer]:
            self._layers[layer].rotary_dim = 0
            return
        if embeddings is not self._embeddings:  # most models hand all layers the same
            self.one_table = self._embeddings is None
            self._embeddings = embeddings
            cos, sin = (table.to(self._dtype).contiguous() for table in embeddings)
            self._tables = cos.data_ptr(), sin.data_ptr(), cos.shape[-1]
            self._in_use += (cos, sin)
        self._cos[layer], self._sin[layer], self._layers[layer].rotary_dim = self._tables

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [1, T, hidden_size], the embedded tokens -> the same after the last layer."""
        out = hidden.contiguous().clone()
        self._call(out, None, NormStruct(), None, None)
        self._embeddings, self._in_use = None, []
        return out

    def keep_positions(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotary tables of all positions, each [positions, rotary_dim], for all later calls of `sample`."""
        self._kept = cos, sin
        pointers = ctypes.c_void_p * len(self._layers)
        self._kept_tables = tuple(pointers(*[table.data_ptr()] * len(self._layers)) for table in self._kept)
        for layer, rotated in zip(self._layers, self._rotated, strict=True):
            layer.rotary_dim = cos.shape[-1] if rotated else 0

    def sample(
        self, hidden_TH: torch.Tensor, positions_T: torch.Tensor, norm: NormStruct, rows_N: torch.Tensor
    ) -> torch.Tensor:
        """The embedded tokens (lost after) -> those in `rows_N` after the last layer and `norm`: [N, H]."""
        sampled_NH = hidden_TH.new_empty(rows_N.numel(), self._widths.hidden)
        self._call(hidden_TH, positions_T, norm, rows_N, sampled_NH)
        return sampled_NH

    def _call(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor | None,
        norm: NormStruct,
        rows: torch.Tensor | None,
        sampled: torch.Tensor | None,
    ) -> None:
        plan, segments, arena = self._paged.plan, self._lora.segments, self._lora.arena
        assert plan is not None
        self._reserve(hidden.numel() // self._widths.hidden)
        step = _Decoder(
            self._layers,
            len(self._layers),
            self._widths.hidden,
            ctypes.pointer(self._attention.struct(plan, self._block_size)),
            None
            if segments is None or arena is None
            else ctypes.pointer(self._kernels.struct(segments, arena, self._widths.side_by_side)),
            *((self._cos, self._sin) if positions is None else self._kept_tables),
            None if positions is None else positions.data_ptr(),
            norm,
            None if rows is None else rows.data_ptr(),
            0 if rows is None else rows.numel(),
            None if sampled is None else sampled.data_ptr(),
            hidden.data_ptr(),
            *(buffer.data_ptr() for buffer in self._buffers.values()),
        )
        self._function(step, torch.get_num_threads())

    def _reserve(self, rows: int) -> None:
        if rows <= self._rows:
            return
        w = self._widths
        self._buffers = {  # in the order of _Decoder's fields
            "residual": torch.empty(rows, w.hidden),
            "normed": torch.empty(rows, w.hidden, dtype=self._dtype),
            "qkv": torch.empty(rows, w.qkv, dtype=self._dtype),
            "attended": torch.empty(rows, w.attended, dtype=self._dtype),
            "projected": torch.empty(rows, w.hidden, dtype=self._dtype),
            "activated": torch.empty(rows, w.intermediate, dtype=self._dtype),
        }
        self._rows = rows


class LayerSlot:
    """Stands where a layer stood: hands over its rotary tables; the last one runs them all."""

    def __init__(self, fused: FusedLayers, index: int, *, last: bool) -> None:
        self._fused, self._index, self._last = fused, index, last

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *_: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **__: Any,
    ) -> torch.Tensor:
        self._fused.take_positions(self._index, position_embeddings)
        return self._fused.forward(hidden_states) if self._last else hidden_states


def fuse_layers(
    layers: nn.ModuleList,
    caches: dict[int, LayerCache],
    options: dict[int, AttentionOptions],
    paged: PagedStep,
    attention: PagedCpuAttention,
    lora: LoraStep,
    kernels: CpuKernels,
) -> FusedLayers:
    """`layers` as compiled code; its `slots` are for their place. Raises NotFusable.

    `options` are each layer's, as a forward showed them.
    """
    lib = library()
    if lib is None:
        raise NotFusable("no compiled kernels")
    reader = LayerReader()
    read = [reader.layer(layer, caches[i], options[i]) for i, layer in enumerate(layers)]
    widths = {_widths(layer) for layer in read}
    if len(widths) != 1:
        raise NotFusable("layers of different widths")
    panel = constant(lib, "panel")
    if any(layer.num_gate_up == 1 and layer.down.in_features % panel for layer in read):
        raise NotFusable("gate and up are packed in one, and are not whole panels each")
    cache = caches[0].k
    return FusedLayers(
        read,
        widths.pop(),
        reader.keep_alive,
        paged,
        attention,
        lora,
        kernels,
        cache.shape[2],
        cache.dtype,
        lib,
    )


def _widths(layer: LayerStruct) -> _Widths:
    return _Widths(
        layer.output.out_features,
        sum(layer.qkv[i].out_features for i in range(layer.num_qkv)),
        layer.output.in_features,
        layer.down.in_features,
    )
