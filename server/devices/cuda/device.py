"""One CUDA device: Triton kernels, captured graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from server.config import Settings
from server.devices.cuda.attention import PagedTritonAttention
from server.devices.cuda.capture import cuda_capture
from server.devices.cuda.copies import CudaCopies, begin_read
from server.devices.cuda.graphs import CapturedSteps
from server.devices.cuda.layers import triton_layers
from server.devices.cuda.levers import USUAL, Levers
from server.devices.cuda.lora import TritonKernels
from server.devices.cuda.sampling import triton_argmax, triton_draw
from server.lora.copies import Copies
from server.model.attention.backends import NewBackend, open_attention
from server.model.attention.interface import AttentionOptions, LayerCache
from server.model.attention.paged_reference import PagedReferenceAttention
from server.model.decoder_layers import DecoderLayers
from server.model.device import Forward, Operators, PlainOperators, Prepare, Sizes, StepGraphs
from server.model.loader import LoadedModel
from server.model.memory import token_budget
from server.model.sampling import Draws

_USE = 0.90  # of what is free after the weights
_ARENA = 0.20  # of what is left for KV and adapters
_HOST = 0.10  # of the machine's free memory
_HOST_CAP = 32 * 2**30  # all of it is page-locked at start, which takes time
_STEP_TOKENS = 8192


def attention_backends(levers: Levers) -> Mapping[str, NewBackend]:
    """By name, the fastest first. A step with the reference is never captured: it waits for the device."""
    return {
        "triton": lambda layers: PagedTritonAttention(layers.specs, layers.dtype, levers=levers),
        "reference": lambda layers: PagedReferenceAttention(),
    }


@dataclass(frozen=True)
class CudaOperators(PlainOperators):
    """Triton kernels between torch's matrix products."""

    levers: Levers = USUAL

    def fuse(
        self,
        layers: nn.ModuleList,
        caches: Mapping[int, LayerCache],
        options: Mapping[int, AttentionOptions],
    ) -> DecoderLayers:
        return triton_layers(layers, caches, options, self.attention, self.levers)

    def argmax(self, scores_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return triton_argmax(scores_NV)

    def draw(self, scores_NV: torch.Tensor, draws: Draws) -> torch.Tensor:
        return triton_draw(scores_NV, draws)

    def read(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        return begin_read(tensors)


class CudaDevice:
    """See `Device`."""

    arena_slots = 4096  # when they grow, every graph is captured again
    runs_beside_host = True

    def __init__(self, torch_device: torch.device, levers: Levers = USUAL) -> None:
        self.torch_device = torch_device
        self._levers = levers

    @cached_property
    def copies(self) -> Copies:
        return CudaCopies(self.torch_device)

    def operators(self, loaded: LoadedModel, attention: str = "auto") -> Operators:
        backends = attention_backends(self._levers)
        backend = open_attention(attention, backends, loaded.attention_layers)
        return CudaOperators(backend, TritonKernels(levers=self._levers), self._levers)

    def graphs(
        self, forward: Forward, prepare: Prepare, settings: Settings, max_model_len: int
    ) -> StepGraphs:
        return CapturedSteps(
            forward,
            prepare,
            cuda_capture,
            max_num_seqs=settings.max_num_seqs,
            max_tokens=token_budget(settings, self),
            max_model_len=max_model_len,
            block_size=settings.block_size,
            device=self.torch_device,
        )

    def step_tokens(self, max_num_seqs: int) -> int:
        return _STEP_TOKENS

    def sizes(self, host_free: int, activations: int, arena: int | None) -> Sizes:
        free = int(torch.cuda.mem_get_info(self.torch_device)[0] * _USE) - activations
        arena = arena or int(max(free, 0) * _ARENA)
        return Sizes(free - arena, arena, min(int(host_free * _HOST), _HOST_CAP))
