"""A model's decoder layers as one call of compiled code (devices/cpu/native/decoder.cpp).

transformers runs a layer as some forty small operations; on the CPU a step of a few tokens spends more time
between them than in them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from server.devices.cpu.attention import AttentionStruct, PagedCpuAttention, Plans, PlanStruct
from server.devices.cpu.linear import LinearStruct, PackedLinear
from server.devices.cpu.lora import CpuKernels, SegmentsStruct
from server.devices.cpu.native import SUFFIXES, Mirror, compare, constant, library
from server.lora.linear import LoraLinear
from server.model.attention.interface import AttentionBackend, AttentionOptions, LayerCache
from server.model.decoder_layers import DecoderLayers, Tables
from server.model.layer_reader import Layer, LayerReader, Norm, NotFusable
from server.model.step import Step


class NormStruct(Mirror):
    """`ChorusNorm` of devices/cpu/native/decoder.cpp."""

    c_name = "ChorusNorm"
    _fields_ = (("weight", ctypes.c_void_p), ("eps", ctypes.c_float))


class LayerStruct(Mirror):
    """`ChorusLayer` of devices/cpu/native/decoder.cpp."""

    c_name = "ChorusLayer"
    _fields_ = (
        *(
            (name, NormStruct)
            for name in ("attention_in", "attention_out", "mlp_in", "mlp_out", "q_norm", "k_norm")
        ),
        ("qk_norm_width", ctypes.c_int64),
        ("qkv", LinearStruct * 3),
        ("output", LinearStruct),
        ("gate_up", LinearStruct * 2),
        ("down", LinearStruct),
        ("num_qkv", ctypes.c_int64),
        ("num_gate_up", ctypes.c_int64),
        ("attention", AttentionStruct),
        ("rotary_dim", ctypes.c_int64),
        ("gelu", ctypes.c_int64),
        ("residual_multiplier", ctypes.c_float),
    )


class _Decoder(Mirror):
    """`ChorusDecoder` of devices/cpu/native/decoder.cpp."""

    c_name = "ChorusDecoder"
    _fields_ = (
        ("layers", ctypes.POINTER(LayerStruct)),
        ("num_layers", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("stretch", ctypes.c_int64),
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


class _Pointers:
    """The rotary tables of each layer, as compiled code takes them."""

    def __init__(self, tables: Sequence[Tables | None]) -> None:
        self._keep_alive = list(tables)
        addresses = ctypes.c_void_p * len(tables)
        self.cos, self.sin = (
            addresses(*(None if table is None else table[side].data_ptr() for table in tables))
            for side in range(2)
        )
        self.rotary_dims = [0 if table is None else table[0].shape[1] for table in tables]


class FusedLayers(DecoderLayers):
    """`DecoderLayers` in devices/cpu/native/decoder.cpp: one call a step.

    Where `attention` is not the compiled one, a call for each stretch between two attentions.
    """

    def __init__(
        self,
        layers: list[Layer],
        widths: _Widths,
        attention: AttentionBackend,
        kernels: CpuKernels,
        lib: ctypes.CDLL,
    ) -> None:
        dtype = _packed(layers[0].qkv[0]).tensors()[0].dtype
        super().__init__([layer.rotary for layer in layers], dtype)
        self._keep_alive: list[torch.Tensor] = []
        self._layers = (LayerStruct * len(layers))(*(_struct(layer, self._keep_alive) for layer in layers))
        self._widths = widths
        self._attention = None if isinstance(attention, PagedCpuAttention) else attention
        self._attentions = [(layer.cache, layer.options) for layer in layers]
        self._kernels, self._plans = kernels, Plans()
        # Another backend's cache is laid out as it likes, and compiled code leaves it alone.
        self._block_size = 0 if self._attention else layers[0].cache.k.shape[2]
        self._function = lib[f"chorus_decoder_{SUFFIXES[dtype]}"]
        self._function.restype = None
        self._function.argtypes = [ctypes.POINTER(_Decoder), ctypes.c_int64]
        self._kept: _Pointers | None = None
        self._tables_in_use: _Pointers | None = None  # that the layers are set for
        self._buffers: dict[str, torch.Tensor] = {}
        self._rows = 0

    def keep_positions(self, tables: Tables) -> None:
        self._kept = _Pointers([tables if rotated else None for rotated in self._rotated])

    def _all(self, hidden_TH: torch.Tensor, tables: Sequence[Tables | None], step: Step) -> torch.Tensor:
        out_TH = hidden_TH.contiguous().clone()
        self._call(step, out_TH, _Pointers(tables), None, NormStruct(), None, None)
        return out_TH

    def sample(
        self, hidden_TH: torch.Tensor, positions_T: torch.Tensor, norm: Norm, rows_N: torch.Tensor, step: Step
    ) -> torch.Tensor:
        assert self._kept is not None
        sampled_NH = hidden_TH.new_empty(rows_N.numel(), self._widths.hidden)
        self._call(step, hidden_TH, self._kept, positions_T, _norm_struct(norm), rows_N, sampled_NH)
        return sampled_NH

    def _call(
        self,
        step: Step,
        hidden: torch.Tensor,
        tables: _Pointers,
        positions: torch.Tensor | None,
        norm: NormStruct,
        rows: torch.Tensor | None,
        sampled: torch.Tensor | None,
    ) -> None:
        lora = step.lora
        if tables is not self._tables_in_use:
            self._tables_in_use = tables
            for layer, rotary_dim in zip(self._layers, tables.rotary_dims, strict=True):
                layer.rotary_dim = rotary_dim
        self._reserve(hidden.numel() // self._widths.hidden)
        decoder = _Decoder(
            self._layers,
            len(self._layers),
            self._widths.hidden,
            -1,
            ctypes.pointer(self._plans.struct(step.attention, self._block_size)),
            None
            if lora is None
            else ctypes.pointer(self._kernels.struct(lora.tokens, lora.arena, self._widths.side_by_side)),
            tables.cos,
            tables.sin,
            None if positions is None else positions.data_ptr(),
            norm,
            None if rows is None else rows.data_ptr(),
            0 if rows is None else rows.numel(),
            None if sampled is None else sampled.data_ptr(),
            hidden.data_ptr(),
            *(buffer.data_ptr() for buffer in self._buffers.values()),
        )
        if self._attention is None:
            self._function(decoder, torch.get_num_threads())
        else:
            self._in_stretches(decoder, self._attention, step)

    def _in_stretches(self, decoder: _Decoder, attention: AttentionBackend, step: Step) -> None:
        qkv_TW = self._buffers["qkv"][: step.attention.slot_mapping.numel()]
        for index, (cache, options) in enumerate(self._attentions):
            decoder.stretch = index
            self._function(decoder, torch.get_num_threads())
            attended = attention.forward(*cache.spec.split(qkv_TW), cache, step.attention, options)
            decoder.attended = attended.data_ptr()
        decoder.stretch = len(self._attentions)
        self._function(decoder, torch.get_num_threads())

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


def fuse_layers(
    layers: nn.ModuleList,
    caches: Mapping[int, LayerCache],
    options: Mapping[int, AttentionOptions],
    attention: AttentionBackend,
    kernels: CpuKernels,
) -> FusedLayers:
    """`layers` as compiled code; its `slots` are for their place. Raises NotFusable.

    `options` are each layer's, as a forward showed them.
    """
    lib = library()
    if lib is None:
        raise NotFusable("no compiled kernels")
    compare(lib, NormStruct, LayerStruct, _Decoder)
    reader = LayerReader()
    read = [reader.layer(layer, caches[i], options[i]) for i, layer in enumerate(layers)]
    widths = {_widths(layer) for layer in read}
    if len(widths) != 1:
        raise NotFusable("layers of different widths")
    panel = constant(lib, "panel")
    if any(len(layer.gate_up) == 1 and layer.down.in_features % panel for layer in read):
        raise NotFusable("gate and up are packed in one, and are not whole panels each")
    return FusedLayers(read, widths.pop(), attention, kernels, lib)


def _widths(layer: Layer) -> _Widths:
    return _Widths(
        layer.output.out_features,
        sum(linear.out_features for linear in layer.qkv),
        layer.output.in_features,
        layer.down.in_features,
    )


def _struct(layer: Layer, keep_alive: list[torch.Tensor]) -> LayerStruct:
    """The layer for compiled code; what it points to is added to `keep_alive`."""
    norms = (
        layer.attention_in, layer.attention_out, layer.mlp_in, layer.mlp_out, layer.q_norm, layer.k_norm
    )  # fmt: skip
    keep_alive += (norm.weight for norm in norms if norm is not None)
    linears = [_linear_struct(linear, keep_alive) for linear in (*layer.qkv, *layer.gate_up)]
    return LayerStruct(
        *(_norm_struct(norm) for norm in norms),
        0 if layer.q_norm is None else layer.q_norm.weight.numel(),
        (LinearStruct * 3)(*linears[: len(layer.qkv)]),
        _linear_struct(layer.output, keep_alive),
        (LinearStruct * 2)(*linears[len(layer.qkv) :]),
        _linear_struct(layer.down, keep_alive),
        len(layer.qkv),
        len(layer.gate_up),
        _attention_struct(layer, keep_alive),
        0,  # rotary_dim: as wide as the tables
        layer.activation == "gelu",
        layer.residual_multiplier,
    )


def _norm_struct(norm: Norm | None) -> NormStruct:
    return NormStruct() if norm is None else NormStruct(norm.weight.data_ptr(), norm.eps)


def _linear_struct(linear: LoraLinear, keep_alive: list[torch.Tensor]) -> LinearStruct:
    base = _packed(linear)
    keep_alive += base.tensors()
    return base.struct(linear.module)


def _packed(linear: LoraLinear) -> PackedLinear:
    if not isinstance(linear.base, PackedLinear):
        raise NotFusable("a Linear is not packed")
    return linear.base


def _attention_struct(layer: Layer, keep_alive: list[torch.Tensor]) -> AttentionStruct:
    cache, options = layer.cache, layer.options
    keep_alive += (cache.k, cache.v)
    sinks = options.sinks
    if sinks is not None:
        sinks = sinks.float().contiguous()
        keep_alive.append(sinks)
    return AttentionStruct(
        k_cache=cache.k.data_ptr(),
        v_cache=cache.v.data_ptr(),
        heads=cache.spec.num_heads,
        kv_heads=cache.spec.num_kv_heads,
        k_dim=cache.spec.k_head_dim,
        v_dim=cache.spec.v_head_dim,
        window=options.sliding_window or 0,
        scale=options.scale,
        softcap=options.softcap or 0.0,
        sinks=None if sinks is None else sinks.data_ptr(),
    )
