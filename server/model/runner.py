"""Runs one step on the device: batch in, sampled tokens out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import nn
from transformers import PreTrainedModel

from server.lora.kernels.interface import ArenaView
from server.lora.linear import CurrentLora, LoraStep, wrap_linears
from server.messages import Logprobs, LoraTarget
from server.model.attention.hf import PagedStep, UnsupportedModel
from server.model.batch import Batch
from server.model.decoder_layers import DecoderLayers
from server.model.device import Forward, NotCapturable, Operators, Prepare, StepGraphs
from server.model.flat_model import FlatModel
from server.model.layer_reader import NotFusable
from server.model.loader import LoadedModel, forward
from server.model.prompt_logprobs import PromptScores, ToldPrompts
from server.model.proof import LENGTHS, PagedProbe, relative_error
from server.model.sampler import Sampled, Sampler
from server.model.step import Step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResults:
    """What each run of a step gave, in plan order: as many tokens as it has rows."""

    token_ids: list[list[int]]
    logprobs: list[list[Logprobs]]  # empty where no run asks for them
    broken: list[int]  # runs whose logits held NaN or +Inf: no tokens there
    prompt_logprobs: list[list[Logprobs]]  # of scored tokens; empty where there are none


class Pending:
    """A step that runs.

    `token_ids`: [N] int64 on the device, what it takes from each row; a later batch may carry them on.
    """

    def __init__(
        self, sampled: Sampled, rows: list[int], scores: PromptScores | None, operators: Operators
    ) -> None:
        """`rows`: how many are each run's."""
        self.token_ids = sampled.token_ids
        self._sampled, self._rows, self._scores = sampled, rows, scores
        self._tensors = sampled.tensors()
        self._read = operators.read(self._tensors + (scores.tensors() if scores else []))

    @torch.inference_mode()
    def collect(self) -> StepResults:
        """Its results; waits for this step, not for one launched since."""
        tensors = self._read()
        sampled = self._sampled.on_host(tensors[: len(self._tensors)])
        ends = list(accumulate(self._rows, initial=0))
        of_runs = [slice(first, last) for first, last in pairwise(ends)]
        logprobs: list[list[Logprobs]] = []
        if any(sampled.logprobs):
            logprobs = [[found for found in sampled.logprobs[rows] if found] for rows in of_runs]
        broken: list[int] = []
        if not all(sampled.finite):
            broken = [run for run, rows in enumerate(of_runs) if not all(sampled.finite[rows])]
        scores = ToldPrompts([], [])
        if self._scores is not None:
            scores = self._scores.on_host(tensors[len(self._tensors) :])
        broken += (run for run in scores.broken if run not in broken)
        return StepResults([sampled.token_ids[rows] for rows in of_runs], logprobs, broken, scores.of_runs)


