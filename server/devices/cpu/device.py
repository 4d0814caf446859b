"""The host's own processor: compiled kernels where this machine has them, else torch's and the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from server.config import Settings
from server.devices.cpu.attention import compiled_attention
from server.devices.cpu.layers import fuse_layers
from server.devices.cpu.linear import packed
from server.devices.cpu.lora import CpuKernels, cpu_kernels
from server.devices.cpu.sampling import argmax, draw
from server.lora.copies import Copies, HostCopies
from server.lora.kernels.reference import ReferenceKernels
from server.model.attention.backends import NewBackend, open_attention
from server.model.attention.interface import AttentionOptions, LayerCache
from server.model.attention.paged_reference import PagedReferenceAttention
from server.model.decoder_layers import DecoderLayers
from server.model.device import Forward, Operators, PlainOperators, Prepare, Sizes
from server.model.loader import LoadedModel
from server.model.sampling import Draws

# By name, the fastest first.
_ATTENTION: Mapping[str, NewBackend] = {
    "compiled": lambda layers: compiled_attention(layers.dtype),
    "reference": lambda layers: PagedReferenceAttention(),
}

# All three stores come out of the same memory, and the operating system and its page cache want some.
_KV, _ARENA, _HOST = 0.25, 0.20, 0.10
_CAP = 4 * 2**30  # no more than this each, unless asked for: a laptop is not a server
_PROMPT_TOKENS_PER_CORE = 256  # of a step: fewer cost throughput, more make streams wait longer


@dataclass(frozen=True)
class CpuOperators(PlainOperators):
    """The compiled kernels."""

    lora: CpuKernels

    def linear(self, linear: nn.Module) -> nn.Module:
        return packed(linear)

    def fuse(
        self,
        layers: nn.ModuleList,
        caches: Mapping[int, LayerCache],
        options: Mapping[int, AttentionOptions],
    ) -> DecoderLayers:
        return fuse_layers(layers, caches, options, self.attention, self.lora)

    def argmax(self, scores_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return argmax(scores_NV)

    def draw(self, scores_NV: torch.Tensor, draws: Draws) -> torch.Tensor:
        return draw(scores_NV, draws)


class CpuDevice:
    """See `Device`."""

    torch_device = torch.device("cpu")
    arena_slots = 64
    runs_beside_host = False
    copies: Copies = HostCopies()

    def operators(self, loaded: LoadedModel, attention: str = "auto") -> Operators:
        backend = open_attention(attention, _ATTENTION, loaded.attention_layers)
        lora = cpu_kernels(loaded.dtype)
        return PlainOperators(backend, ReferenceKernels()) if lora is None else CpuOperators(backend, lora)

    def graphs(self, forward: Forward, prepare: Prepare, settings: Settings, max_model_len: int) -> None:
        return None

    def step_tokens(self, max_num_seqs: int) -> int:
        return _PROMPT_TOKENS_PER_CORE * torch.get_num_threads() + max_num_seqs

    def sizes(self, host_free: int, activations: int, arena: int | None) -> Sizes:
        kv, of_arena, host = (min(int(host_free * share), _CAP) for share in (_KV, _ARENA, _HOST))
        return Sizes(kv, arena or of_arena, host)
