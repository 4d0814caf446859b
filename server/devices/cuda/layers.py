"""A model's decoder layers on CUDA: a few launches a layer instead of transformers' forty.

Matrix products are torch's (cuBLAS), attention and LoRA are the kernels that the modules would call too, and
what is between them are the kernels of layer_kernels.py. Linears of one input are one product. Nothing waits
for the device and no shape depends on what is computed, so a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

from server.devices.cuda.attention import PagedTritonAttention
from server.devices.cuda.layer_kernels import HeadNorm, activate, add_norm, norm_rotate, rotate_write
from server.devices.cuda.levers import Levers
from server.lora.linear import LoraLinear
from server.model.attention.interface import AttentionBackend, AttentionOptions, LayerCache
from server.model.decoder_layers import DecoderLayers, Tables
from server.model.layer_reader import Layer, LayerReader, Norm, NotFusable
from server.model.step import Step


class _JointLinear:
    """Linears of one input as one matrix product, their outputs side by side, with what LoRA adds to each.

    The weights are concatenated, and the Linears' own become views of that: they work as before, and memory
    holds the weights once.
    """

    def __init__(self, linears: tuple[LoraLinear, ...]) -> None:
        first = linears[0]
        if [linear.module for linear in linears] != list(range(first.module, first.module + len(linears))):
            raise NotFusable("Linears of one input are not neighbours")
        self._begin_lora = first.begin
        self._widths = tuple(linear.out_features for linear in linears)
        bases = [_plain(linear) for linear in linears]
        self._weight: torch.Tensor = bases[0].weight
        self._bias: torch.Tensor | None = bases[0].bias
        if len(bases) == 1:
            return  # packed by the model already
        self._weight = torch.cat([base.weight.detach() for base in bases])
        if any(base.bias is not None for base in bases):
            self._bias = torch.cat(
                [self._weight.new_zeros(base.out_features) if base.bias is None else base.bias.detach()
                 for base in bases]
            )  # fmt: skip
        end = 0
        for base in bases:
            mine = slice(end, end := end + base.out_features)
            base.weight = nn.Parameter(self._weight[mine], requires_grad=False)
            if base.bias is not None:
                base.bias = nn.Parameter(self._bias[mine], requires_grad=False)
        if self._weight.is_cuda:
            torch.cuda.empty_cache()  # what was freed is in pieces too small for the next layer's weights

    def __call__(self, x_TI: torch.Tensor, step: Step) -> torch.Tensor:
        """[T, in_features] -> [T, the sum of the Linears' out_features]."""
        begun = self._begin_lora(x_TI, step.lora, self._widths)
        y_TO = functional.linear(x_TI, self._weight, self._bias)
        if begun is not None:
            begun.finish(y_TO)
        return y_TO


def _plain(linear: LoraLinear) -> nn.Linear:
    """Its base, if that is nothing but a matrix: a quantised one is left to its own code."""
    if type(linear.base) is not nn.Linear:
        raise NotFusable(f"a Linear is a {type(linear.base).__name__}")
    return linear.base


class _TritonLayer:
    """One layer between two sums: `layer` says what it is."""

    def __init__(self, layer: Layer, backend: AttentionBackend, levers: Levers) -> None:
        self.layer = layer
        self._backend, self._dependent = backend, levers.dependent_launch
        # whose cache `rotate_write` knows
        self._triton = backend if isinstance(backend, PagedTritonAttention) and levers.rotate_write else None
        self._head_norm = _head_norm(layer)
        self._qkv, self._gate_up = _JointLinear(layer.qkv), _JointLinear(layer.gate_up)

    def attention(
        self, normed_TH: torch.Tensor, tables: Tables | None, positions_T: torch.Tensor, step: Step
    ) -> torch.Tensor:
        """The normed input -> what attention adds to the sum, before its own norm: both [T, hidden_size]."""
        layer, norm, plan = self.layer, self._head_norm, step.attention
        cache, spec, dependent = layer.cache, layer.cache.spec, self._dependent
        qkv_TW = self._qkv(normed_TH, step)
        if self._triton is not None:
            slots_T = plan.slot_mapping
            rotate_write(qkv_TW, cache, slots_T, norm, tables, positions_T, dependent=dependent)
            attended = self._triton.attend(spec.split(qkv_TW)[0], cache, plan, layer.options)
        else:
            heads = spec.num_heads, spec.num_kv_heads, spec.k_head_dim
            norm_rotate(qkv_TW, *heads, norm, tables, positions_T, dependent=dependent)
            attended = self._backend.forward(*spec.split(qkv_TW), cache, plan, layer.options)
        return layer.output.adapted(attended.flatten(1), step.lora)

    def mlp(self, normed_TH: torch.Tensor, step: Step) -> torch.Tensor:
        """The normed sum -> what the MLP adds to it, before its own norm: both [T, hidden_size]."""
        gate_up_TW = self._gate_up(normed_TH, step)
        activated_TI = activate(gate_up_TW, self.layer.activation, dependent=self._dependent)
        return self.layer.down.adapted(activated_TI, step.lora)


def _head_norm(layer: Layer) -> HeadNorm | None:
    q, k = layer.q_norm, layer.k_norm
    if q is None and k is None:
        return None
    spec = layer.cache.spec
    dim = spec.k_head_dim
    if q is None or k is None or q.eps != k.eps:
        raise NotFusable("its query and key are normed in different ways")
    widths = q.weight.numel(), k.weight.numel()
    if widths not in ((dim, dim), (spec.num_heads * dim, spec.num_kv_heads * dim)):
        raise NotFusable("its query and key are normed neither by the head nor as a whole")
    return HeadNorm(torch.cat([q.weight, k.weight]), q.eps, per_head=widths == (dim, dim))


class TritonLayers(DecoderLayers):
    """`DecoderLayers` of torch's matrix products and Triton kernels.

    The sum x is float32 from the first layer to the last, as in the CPU's decoder.cpp: transformers rounds it
    to the model's type twice a layer. That costs memory traffic, 4 bytes a value instead of 2, beside
    products that read the layer's whole weights (decode) or compute for longer than it takes (prompts).
    """

    def __init__(self, layers: Sequence[Layer], backend: AttentionBackend, levers: Levers) -> None:
        super().__init__([layer.rotary for layer in layers], _plain(layers[0].qkv[0]).weight.dtype)
        self._layers = [_TritonLayer(layer, backend, levers) for layer in layers]
        self._dependent = levers.dependent_launch
        self._kept: list[Tables | None] = []

    def keep_positions(self, tables: Tables) -> None:
        self._kept = [tables if rotated else None for rotated in self._rotated]

    def sample(
        self, hidden_TH: torch.Tensor, positions_T: torch.Tensor, norm: Norm, rows_N: torch.Tensor, step: Step
    ) -> torch.Tensor:
        return self._run(hidden_TH, self._kept, positions_T, norm, rows_N, step)

    def _all(self, hidden_TH: torch.Tensor, tables: Sequence[Tables | None], step: Step) -> torch.Tensor:
        rows_T = torch.arange(len(hidden_TH), device=hidden_TH.device)
        return self._run(hidden_TH.contiguous(), tables, rows_T, None, None, step)

    def _run(
        self,
        hidden_TH: torch.Tensor,
        tables: Sequence[Tables | None],
        positions_T: torch.Tensor,
        norm: Norm | None,
        rows_N: torch.Tensor | None,
        step: Step,
    ) -> torch.Tensor:
        """`positions_T`: each token's row of the tables; `rows_N`: the tokens that are wanted, None = all.

        The rows are chosen at the end: after the last attention, LoRA would need segments of them.
        """
        residual_TH = torch.empty_like(hidden_TH, dtype=torch.float32)
        first = self._layers[0].layer
        normed_TH = add_norm(hidden_TH, residual_TH, first.attention_in, begin=True)  # after torch's work
        for index, run in enumerate(self._layers):
            layer, last = run.layer, index + 1 == len(self._layers)
            attended_TH = run.attention(normed_TH, tables[index], positions_T, step)
            normed_TH = add_norm(
                attended_TH,
                residual_TH,
                layer.mlp_in,
                x_norm=layer.attention_out,
                multiplier=layer.residual_multiplier,
                dependent=self._dependent,
            )
            normed_TH = add_norm(
                run.mlp(normed_TH, step),
                residual_TH,
                norm if last else self._layers[index + 1].layer.attention_in,
                x_norm=layer.mlp_out,
                multiplier=layer.residual_multiplier,
                rows_N=rows_N if last else None,
                dependent=self._dependent,
            )
        return normed_TH


def triton_layers(
    layers: nn.ModuleList,
    caches: Mapping[int, LayerCache],
    options: Mapping[int, AttentionOptions],
    backend: AttentionBackend,
    levers: Levers,
) -> TritonLayers:
    """`layers` as `TritonLayers`; its `slots` are for their place. Raises NotFusable.

    `options` are each layer's, as a forward showed them. The modules' weights may move (`_JointLinear`), even
    where it raises; they compute the same as before.
    """
    reader = LayerReader()
    read = [reader.layer(layer, caches[i], options[i]) for i, layer in enumerate(layers)]
    return TritonLayers(read, backend, levers)
