"""Runs one step on the device: batch in, sampled tokens out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
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
from server.model.decoder_layers import DecoderLayers
from server.model.flat_model import FlatModel
from server.model.fused_layers import fuse_layers
from server.model.graphs import Capture, DecodeGraphs
from server.model.layer_reader import NotFusable
from server.model.loader import LoadedModel, forward
from server.model.packed_linear import packed
from server.model.sampler import Sampled, Sampler

log = logging.getLogger(__name__)

# of the probe's logits, against those of the model's own modules
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}


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
        if isinstance(backend, PagedCpuAttention):
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
        self._device, self._vocab_size = loaded.device, loaded.vocab_size
        self._cache = caches[0].k
        self._attention = PagedStep(backend, caches)
        self._sampler = Sampler()
        self._graphs: DecodeGraphs | None = None
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
        """Let fused code run the decoder layers, where it gives the logits that the modules give."""
        decoder = loaded.model.get_decoder()
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            return False
        batch = self._probe_batch(1, tokens=16)
        want = self.logits(batch, None).float()  # before fusing, which may move weights
        try:
            fused = self._fused_layers(layers, loaded, caches, backend, kernels)
        except NotFusable as reason:
            log.info("the decoder layers run as torch modules: %s", reason)
            return False
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

    def _fused_layers(
        self,
        layers: nn.ModuleList,
        loaded: LoadedModel,
        caches: dict[int, LayerCache],
        backend: AttentionBackend,
        kernels: LoraKernels,
    ) -> DecoderLayers:
        """The layers as the backend's fused code. Raises NotFusable."""
        options = loaded.attention_options
        if isinstance(backend, PagedCpuAttention) and isinstance(kernels, CpuKernels):
            return fuse_layers(layers, caches, options, self._attention, backend, self._lora, kernels)
        # not at the top: a CPU install need not wait for Triton
        from server.model.attention.paged_triton import PagedTritonAttention
        from server.model.triton_layers import triton_layers

        if isinstance(backend, PagedTritonAttention):
            return triton_layers(layers, caches, options, self._attention)
        raise NotFusable("no compiled kernels")

    def _flatten(self, loaded: LoadedModel, fused: DecoderLayers, batch: Batch, usual: torch.Tensor) -> None:
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

    def _probe_batch(self, sequences: int, tokens: int) -> Batch:
        """Prompts of `tokens` tokens in the first blocks of the cache, base model only."""
        blocks, _, block_size, _ = self._cache.shape
        sequences, tokens = min(sequences, blocks), min(tokens, blocks * block_size)
        tables = torch.arange(sequences * -(-tokens // block_size), dtype=torch.int32).view(sequences, -1)
        positions = torch.arange(tokens)
        slots = tables[:, positions // block_size] * block_size + positions % block_size
        return Batch(
            token_ids=(torch.arange(sequences * tokens) * 7919 + 11) % self._vocab_size,
            positions=positions.repeat(sequences),
            sample_rows=torch.arange(1, sequences + 1) * tokens - 1,
            attention=AttentionPlan(
                query_starts=torch.arange(sequences + 1, dtype=torch.int32) * tokens,
                context_lens=torch.full((sequences,), tokens, dtype=torch.int32),
                block_tables=tables,
                slot_mapping=slots.flatten(),
                num_seqs=sequences,
                max_query_len=tokens,
                max_context_len=tokens,
            ),
            segments=None,
            sample_segments=None,
            samples=[],
        )

    def _error(self, batch: Batch, want: torch.Tensor, arena: ArenaView | None = None) -> float:
        """How far the batch's logits are from `want`, relative."""
        return float((self.logits(batch, arena).float() - want).norm() / want.norm())

    @torch.inference_mode()
    def run(self, batch: Batch, arena: ArenaView) -> Sampled:
        """One forward over the batch, and a token for each of its sample rows."""
        logits_NV = self.logits(batch, arena)
        if not batch.samples:
            return Sampled([], [], [])
        return self._sampler.sample(logits_NV, batch.samples)

    @torch.inference_mode()
    def logits(self, batch: Batch, arena: ArenaView | None) -> torch.Tensor:
        """[N, vocabulary] for the sample rows of a batch on the host; writes its K and V into the cache."""
        if self._graphs is not None and arena is not None:
            logits_NV = self._graphs.logits(batch, arena)
            if logits_NV is not None:
                return logits_NV
        return self._forward(batch.to(self._device), arena)

    @torch.inference_mode()
    def capture_decode(
        self, arena: ArenaView, *, max_num_seqs: int, max_model_len: int, new_capture: Callable[[], Capture]
    ) -> None:
        """Run decode steps as captured graphs from now on, where they give the logits of the usual way.

        Writes into the first blocks of the cache. A model that cannot be captured is left as it is.
        """
        graphs = DecodeGraphs(
            self._forward,
            new_capture,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=self._cache.shape[2],
            device=self._device,
        )
        started = time.monotonic()
        batch = self._probe_batch(min(3, max_num_seqs), tokens=1)
        want = self.logits(batch, arena).float()
        try:
            graphs.warm(arena)
        except RuntimeError as reason:
            log.warning("decode steps run without CUDA graphs, they could not be captured: %s", reason)
            return
        self._graphs = graphs
        error = self._error(batch, want, arena)
        if not error < _TOLERANCE[self._cache.dtype]:
            self._graphs = None
            log.warning("decode steps run without CUDA graphs: with them, the logits differ (by %.2g)", error)
            return
        log.info("captured the decode steps in %.1f s", time.monotonic() - started)

    def _forward(self, batch: Batch, arena: ArenaView | None) -> torch.Tensor:
        """`logits` of a batch on the device."""
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
