"""Steps as replays of captured CUDA graphs.

A step enqueues some thousand small kernels, which takes the host longer than the device needs to run them,
unless the step holds many hundred tokens. Captured once for its size, they are one launch. Decode steps are
captured by sequences, steps with prompts by tokens, with room for as many sequences as there may be. Sizes
between those captured are padded: a token beyond the live ones belongs to no sequence and no segment, writes
no K and V, and what is computed for it is not looked at. Larger steps run as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from server.devices.cuda.capture import Capture, Work
from server.devices.cuda.graph_inputs import NO_SEQUENCES, GraphInputs, Kind
from server.devices.cuda.lora_work import ROWS, SHARED, TILES
from server.lora.kernels.interface import ArenaView
from server.model.attention.interface import AttentionPlan, AttentionWork
from server.model.batch import Batch
from server.model.device import Forward, NotCapturable, Prepare

log = logging.getLogger(__name__)

_MOST_TOKENS = 1024  # of a captured step: more take the device longer than the host


def sizes_up_to(most: int) -> list[int]:
    """The decode steps to capture, by sequences, ascending: close together where padding would cost most."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, *range(256, most, 128)]
    return [size for size in sizes if size < most] + [most]


def prompt_sizes_up_to(most: int) -> list[int]:
    """The steps with prompts to capture, by tokens, ascending.

    Up to some 256 tokens a step takes as long as reading the weights does, so that padding costs nothing;
    from there on it adds a fifth of the step at most.
    """
    most = min(most, _MOST_TOKENS)
    sizes = [64, 128, *range(192, 512, 64), *range(512, most, 128)]
    return [size for size in sizes if size < most] + [most]


def kinds_of(size: int) -> list[Kind]:
    """The decode steps that are captured for so many sequences: no adapters, one each, and shared ones."""
    longest = (0, ROWS, SHARED) if size > 1 else (0, ROWS)
    return [Kind(size, size, longest=tokens) for tokens in longest]


def prompt_kinds_of(tokens: int, max_num_seqs: int) -> list[Kind]:
    """The steps with prompts that are captured for a number of tokens: without adapters, and with."""
    return [Kind(tokens, min(tokens, max_num_seqs), prompts=True, longest=longest) for longest in (0, TILES)]


class CapturedSteps:
    """Logits of steps, captured by size and by how adapters are shared; at first use where not before.

    `forward`: a batch of a kind that is captured, and the arena -> logits [rows, vocabulary], on the current
    stream and with nothing that waits for the device. `prepare`: of the attention that it calls.
    `new_capture`: how to capture all graphs over one view of the arena. `max_tokens`: of a step.
    """

    def __init__(
        self,
        forward: Forward,
        prepare: Prepare,
        new_capture: Callable[[], Capture],
        *,
        max_num_seqs: int,
        max_tokens: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._forward, self._prepare, self._new_capture = forward, prepare, new_capture
        self._capture: Capture  # over the arena's present view
        self._max_model_len = max_model_len
        sizes, prompt_sizes = sizes_up_to(max_num_seqs), prompt_sizes_up_to(max_tokens)
        self._kinds = {
            False: [kinds_of(size) for size in sizes],
            True: [prompt_kinds_of(size, max_num_seqs) for size in prompt_sizes],
        }
        most = Kind(max(sizes[-1], prompt_sizes[-1]), max_num_seqs)
        works = {prompts: self._work(NO_SEQUENCES.attention, prompts) for prompts in (False, True)}
        self._inputs = GraphInputs(most, works, -(-max_model_len // block_size), device)
        self._rows = most.sequences
        self._arena: ArenaView | None = None  # that the graphs were captured with
        self._replays: dict[Kind, Work] = {}
        self._given_up = False
        self._logits: torch.Tensor | None = None  # [max_num_seqs, vocabulary], of all graphs

    def warm(self, arena: ArenaView) -> None:
        """Capture every kind of step. Raises NotCapturable."""
        for sizes in self._kinds[True], self._kinds[False]:
            for kinds in reversed(sizes):  # the largest first: the others fit into its memory
                for kind in kinds:
                    self._replay_of(kind, arena)()

    def logits(self, batch: Batch, arena: ArenaView) -> torch.Tensor | None:
        """[N, vocabulary] of a batch on the host, valid until the next call; None where no graph fits it."""
        kind = None if self._given_up else self._kind(batch)
        if kind is None:
            return None
        try:
            replay = self._replay_of(kind, arena)
        except NotCapturable as reason:
            self._given_up = True
            log.warning("steps run without CUDA graphs from now on, one could not be captured: %s", reason)
            return None
        self._inputs.fill(batch, self._work(batch.attention, kind.prompts), kind)
        replay()
        assert self._logits is not None
        return self._logits[: len(batch.sample_rows)]

    def _kind(self, batch: Batch) -> Kind | None:
        """The kind of graph for a batch; None where none fits it."""
        plan, segments, rows = batch.attention, batch.segments, len(batch.sample_rows)
        prompts = plan.max_query_len > 1 or rows < plan.num_seqs
        longest = 0
        if segments is not None:
            longest = TILES if prompts else ROWS if segments.max_tokens == 1 else SHARED
        entries = 0 if segments is None else segments.num_entries
        kinds = next((kinds for kinds in self._kinds[prompts] if kinds[0].tokens >= len(batch.token_ids)), ())
        for kind in kinds:
            if kind.longest == longest and max(plan.num_seqs, rows) <= kind.sequences:
                return kind if entries <= kind.entries else None
        return None

    def _work(self, plan: AttentionPlan, prompts: bool) -> AttentionWork | None:
        """The attention's work of a step, in tiles for prompts also where the step has only short ones."""
        return self._prepare(replace(plan, max_query_len=_MOST_TOKENS) if prompts else plan).work

    def _replay_of(self, kind: Kind, arena: ArenaView) -> Work:
        """Replays the kind's graph over what `fill` brought. Raises NotCapturable."""
        if arena is not self._arena:  # its tables have grown, or these are the first
            self._arena = arena
            self._replays.clear()
            self._capture = self._new_capture()  # into memory of its own: the old graphs' goes with them
        if kind not in self._replays:
            # What runs to be captured does nothing.
            self._inputs.fill(NO_SEQUENCES, self._work(NO_SEQUENCES.attention, kind.prompts), kind)
            batch = self._inputs.batch(kind, self._max_model_len)
            self._replays[kind] = self._capture(lambda: self._run(batch, arena))
        return self._replays[kind]

    def _run(self, batch: Batch, arena: ArenaView) -> None:
        """What is captured: the forward, with its logits in a place that all graphs share."""
        logits_NV = self._forward(batch, arena)
        if self._logits is None:
            self._logits = logits_NV.new_empty(self._rows, logits_NV.shape[1])
        self._logits[: len(logits_NV)].copy_(logits_NV)
