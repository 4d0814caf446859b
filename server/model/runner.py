"""Runs one step on the device: batch in, sampled tokens out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from server.engine.messages import LoraTarget
from server.lora.kernels.cpu import CpuKernels, cpu_kernels
from server.lora.kernels.interface import ArenaView, LoraKernels
from server.lora.linear import LoraStep, wrap_linears
from server.model.attention.hf import PagedStep
from server.model.attention.interface import AttentionBackend, AttentionPlan, LayerCache
from server.model.attention.paged_cpu import PagedCpuAttention, paged_cpu_attention
from server.model.batch import Batch
from server.model.flat_model import FlatModel
from server.model.fused_layers import FusedLayers, fuse_layers
from server.model.layer_reader import NotFusable
from server.model.loader import LoadedModel, forward
from server.model.packed_linear import packed
from server.model.sampler import Sampled, Sampler

log = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # of the probe's logits, fused against torch's


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
        self.max_mix_rank = lora_kernels.max_mix_rank
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
        self._flat: FlatModel | None = None
        self.fused = self._fuse(loaded, caches, backend, lora_kernels)

    @torch.inference_mode()
    def _fuse(
        self,
        loaded: LoadedModel,
        caches: dict[int, LayerCache],
        backend: AttentionBackend,
        kernels: LoraKernels,
    ) -> bool:
        """Let compiled code run the decoder layers, where it gives the logits that the modules give."""
        if not isinstance(backend, PagedCpuAttention) or not isinstance(kernels, CpuKernels):
            return False
        decoder = loaded.model.get_decoder()
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            return False
        batch = _probe_batch(caches[0], loaded.vocab_size)
        try:
            fused = fuse_layers(
                layers, caches, loaded.attention_options, self._attention, backend, self._lora, kernels
            )
        except NotFusable as reason:
            log.info("the decoder layers run as torch modules: %s", reason)
            return False
        want = self.logits(batch, None).float()
        del decoder.layers
        decoder.layers = fused.slots()
        error = self._error(batch, want)
        if not error < _TOLERANCE[loaded.dtype]:
            log.info("the decoder layers run as torch modules: fused, their logits differ (by %.2g)", error)
            del decoder.layers
            decoder.layers = layers
            return False
        self._flatten(loaded, fused, batch, usual=want)
        return True

    def _flatten(self, loaded: LoadedModel, fused: FusedLayers, batch: Batch, usual: torch.Tensor) -> None:
        """Leave out transformers' outer forward too, where the logits are the same without it."""
        try:
            flat = FlatModel(loaded.model, fused, loaded.max_model_len)
            with _large_logits(loaded.model, usual):  # which show what bends or caps them
                want = self.logits(batch, None).float()
                self._flat = flat
                if not self._error(batch, want) < _TOLERANCE[loaded.dtype]:
                    self._flat = None
                    raise NotFusable("without it, the logits differ")
        except NotFusable as reason:
            log.info("around the fused layers, transformers' forward stays: %s", reason)

    def _error(self, batch: Batch, want: torch.Tensor) -> float:
        """How far the batch's logits are from `want`, relative."""
        return float((self.logits(batch, None).float() - want).norm() / want.norm())

    @torch.inference_mode()
    def run(self, batch: Batch, arena: ArenaView) -> Sampled:
        """One forward over the batch, and a token for each of its sample rows."""
        logits_NV = self.logits(batch, arena)
        if not batch.samples:
            return Sampled([], [], [])
        return self._sampler.sample(logits_NV, batch.samples)

    @torch.inference_mode()
    def logits(self, batch: Batch, arena: ArenaView | None) -> torch.Tensor:
        """[N, vocabulary] for the batch's sample rows; writes the batch's K and V into the cache."""
        self._attention.plan = batch.attention
        self._lora.arena = arena
        self._lora.segments = batch.segments
        self._lora.samples = batch.sample_segments if self._head_is_target else None
        if self._flat is not None:
            return self._flat(batch.token_ids, batch.positions, batch.sample_rows)
        return forward(self._model, batch.token_ids, batch.positions, batch.sample_rows, self._attention)


@contextmanager
def _large_logits(model: PreTrainedModel, usual: torch.Tensor) -> Iterator[None]:
    """The output head gives logits of up to 10,000, where they are `usual` otherwise."""
    factor = 1e4 / float(usual.abs().max())
    hook = model.get_output_embeddings().register_forward_hook(lambda head, args, logits: factor * logits)
    try:
        yield
    finally:
        hook.remove()


def _probe_batch(cache: LayerCache, vocab_size: int) -> Batch:
    """A prompt of some tokens in the first blocks of the cache, base model only."""
    blocks, _, block_size, _ = cache.k.shape
    tokens = min(16, blocks * block_size)
    return Batch(
        token_ids=(torch.arange(tokens) * 7919 + 11) % vocab_size,
        positions=torch.arange(tokens),
        sample_rows=torch.tensor([tokens - 1]),
        attention=AttentionPlan(
            query_starts=torch.tensor([0, tokens], dtype=torch.int32),
            context_lens=torch.tensor([tokens], dtype=torch.int32),
            block_tables=torch.arange(-(-tokens // block_size), dtype=torch.int32)[None],
            slot_mapping=torch.arange(tokens),
            num_seqs=1,
            max_query_len=tokens,
            max_context_len=tokens,
        ),
        segments=None,
        sample_segments=None,
        samples=[],
    )
