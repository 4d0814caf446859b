"""What a device is to the model and the engine. `server/devices` has one folder for each kind.

`Device` is the hardware: its memory, and ways in. `Operators` are what computes there, chosen for one model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from server.config import Settings
from server.lora.copies import Copies
from server.lora.kernels.interface import ArenaView, LoraKernels
from server.model.attention.interface import AttentionBackend, AttentionOptions, AttentionPlan, LayerCache
from server.model.batch import Batch
from server.model.decoder_layers import DecoderLayers
from server.model.layer_reader import NotFusable
from server.model.loader import LoadedModel
from server.model.sampler import SamplingOperators, torch_argmax, torch_draw
from server.model.sampling import Draws


class Operators(SamplingOperators, Protocol):
    """How one model is computed on one device."""

    @property
    def attention(self) -> AttentionBackend: ...

    @property
    def lora(self) -> LoraKernels: ...

    def linear(self, linear: nn.Module) -> nn.Module:
        """What computes this linear fastest; it may take the weight over. Itself where nothing does."""
        ...

    def fuse(
        self,
        layers: nn.ModuleList,
        caches: Mapping[int, LayerCache],
        options: Mapping[int, AttentionOptions],
    ) -> DecoderLayers:
        """All decoder layers as fused code, whose `slots` are for their place. Raises NotFusable.

        `options` are each layer's, as a forward showed them.
        """
        ...

    def read(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Begin to copy what the device computes to the host. The call returned waits for that alone, not
        for what the device was given since, and gives the copies.
        """
        ...


@dataclass(frozen=True)
class PlainOperators:
    """Torch's own, with kernels for attention and LoRA that call nothing else."""

    attention: AttentionBackend
    lora: LoraKernels

    def linear(self, linear: nn.Module) -> nn.Module:
        return linear

    def fuse(
        self,
        layers: nn.ModuleList,
        caches: Mapping[int, LayerCache],
        options: Mapping[int, AttentionOptions],
    ) -> DecoderLayers:
        raise NotFusable("no compiled kernels")

    def argmax(self, scores_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch_argmax(scores_NV)

    def draw(self, scores_NV: torch.Tensor, draws: Draws) -> torch.Tensor:
        return torch_draw(scores_NV, draws)

    def read(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        return lambda: [tensor.cpu() for tensor in tensors]


def is_out_of_memory(error: Exception) -> bool:
    """Whether a step could not get memory, of the accelerator or the host. torch's allocator for the host has
    no error of its own."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


class NotCapturable(Exception):
    """A step that cannot be captured; the message says why."""


class StepGraphs(Protocol):
    """Steps of some kinds, recorded once and launched as a whole."""

    def warm(self, arena: ArenaView) -> None:
        """Capture every kind of step. Raises NotCapturable."""
        ...

    def logits(self, batch: Batch, arena: ArenaView) -> torch.Tensor | None:
        """[S, vocabulary] of a batch on the host, valid until the next call; None where no graph fits it."""
        ...


Forward = Callable[[Batch, ArenaView], torch.Tensor]  # a batch on the device -> logits [N, vocabulary]
Prepare = Callable[[AttentionPlan], AttentionPlan]  # see AttentionBackend.prepare


@dataclass(frozen=True)
class Sizes:
    """Bytes of the three stores where nobody says."""

    kv: int
    arena: int
    host: int


class Device(Protocol):
    """One accelerator, or the host's own processor."""

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def arena_slots(self) -> int:
        """Rows of the arena's tables at first."""
        ...

    @property
    def runs_beside_host(self) -> bool:
        """Whether a step that was launched is computed while the host goes on."""
        ...

    @property
    def copies(self) -> Copies: ...

    def operators(self, loaded: LoadedModel, attention: str = "auto") -> Operators:
        """For this model, with the attention backend of that name. Raises ValueError where there is none."""
        ...

    def graphs(
        self, forward: Forward, prepare: Prepare, settings: Settings, max_model_len: int
    ) -> StepGraphs | None:
        """For steps of `forward`; None where launching a step costs little."""
        ...

    def step_tokens(self, max_num_seqs: int) -> int:
        """Tokens of one step by default: enough to keep the arithmetic busy, few enough that streams flow.

        Agrawal et al. 2024, Sarathi-Serve.
        """
        ...

    def sizes(self, host_free: int, activations: int, arena: int | None) -> Sizes:
        """Defaults with the weights loaded. `host_free`: of the machine's memory; `activations`: what a step
        allocates; `arena`: what was asked for it. Bytes, all.
        """
        ...