class Runner:
    """The base model with LoRA layers, its KV cache and the sampler."""

    def __init__(
        self,
        loaded: LoadedModel,
        operators: Operators,
        *,
        num_blocks: int,
        block_size: int,
    ) -> None:
        self._model = loaded.model
        self._lora = CurrentLora()
        self.max_mix_rank = operators.lora.max_mix_rank
        head = loaded.model.get_output_embeddings()
        layers = wrap_linears(loaded.model, operators.lora, self._lora, head)
        for _, layer in layers:
            layer.base = operators.linear(layer.base)
        self.targets = [LoraTarget(name, layer.in_features, layer.out_features) for name, layer in layers]
        self._head_is_target = any(layer.is_output_head for _, layer in layers)
        caches = {}
        for index, spec in loaded.cache_specs.items():
            caches[index] = operators.attention.new_cache(
                spec, num_blocks, block_size, loaded.dtype, loaded.device
            )
        self._device, self._proof = loaded.device, loaded.proof
        self._caches, self._num_blocks, self._block_size = caches, num_blocks, block_size
        self._attention = operators.attention
        self._operators, self._sampler = operators, Sampler(operators)
        self._vocabulary = loaded.vocab_size
        self._graphs: StepGraphs | None = None
        self._flat: FlatModel | None = None
        self.fused = self._fuse(loaded, operators)
        if not self.fused and (objection := self._objection()):
            raise UnsupportedModel(f"served over the paged cache, the model's logits differ: {objection}")

    @torch.inference_mode()
    def _fuse(self, loaded: LoadedModel, operators: Operators) -> bool:
        """Let fused code run the decoder layers, where it gives the logits that the modules give."""
        decoder = loaded.model.get_decoder()
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            return False
        try:
            fused = operators.fuse(layers, self._caches, loaded.attention_options)
        except NotFusable as reason:
            log.info("the decoder layers run as torch modules: %s", reason)
            return False
        del decoder.layers
        decoder.layers = fused.slots()
        if objection := self._objection():
            log.warning("the decoder layers run as torch modules: fused, their logits differ: %s", objection)
            del decoder.layers
            decoder.layers = layers
            return False
        self._flatten(loaded, fused)
        return True

    def _objection(self) -> str | None:
        """Why prompts do not get the model's own logits; None where they do."""
        batch, rows_N = self._probe().prompts()
        return self._proof.objection(self.logits(batch, None), rows_N)

    def _flatten(self, loaded: LoadedModel, fused: DecoderLayers) -> None:
        """Leave out transformers' outer forward too, where the logits are the same without it."""
        batch, _ = self._probe().prompts()
        try:
            flat = FlatModel(loaded.model, fused, loaded.max_model_len)
            with _large_logits(loaded.model, self._proof.usual):  # which show what bends or caps them
                want = self.logits(batch, None)
                self._flat = flat
                if not relative_error(self.logits(batch, None), want) < self._proof.limit():
                    self._flat = None
                    raise NotFusable("without it, the logits differ")
        except NotFusable as reason:
            log.info("around the fused layers, transformers' forward stays: %s", reason)

    def _probe(self, sequences: int = len(LENGTHS)) -> PagedProbe:
        return PagedProbe(self._proof, self._num_blocks, self._block_size, sequences)

    @property
    def fast_paths(self) -> dict[str, bool]:
        """Which of the paths that replace transformers' own code are in use."""
        return {
            "fused": self.fused,
            "flat": self._flat is not None,
            "graphs": self._graphs is not None,
        }

    @torch.inference_mode()
    def launch(self, batch: Batch, arena: ArenaView) -> Pending:
        """Begin the step of a batch on the host: the device has its work when this returns."""
        if batch.copies is not None:
            self._copy_blocks(batch.copies.to(self._device, non_blocking=True))
        self._sampler.begin(batch.sampling, self._vocabulary)
        logits_NV, scores = self.logits(batch, arena), None
        if batch.scored is not None:
            logits_NV, scores = batch.scored.split(logits_NV)
        sampled = self._sampler.sample(logits_NV, batch.sampling)
        return Pending(sampled, batch.rows, scores, self._operators)

    def _copy_blocks(self, copies_C2: torch.Tensor) -> None:
        """K and V of whole blocks, in all layers."""
        source_C, target_C = copies_C2.unbind(1)
        for cache in self._caches.values():
            for tensor in (cache.k, cache.v):
                tensor.index_copy_(0, target_C, tensor.index_select(0, source_C))

    @torch.inference_mode()
    def logits(self, batch: Batch, arena: ArenaView | None) -> torch.Tensor:
        """[N, vocabulary] for the rows of a batch on the host; writes its K and V into the cache."""
        if self._graphs is not None and arena is not None:
            logits_NV = self._graphs.logits(batch, arena)
            if logits_NV is not None:
                return logits_NV
        return self._forward(self._prepared(batch).to(self._device), arena)

    def _prepared(self, batch: Batch) -> Batch:
        """A batch on the host with what the kernels add to it."""
        prepare = self._operators.lora.prepare
        segments = samples = batch.segments and prepare(batch.segments)
        if batch.sample_segments is not batch.segments:
            samples = batch.sample_segments and prepare(batch.sample_segments)
        attention = self._attention.prepare(batch.attention)
        return replace(batch, attention=attention, segments=segments, sample_segments=samples)

    @torch.inference_mode()
    def capture(
        self,
        arena: ArenaView,
        new_graphs: Callable[[Forward, Prepare], StepGraphs | None],
        *,
        max_num_seqs: int,
    ) -> None:
        """Run steps as graphs from now on, where the device has any and they give the usual way's logits.

        Writes into the first blocks of the cache. A model that cannot be captured is left as it is.
        """
        graphs = new_graphs(self._forward, self._attention.prepare)
        if graphs is None:
            return
        started = time.monotonic()
        try:
            graphs.warm(arena)
        except NotCapturable as reason:
            log.warning("steps run without CUDA graphs, they could not be captured: %s", reason)
            return
        probe = self._probe(min(len(LENGTHS), max_num_seqs))
        self._graphs = graphs
        for batch, rows_N in probe.prompts_then_tokens():
            if objection := self._proof.objection(self.logits(batch, arena), rows_N):
                self._graphs = None
                log.warning("steps run without CUDA graphs: with them, the logits differ: %s", objection)
                return
        log.info("captured the steps in %.1f s", time.monotonic() - started)

    def _forward(self, batch: Batch, arena: ArenaView | None) -> torch.Tensor:
        """`logits` of a batch on the device."""
        lora = None
        if arena is not None and batch.segments is not None:
            lora = LoraStep(arena, batch.segments, batch.sample_segments if self._head_is_target else None)
        step, self._lora.step = Step(batch.attention, lora), lora
        tokens = batch.token_ids, batch.positions, batch.sample_rows
        if self._flat is not None:
            return self._flat(*tokens, step)
        return forward(self._model, *tokens, PagedStep(self._attention, self._caches, step))


@contextmanager
def _large_logits(model: PreTrainedModel, usual: torch.Tensor) -> Iterator[None]:
    """The output head gives logits of up to 10,000, where they are `usual` otherwise."""
    factor = 1e4 / float(usual.abs().max())
    hook = model.get_output_embeddings().register_forward_hook(lambda head, args, logits: factor * logits)
    try:
        yield
    finally:
        hook.remove()
