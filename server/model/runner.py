"""Runs one step on the device: batch in, sampled tokens out."""

from __future__ import annotations

import torch

from server.engine.messages import LoraTarget
from server.lora.kernels.cpu import cpu_kernels
from server.lora.kernels.interface import ArenaView, LoraKernels
from server.lora.linear import LoraStep, wrap_linears
from server.model.attention.hf import PagedStep
from server.model.attention.interface import AttentionBackend, LayerCache
from server.model.attention.paged_cpu import paged_cpu_attention
from server.model.batch import Batch
from server.model.loader import LoadedModel, forward
from server.model.packed_linear import packed
from server.model.sampler import Sampled, Sampler


def choose_kernels(device: torch.device, dtype: torch.dtype) -> tuple[AttentionBackend, LoraKernels]:
    """Triton on CUDA, the compiled kernels (or the reference) on the CPU."""
    if device.type == "cuda":
        from server.lora.kernels.triton import TritonKernels  # needs Triton
        from server.model.attention.paged_triton import PagedTritonAttention

        return PagedTritonAttention(), TritonKernels()
    return paged_cpu_attention(dtype), cpu_kernels(dtype)


class Runner:
    """The base model with LoRA layers, its KV cache and the sampler."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        num_blocks: int,
        block_size: int,
        kernels: tuple[AttentionBackend, LoraKernels] | None = None,
    ) -> None:
        backend, lora_kernels = kernels or choose_kernels(loaded.device, loaded.dtype)
        self._model = loaded.model
        self._lora = LoraStep(lora_kernels)
        layers = wrap_linears(loaded.model, self._lora, loaded.model.get_output_embeddings())
        if loaded.device.type == "cpu":
            for _, layer in layers:
                layer.base = packed(layer.base)
        self.targets = [LoraTarget(name, layer.in_features, layer.out_features) for name, layer in layers]
        self._head_is_target = any(layer.is_output_head for _, layer in layers)
        caches = {}
        for index, spec in loaded.cache_specs.items():
            shape = (num_blocks, spec.num_kv_heads, block_size)
            caches[index] = LayerCache(
                torch.zeros(*shape, spec.k_head_dim, dtype=loaded.dtype, device=loaded.device),
                torch.zeros(*shape, spec.v_head_dim, dtype=loaded.dtype, device=loaded.device),
            )
        self._attention = PagedStep(backend, caches)
        self._sampler = Sampler()

    @torch.inference_mode()
    def run(self, batch: Batch, arena: ArenaView) -> Sampled:
        """One forward over the batch, and a token for each of its sample rows."""
        logits_NV = self.logits(batch, arena)
        if not batch.samples:
            return Sampled([], [], [])
        return self._sampler.sample(logits_NV, batch.samples)

    @torch.inference_mode()
    def logits(self, batch: Batch, arena: ArenaView) -> torch.Tensor:
        """[N, vocabulary] for the batch's sample rows; writes the batch's K and V into the cache."""
        self._attention.plan = batch.attention
        self._lora.arena = arena
        self._lora.segments = batch.segments
        self._lora.samples = batch.sample_segments if self._head_is_target else None
        return forward(self._model, batch.token_ids, batch.positions, batch.sample_rows, self._attention)
