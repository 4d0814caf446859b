"""Reads the decoder layers of Llama and its relatives off the modules that transformers built.

What a layer does is told by which parts it has, and by running those (a norm, an activation) on a few
numbers; a part that is not understood is an error. Whether all of it was read right is for the caller to
check, by comparing logits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from server.lora.linear import LoraLinear
from server.model.attention.interface import AttentionOptions, LayerCache
from server.model.attention.paged_cpu import AttentionStruct
from server.model.packed_linear import LinearStruct, PackedLinear


class NotFusable(Exception):
    """The layers are of another build than the compiled code knows; the message says how."""


class NormStruct(ctypes.Structure):
    """`ChorusNorm` of native/decoder.cpp."""

    _fields_ = (("weight", ctypes.c_void_p), ("eps", ctypes.c_float))


class LayerStruct(ctypes.Structure):
    """`ChorusLayer` of native/decoder.cpp."""

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


class LayerReader:
    """Reads layers off transformers' modules, and keeps the tensors that the result points to."""

    def __init__(self) -> None:
        self.keep_alive: list[torch.Tensor] = []
        self._read: set[int] = set()  # ids of the parameters understood so far

    def layer(self, layer: nn.Module, cache: LayerCache, options: AttentionOptions) -> LayerStruct:
        attn, mlp = _part(layer, "self_attn"), _part(layer, "mlp")
        norms = self._wiring(layer)
        qkv = self._linears(attn, "qkv_proj") or self._linears(attn, "q_proj", "k_proj", "v_proj")
        gate_up = self._linears(mlp, "gate_up_proj") or self._linears(mlp, "gate_proj", "up_proj")
        output, down = self._linears(attn, "o_proj"), self._linears(mlp, "down_proj")
        if not (qkv and gate_up and output and down):
            raise NotFusable("its projections are not those of Llama")
        geometry = self._attention(output[0], qkv, cache, options)
        q_norm, k_norm = self.norm(attn, "q_norm"), self.norm(attn, "k_norm")
        q_norm_weight = getattr(getattr(attn, "q_norm", None), "weight", None)
        result = LayerStruct(
            *norms,
            q_norm,
            k_norm,
            0 if q_norm_weight is None else q_norm_weight.numel(),
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

    def _wiring(self, layer: nn.Module) -> tuple[NormStruct, NormStruct, NormStruct, NormStruct]:
        """The norms before and after attention, before and after the MLP.

        `post_attention_layernorm` stands after the attention in models with a norm after the MLP (Gemma 2,
        OLMo 2) and before the MLP in the others (Llama).
        """
        entry = self.norm(layer, "input_layernorm")
        middle = self.norm(layer, "post_attention_layernorm")
        if hasattr(layer, "post_feedforward_layernorm"):
            mlp_in = self.norm(layer, "pre_feedforward_layernorm")
            return entry, middle, mlp_in, self.norm(layer, "post_feedforward_layernorm")
        return entry, NormStruct(), middle, NormStruct()

    def norm(self, parent: nn.Module, name: str) -> NormStruct:
        """The RMSNorm of that name; one without a weight where there is none."""
        module = getattr(parent, name, None)
        if module is None:
            return NormStruct()
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if weight is None or eps is None or weight.dim() != 1:
            raise NotFusable(f"{name} is not an RMSNorm")
        self._read.add(id(weight))
        x = 1 + torch.randn(1, weight.numel(), generator=torch.Generator().manual_seed(0))
        normed = x * torch.rsqrt(x.square().mean() + eps)
        scale = weight.detach().float()
        scales = [scale, 1.0 + scale]  # Gemma's weights are around zero
        got = module(x.to(weight.dtype)).float()
        errors = [float((normed * scale - got).norm() / (got.norm() + 1e-30)) for scale in scales]
        best = min(range(2), key=errors.__getitem__)
        if not errors[best] < 0.05:
            raise NotFusable(f"{name} is not an RMSNorm")
        self.keep_alive.append(scales[best].contiguous())
        return NormStruct(self.keep_alive[-1].data_ptr(), eps)

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
        self, output: LinearStruct, qkv: list[LinearStruct], cache: LayerCache, options: AttentionOptions
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
