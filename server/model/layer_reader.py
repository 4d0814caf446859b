"""Reads the decoder layers of Llama and its relatives off the modules that transformers built.

What a layer does is told by which parts it has, and by running those (a norm, an activation) on a few
numbers; a part that is not understood is an error. Whether all of it was read right is for the caller to
check, by comparing logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from server.lora.linear import LoraLinear
from server.model.attention.interface import AttentionOptions, LayerCache

Activation = Literal["silu", "gelu"]  # gelu: by tanh


class NotFusable(Exception):
    """The layers are of another build than the fused code knows; the message says how."""


@dataclass(frozen=True)
class Norm:
    """RMSNorm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight."""

    weight: torch.Tensor  # [values normed together] float32, as it multiplies: where a model adds 1, with it
    eps: float


@dataclass(frozen=True)
class Layer:
    """One decoder layer: x += m * norm(attention(norm(x))), x += m * norm(mlp(norm(x))).

    m is the `residual_multiplier`; a norm that is None is not there.
    """

    attention_in: Norm | None
    attention_out: Norm | None
    mlp_in: Norm | None
    mlp_out: Norm | None
    q_norm: Norm | None  # of each head, or of all heads at once: as wide as its weight
    k_norm: Norm | None
    qkv: tuple[LoraLinear, ...]  # one that holds all three, or Q, K and V
    output: LoraLinear
    gate_up: tuple[LoraLinear, ...]  # one that holds both, or gate and up
    down: LoraLinear
    cache: LayerCache  # says how many heads there are, and how wide
    options: AttentionOptions
    rotary: bool
    activation: Activation
    residual_multiplier: float


class LayerReader:
    """Reads one layer after another."""

    def __init__(self) -> None:
        self._read: set[int] = set()  # ids of the parameters understood so far

    def layer(self, layer: nn.Module, cache: LayerCache, options: AttentionOptions) -> Layer:
        """Raises NotFusable where the layer is, or holds, something else.

        `options`: what it asks of the attention, as a forward showed it.
        """
        attn, mlp = _part(layer, "self_attn"), _part(layer, "mlp")
        norms = self._wiring(layer)
        qkv = self._linears(attn, "qkv_proj") or self._linears(attn, "q_proj", "k_proj", "v_proj")
        gate_up = self._linears(mlp, "gate_up_proj") or self._linears(mlp, "gate_proj", "up_proj")
        output, down = self._linears(attn, "o_proj"), self._linears(mlp, "down_proj")
        if not (qkv and gate_up and output and down):
            raise NotFusable("its projections are not those of Llama")
        spec = cache.spec
        width = spec.num_heads * spec.k_head_dim + spec.elements_per_token()
        attended = spec.num_heads * spec.v_head_dim
        if sum(linear.out_features for linear in qkv) != width or output[0].in_features != attended:
            raise NotFusable("its query, key and value are not laid out as Llama's")
        if options.sinks is not None:
            self._read.add(id(options.sinks))
        result = Layer(
            *norms,
            q_norm=self.norm(attn, "q_norm"),
            k_norm=self.norm(attn, "k_norm"),
            qkv=qkv,
            output=output[0],
            gate_up=gate_up,
            down=down[0],
            cache=cache,
            options=options,
            rotary=bool(getattr(attn, "use_rope", True)),  # SmolLM 3 leaves it out at times
            activation=_activation(mlp),
            residual_multiplier=getattr(layer, "residual_multiplier", 1.0),
        )
        unread = [name for name, p in layer.named_parameters() if id(p) not in self._read]
        if unread:
            raise NotFusable(f"a layer also has {', '.join(unread)}")
        return result

    def _wiring(self, layer: nn.Module) -> tuple[Norm | None, Norm | None, Norm | None, Norm | None]:
        """The norms before and after attention, before and after the MLP.

        `post_attention_layernorm` stands after the attention in models with a norm after the MLP (Gemma 2,
        OLMo 2) and before the MLP in the others (Llama).
        """
        entry = self.norm(layer, "input_layernorm")
        middle = self.norm(layer, "post_attention_layernorm")
        if hasattr(layer, "post_feedforward_layernorm"):
            mlp_in = self.norm(layer, "pre_feedforward_layernorm")
            return entry, middle, mlp_in, self.norm(layer, "post_feedforward_layernorm")
        return entry, None, middle, None

    def norm(self, parent: nn.Module, name: str) -> Norm | None:
        """The RMSNorm of that name, or None where there is none."""
        module = getattr(parent, name, None)
        if module is None:
            return None
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if weight is None or eps is None or weight.dim() != 1:
            raise NotFusable(f"{name} is not an RMSNorm")
        self._read.add(id(weight))
        x = 1 + torch.randn(1, weight.numel(), generator=torch.Generator().manual_seed(0)).to(weight.device)
        normed = x * torch.rsqrt(x.square().mean() + eps)
        scale = weight.detach().float()
        scales = [scale, 1.0 + scale]  # Gemma's weights are around zero
        got = module(x.to(weight.dtype)).float()
        errors = [float((normed * scale - got).norm() / (got.norm() + 1e-30)) for scale in scales]
        best = min(range(2), key=errors.__getitem__)
        if not errors[best] < 0.05:
            raise NotFusable(f"{name} is not an RMSNorm")
        return Norm(scales[best].contiguous(), eps)

    def _linears(self, parent: nn.Module, *names: str) -> tuple[LoraLinear, ...]:
        """The Linears of these names, or () where there are none."""
        found = [getattr(parent, name, None) for name in names]
        if all(layer is None for layer in found):
            return ()
        linears = []
        for name, layer in zip(names, found, strict=True):
            if not isinstance(layer, LoraLinear):
                raise NotFusable(f"{name} is not a Linear")
            linears.append(layer)
            self._read.update(id(p) for p in layer.parameters())
        return tuple(linears)


_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
}


def _activation(mlp: nn.Module) -> Activation:
    module = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    if module is None:
        raise NotFusable("its MLP has no gate")
    x = torch.linspace(-4, 4, 65)
    y = module(x)
    for name, function in _ACTIVATIONS.items():
        if torch.allclose(y, function(x), atol=1e-5):
            return name
    raise NotFusable("its activation is neither SiLU nor tanh GELU")


def _part(layer: nn.Module, name: str) -> nn.Module:
    part = getattr(layer, name, None)
    if not isinstance(part, nn.Module):
        raise NotFusable(f"a layer has no {name}")
    return part
