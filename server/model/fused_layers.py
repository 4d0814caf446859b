"""A model's decoder layers as one call of compiled code (native/decoder.cpp).

transformers runs a layer as some forty small operations; on the CPU a step of a few tokens spends more time
between them than in them. `fuse_layers` reads the layers of Llama and its relatives off the modules that
transformers built, whatever their names, and everything around the layers (embedding, positions, final norm,
output head) stays transformers' own. Whether it was read right is for the caller to check, by comparing logits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from server.lora.kernels.cpu import CpuKernels, SegmentsStruct
from server.lora.linear import LoraLinear, LoraStep
from server.model.attention.hf import PagedStep
from server.model.attention.interface import LayerCache
from server.model.attention.paged_cpu import AttentionStruct, PagedCpuAttention, PlanStruct
from server.model.packed_linear import LinearStruct, PackedLinear
from server.native import library


class NotFusable(Exception):
    """The layers are of another build than the compiled code knows; the message says how."""


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("eps", ctypes.c_float))


class _Layer(ctypes.Structure):
    """`ChorusLayer` of native/decoder.cpp."""

    _fields_ = (
        *((name, _Norm) for name in ("attention_in", "attention_out", "mlp_in", "mlp_out", "q_norm", "k_norm")),
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


class _Decoder(ctypes.Structure):
    """`ChorusDecoder` of native/decoder.cpp."""

    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("num_layers", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("plan", ctypes.POINTER(PlanStruct)),
        ("segments", ctypes.POINTER(SegmentsStruct)),
        ("cos", ctypes.POINTER(ctypes.c_void_p)),
        ("sin", ctypes.POINTER(ctypes.c_void_p)),
        *((name, ctypes.c_void_p) for name in ("hidden", "residual", "normed", "qkv", "attended")),
        *((name, ctypes.c_void_p) for name in ("projected", "gate_up", "activated")),
    )


@dataclass(frozen=True)
class _Widths:
    """Values per token of the buffers between the parts of a layer; the same in all layers of a model."""

    hidden: int
    qkv: int
    attended: int
    intermediate: int


class FusedLayers:
    """The layers of one model over its KV cache."""

    def __init__(
        self,
        layers: list[_Layer],
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
        self._layers = (_Layer * len(layers))(*layers)
        self._widths = widths
        self._keep_alive = keep_alive
        self._paged, self._attention = paged, attention
        self._lora, self._kernels = lora, kernels
        self._block_size = block_size
        self._dtype = dtype
        self._function = lib.chorus_decoder_f32 if dtype == torch.float32 else lib.chorus_decoder_bf16
        self._function.restype = None
        self._function.argtypes = [ctypes.POINTER(_Decoder), ctypes.c_int64]
        self._cos = (ctypes.c_void_p * len(layers))()
        self._sin = (ctypes.c_void_p * len(layers))()
        self._rotated = [layer.rotary_dim > 0 for layer in layers]
        self._rotary: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer: the tables behind the two arrays
        self._buffers: dict[str, torch.Tensor] = {}
        self._rows = 0

    def take_positions(self, layer: int, embeddings: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """The step's rotary tables of one layer, cos and sin, each [1, T, rotary_dim]."""
        if embeddings is None or not self._rotated[layer]:
            self._layers[layer].rotary_dim = 0
            return
        cos, sin = (table.to(self._dtype).contiguous() for table in embeddings)
        self._rotary[layer] = cos, sin
        self._layers[layer].rotary_dim = cos.shape[-1]
        self._cos[layer], self._sin[layer] = cos.data_ptr(), sin.data_ptr()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [1, T, hidden_size], the embedded tokens -> the same after the last layer."""
        plan, segments, arena = self._paged.plan, self._lora.segments, self._lora.arena
        assert plan is not None
        out = hidden.contiguous().clone()
        self._reserve(out.shape[1])
        step = _Decoder(
            self._layers,
            len(self._layers),
            self._widths.hidden,
            ctypes.pointer(self._attention.struct(plan, self._block_size)),
            None if segments is None or arena is None else ctypes.pointer(self._kernels.struct(segments, arena)),
            self._cos,
            self._sin,
            out.data_ptr(),
            *(buffer.data_ptr() for buffer in self._buffers.values()),
        )
        self._function(step, torch.get_num_threads())
        return out

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
            "gate_up": torch.empty(rows, 2 * w.intermediate, dtype=self._dtype),
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
    options: dict[int, dict[str, Any]],
    paged: PagedStep,
    attention: PagedCpuAttention,
    lora: LoraStep,
    kernels: CpuKernels,
) -> tuple[LayerSlot, ...]:
    """What to put in the place of `layers`. Raises NotFusable.

    `options` are each layer's keyword arguments of `AttentionBackend.forward`, as a forward showed them.
    """
    lib = library()
    if lib is None:
        raise NotFusable("no compiled kernels")
    reader = _Reader()
    read = [reader.layer(layer, caches[i], options[i]) for i, layer in enumerate(layers)]
    widths = {_widths(layer) for layer in read}
    if len(widths) != 1:
        raise NotFusable("layers of different widths")
    cache = caches[0].k
    fused = FusedLayers(
        read, widths.pop(), reader.keep_alive, paged, attention, lora, kernels, cache.shape[2], cache.dtype, lib
    )
    return tuple(LayerSlot(fused, i, last=i == len(read) - 1) for i in range(len(read)))


def _widths(layer: _Layer) -> _Widths:
    return _Widths(
        layer.output.out_features,
        sum(layer.qkv[i].out_features for i in range(layer.num_qkv)),
        layer.output.in_features,
        layer.down.in_features,
    )


class _Reader:
    """Reads layers off transformers' modules, and keeps the tensors that the result points to."""

    def __init__(self) -> None:
        self.keep_alive: list[torch.Tensor] = []
        self._read: set[int] = set()  # ids of the parameters understood so far

    def layer(self, layer: nn.Module, cache: LayerCache, options: dict[str, Any]) -> _Layer:
        attn, mlp = _part(layer, "self_attn"), _part(layer, "mlp")
        norms = self._wiring(layer)
        qkv = self._linears(attn, "qkv_proj") or self._linears(attn, "q_proj", "k_proj", "v_proj")
        gate_up = self._linears(mlp, "gate_up_proj") or self._linears(mlp, "gate_proj", "up_proj")
        output, down = self._linears(attn, "o_proj"), self._linears(mlp, "down_proj")
        if not (qkv and gate_up and output and down):
            raise NotFusable("its projections are not those of Llama")
        geometry = self._attention(output[0], qkv, cache, options)
        q_norm, k_norm = self._norm(attn, "q_norm"), self._norm(attn, "k_norm")
        result = _Layer(
            *norms,
            q_norm,
            k_norm,
            attn.q_norm.weight.numel() if q_norm.weight else 0,
            (LinearStruct * 3)(*qkv),
            output[0],
            (LinearStruct * 2)(*gate_up),
            down[0],
            len(qkv),
            len(gate_up),
            geometry,
            geometry.k_dim if getattr(attn, "use_rope", True) else 0,  # SmolLM 3 leaves it out at times
            self._is_gelu(mlp),
            getattr(layer, "residual_multiplier", 1.0),
        )
        unread = [name for name, p in layer.named_parameters() if id(p) not in self._read]
        if unread:
            raise NotFusable(f"a layer also has {', '.join(unread)}")
        return result

    def _wiring(self, layer: nn.Module) -> tuple[_Norm, _Norm, _Norm, _Norm]:
        """The norms before and after attention, before and after the MLP.

        `post_attention_layernorm` stands after the attention in models with a norm after the MLP (Gemma 2,
        OLMo 2) and before the MLP in the others (Llama).
        """
        entry = self._norm(layer, "input_layernorm")
        middle = self._norm(layer, "post_attention_layernorm")
        if hasattr(layer, "post_feedforward_layernorm"):
            mlp_in = self._norm(layer, "pre_feedforward_layernorm")
            return entry, middle, mlp_in, self._norm(layer, "post_feedforward_layernorm")
        return entry, _Norm(), middle, _Norm()

    def _norm(self, parent: nn.Module, name: str) -> _Norm:
        module = getattr(parent, name, None)
        if module is None:
            return _Norm()
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if weight is None or eps is None or weight.dim() != 1:
            raise NotFusable(f"{name} is not an RMSNorm")
        self._read.add(id(weight))
        x = torch.randn(1, weight.numel(), generator=torch.Generator().manual_seed(0))
        normed = x * torch.rsqrt(x.square().mean() + eps)
        scales = [weight.float(), 1.0 + weight.float()]  # Gemma's weights are around zero
        got = module(x.to(weight.dtype)).float()
        errors = [float((normed * scale - got).norm() / (got.norm() + 1e-30)) for scale in scales]
        best = min(range(2), key=errors.__getitem__)
        if not errors[best] < 0.05:
            raise NotFusable(f"{name} is not an RMSNorm")
        self.keep_alive.append(scales[best].contiguous())
        return _Norm(self.keep_alive[-1].data_ptr(), eps)

    def _linears(self, parent: nn.Module, *names: str) -> list[LinearStruct]:
        """The packed layers of these names, or [] where there are none."""
        found = [getattr(parent, name, None) for name in names]
        if all(layer is None for layer in found):
            return []
        structs = []
        for name, layer in zip(names, found, strict=True):
            if not isinstance(layer, LoraLinear) or not isinstance(layer.base, PackedLinear):
                raise NotFusable(f"{name} is not a packed Linear")
            structs.append(layer.base.struct(layer.module))
            self.keep_alive += layer.base.tensors()
        return structs

    def _attention(
        self, output: LinearStruct, qkv: list[LinearStruct], cache: LayerCache, options: dict[str, Any]
    ) -> AttentionStruct:
        kv_heads, k_dim, v_dim = cache.k.shape[1], cache.k.shape[3], cache.v.shape[3]
        heads = output.in_features // v_dim
        width = sum(linear.out_features for linear in qkv)
        if width != heads * k_dim + kv_heads * (k_dim + v_dim) or output.in_features != heads * v_dim:
            raise NotFusable("its query, key and value are not laid out as Llama's")
        sinks = options["sinks"]
        if sinks is not None:
            self._read.add(id(sinks))
            sinks = sinks.float().contiguous()
            self.keep_alive.append(sinks)
        self.keep_alive += (cache.k, cache.v)
        return AttentionStruct(
            k_cache=cache.k.data_ptr(),
            v_cache=cache.v.data_ptr(),
            heads=heads,
            kv_heads=kv_heads,
            k_dim=k_dim,
            v_dim=v_dim,
            window=options["sliding_window"] or 0,
            scale=options["scale"],
            softcap=options["softcap"] or 0.0,
            sinks=None if sinks is None else sinks.data_ptr(),
        )

    def _is_gelu(self, mlp: nn.Module) -> bool:
        activation = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
        if activation is None:
            raise NotFusable("its MLP has no gate")
        x = torch.linspace(-4, 4, 65)
        y = activation(x)
        known: list[Callable[[torch.Tensor], torch.Tensor]] = [
            functional.silu,
            lambda x: functional.gelu(x, approximate="tanh"),
        ]
        for index, function in enumerate(known):
            if torch.allclose(y, function(x), atol=1e-5):
                return bool(index)
        raise NotFusable("its activation is neither SiLU nor tanh GELU")


def _part(layer: nn.Module, name: str) -> nn.Module:
    part = getattr(layer, name, None)
    if not isinstance(part, nn.Module):
        raise NotFusable(f"a layer has no {name}")
    return part
