"""Decode steps as replays of captured CUDA graphs.

A decode step enqueues some thousand small kernels, which takes the host longer than the device needs to run
them. Captured once for a batch size, they are one launch. Sizes between those captured are padded: a row
without a sequence has no tokens to attend to, writes no K and V and belongs to no segment, and what it
computes is not looked at. Steps of other kinds (prompts, mixed ones) run as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from server.lora.kernels.interface import ArenaView
from server.lora.segments import Segments
from server.model.attention.interface import AttentionPlan
from server.model.batch import Batch
from server.model.device import Forward, NotCapturable, Prepare
from server.model.sampling import Sampling

log = logging.getLogger(__name__)

Work = Callable[[], None]
Capture = Callable[[Work], Work]  # work -> its replay; raises NotCapturable

_ENTRIES_PER_SEQUENCE = 4  # adapters of a mix, on average, that a captured step has room for
# Tokens of a segment at most, where sequences share an adapter: what the kernels take at a time.
_SHARED = 16


def sizes_up_to(most: int) -> list[int]:
    """The batch sizes to capture, ascending: close together where padding would cost most."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, *range(256, most, 128)]
    return [size for size in sizes if size < most] + [most]


@dataclass(frozen=True)
class Kind:
    """What a graph is captured for."""

    size: int  # sequences
    longest: int = 0  # tokens of a segment; 0: no adapters
    segments: int = 0  # room for so many


def kinds_of(size: int) -> list[Kind]:
    """What is captured for a batch size: no adapters, one for each sequence, and three for shared ones.

    The LoRA kernels split their work for as many segments as there is room for, and a batch that shares few
    adapters has a sixteenth as many segments as sequences, or little more.
    """
    rooms = sorted({-(-size // 16), -(-size // 4), size}) if size > 1 else []
    return [Kind(size), Kind(size, 1, size), *(Kind(size, _SHARED, room) for room in rooms)]


class _Inputs:
    """A step's short arrays in one piece of memory, so that one copy brings them to the device.

    For at most `most` sequences and `spare` more items of attention; all arrays start on 64-byte lines.
    """

    def __init__(self, most: int, spare: int, device: torch.device, *, pin: bool = False) -> None:
        entries = _ENTRIES_PER_SEQUENCE * most
        shapes: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
            ("token_ids", torch.int64, (most,)),
            ("positions", torch.int64, (most,)),
            ("slot_mapping", torch.int64, (most,)),
            ("query_starts", torch.int32, (most + 1,)),
            ("context_lens", torch.int32, (most,)),
            ("token_starts", torch.int32, (most + 1,)),
            ("entry_starts", torch.int32, (most + 1,)),
            ("slots", torch.int32, (entries,)),
            ("weights", torch.float32, (entries,)),
            ("items", torch.int32, (most + spare, 8)),
            ("cuts", torch.int32, (spare, 4)),
        ]
        places, end = {}, 0
        for name, dtype, shape in shapes:
            places[name] = end, end + int(np.prod(shape)) * dtype.itemsize, dtype, shape
            end += -(-(places[name][1] - end) // 64) * 64
        self.memory = torch.zeros(end, dtype=torch.uint8, device=device, pin_memory=pin)
        self.tensors = {
            name: self.memory[first:last].view(dtype).view(shape)
            for name, (first, last, dtype, shape) in places.items()
        }


@dataclass(frozen=True)
class _ShortSegments:
    """`Segments` on the host, cut to a length at most."""

    token_starts: np.ndarray
    entry_starts: np.ndarray
    slots: np.ndarray
    weights: np.ndarray


def _short_segments(segments: Segments, longest: int) -> _ShortSegments:
    token_starts, entry_starts = segments.token_starts.numpy(), segments.entry_starts.numpy()
    slots, weights = segments.slots.numpy(), segments.weights.numpy()
    if segments.max_tokens <= longest:
        return _ShortSegments(token_starts, entry_starts, slots, weights)
    parts_G = -(-np.diff(token_starts) // longest)
    segment_P = np.repeat(np.arange(len(parts_G)), parts_G)
    part_P = np.arange(len(segment_P)) - np.repeat(parts_G.cumsum() - parts_G, parts_G)
    entries_P = np.diff(entry_starts)[segment_P]
    starts_P = np.concatenate([[0], entries_P.cumsum()])
    entry_E = np.repeat(entry_starts[segment_P] - starts_P[:-1], entries_P) + np.arange(starts_P[-1])
    cuts_P = np.append(token_starts[segment_P] + longest * part_P, token_starts[-1])
    return _ShortSegments(cuts_P, starts_P, slots[entry_E], weights[entry_E])


_NO_SEGMENTS = _ShortSegments(np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(0), np.zeros(0))
_NO_TOKENS = torch.zeros(0, dtype=torch.int64)
_NO_SEQUENCES = Batch(
    token_ids=_NO_TOKENS,
    positions=_NO_TOKENS,
    sample_rows=_NO_TOKENS,
    attention=AttentionPlan(
        query_starts=torch.zeros(1, dtype=torch.int32),
        context_lens=_NO_TOKENS,
        block_tables=torch.zeros(0, 1, dtype=torch.int32),
        slot_mapping=_NO_TOKENS,
        num_seqs=0,
        max_query_len=0,
        max_context_len=0,
    ),
    segments=None,
    sample_segments=None,
    sampling=Sampling([]),
    rows=[],
)


class DecodeGraphs:
    """Logits of decode steps, captured by size and by kind of segment; at first use where not before.

    `forward`: a batch of a size that is captured, and the arena -> logits [size, vocabulary], on the current
    stream and with nothing that waits for the device. `prepare`: of the attention that it calls.
    `new_capture`: how to capture all graphs over one view of the arena.
    """

    def __init__(
        self,
        forward: Forward,
        prepare: Prepare,
        new_capture: Callable[[], Capture],
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._forward, self._prepare, self._new_capture = forward, prepare, new_capture
        self._capture: Capture  # over the arena's present view
        self._sizes = sizes_up_to(max_num_seqs)
        self._max_model_len = max_model_len
        blocks = -(-max_model_len // block_size)
        cuda = device.type == "cuda"
        self._work = prepare(_NO_SEQUENCES.attention).work  # of no sequences: what every step's has too
        spare = 0 if self._work is None else self._work.spare
        self._host = _Inputs(max_num_seqs, spare, torch.device("cpu"), pin=cuda)
        self._arrays = {name: tensor.numpy() for name, tensor in self._host.tensors.items()}
        self._inputs = _Inputs(max_num_seqs, spare, device)
        self._host_tables = torch.zeros(max_num_seqs * blocks, dtype=torch.int32, pin_memory=cuda)
        self._tables = torch.zeros(max_num_seqs, blocks, dtype=torch.int32, device=device)
        self._rows = torch.arange(max_num_seqs, device=device)
        self._copied = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]  # no hints
        self._arena: ArenaView | None = None  # that the graphs were captured with
        self._replays: dict[Kind, Work] = {}
        self._given_up = False
        self._logits: torch.Tensor | None = None  # [max_num_seqs, vocabulary], of all graphs

    def warm(self, arena: ArenaView) -> None:
        """Capture every kind of step. Raises NotCapturable."""
        for size in reversed(self._sizes):  # the largest first: the others fit into its memory
            for kind in kinds_of(size):
                self._replay_of(kind, arena)()

    def logits(self, batch: Batch, arena: ArenaView) -> torch.Tensor | None:
        """[S, vocabulary] of a batch on the host, valid until the next call; None where no graph fits it."""
        sequences = batch.attention.num_seqs
        if self._given_up or batch.attention.max_query_len > 1 or len(batch.sample_rows) < sequences:
            return None  # no graphs any more, or a prompt's part
        size = next((size for size in self._sizes if size >= sequences), 0)
        longest, segments = 0, _NO_SEGMENTS
        if batch.segments is not None:
            longest = 1 if batch.segments.max_tokens == 1 else _SHARED
            segments = _short_segments(batch.segments, longest)
        if not size or len(segments.slots) > _ENTRIES_PER_SEQUENCE * size:
            return None
        kind = next(
            kind
            for kind in kinds_of(size)
            if kind.longest == longest and kind.segments >= len(segments.token_starts) - 1
        )
        try:
            replay = self._replay_of(kind, arena)
        except NotCapturable as reason:
            self._given_up = True
            log.warning(
                "decode steps run without CUDA graphs from now on, one could not be captured: %s", reason
            )
            return None
        self._fill(batch, segments, size)
        replay()
        assert self._logits is not None
        return self._logits[:sequences]

    def _fill(self, batch: Batch, segments: _ShortSegments, size: int) -> None:
        """Bring the batch to the device, with empty rows up to the graph's size."""
        if self._copied is not None:
            self._copied.synchronize()  # the copy before may still read the host's side
        to, plan = self._arrays, batch.attention
        live = plan.num_seqs
        for name, values, blank in (
            ("token_ids", batch.token_ids, 0),
            ("positions", batch.positions, 0),
            ("slot_mapping", plan.slot_mapping, -1),
            ("context_lens", plan.context_lens, 0),
        ):
            to[name][:live] = values.numpy()
            to[name][live:size] = blank
        to["query_starts"][: size + 1] = np.minimum(np.arange(size + 1), live)
        count, entries = len(segments.token_starts), len(segments.slots)
        to["slots"][:entries], to["weights"][:entries] = segments.slots, segments.weights
        for name, starts in (
            ("token_starts", segments.token_starts),
            ("entry_starts", segments.entry_starts),
        ):
            to[name][:count] = starts
            to[name][count : size + 1] = starts[-1]
        self._fill_work(plan, size)
        self._inputs.memory.copy_(self._host.memory, non_blocking=True)
        if batch.carried is not None:
            batch.carried.put_into(self._inputs.tensors["token_ids"])
        # Only as wide as the longest context: the whole table of a model with a long context is megabytes.
        live_tables = plan.block_tables[:, : self._tables.shape[1]]
        tables = self._host_tables[: live_tables.numel()].view_as(live_tables)
        tables.copy_(live_tables)
        self._tables[:live, : tables.shape[1]].copy_(
            tables.to(self._tables.device, non_blocking=True), non_blocking=True
        )
        if self._copied is not None:
            self._copied.record()

    def _fill_work(self, plan: AttentionPlan, size: int) -> None:
        work = self._prepare(plan).work
        if work is None:
            return
        for name, rows, room in (
            ("items", work.items, size + work.spare),
            ("cuts", work.cuts, work.spare),
        ):
            self._arrays[name][: len(rows)] = rows.numpy()
            self._arrays[name][len(rows) : room] = 0

    def _replay_of(self, kind: Kind, arena: ArenaView) -> Work:
        """Replays the kind's graph over what `_fill` brought. Raises NotCapturable."""
        if arena is not self._arena:  # its tables have grown, or these are the first
            self._arena = arena
            self._replays.clear()
            self._capture = self._new_capture()  # into memory of its own: the old graphs' goes with them
        if kind not in self._replays:
            self._fill(_NO_SEQUENCES, _NO_SEGMENTS, kind.size)  # what runs to be captured does nothing
            batch = self._captured_batch(kind)
            self._replays[kind] = self._capture(lambda: self._run(batch, arena))
        return self._replays[kind]

    def _run(self, batch: Batch, arena: ArenaView) -> None:
        """What is captured: the forward, with its logits in a place that all graphs share."""
        logits_NV = self._forward(batch, arena)
        if self._logits is None:
            self._logits = logits_NV.new_empty(self._sizes[-1], logits_NV.shape[1])
        self._logits[: len(logits_NV)].copy_(logits_NV)

    def _captured_batch(self, kind: Kind) -> Batch:
        """The graph's inputs: as large as they can be, over memory whose contents change."""
        at, size, work = self._inputs.tensors, kind.size, self._work
        segments = Segments(
            token_starts=at["token_starts"][: kind.segments + 1],
            entry_starts=at["entry_starts"][: kind.segments + 1],
            slots=at["slots"][: _ENTRIES_PER_SEQUENCE * size],
            weights=at["weights"][: _ENTRIES_PER_SEQUENCE * size],
            num_tokens=size,
            max_tokens=kind.longest,
        )
        return Batch(
            token_ids=at["token_ids"][:size],
            positions=at["positions"][:size],
            sample_rows=self._rows[:size],
            attention=AttentionPlan(
                query_starts=at["query_starts"][: size + 1],
                context_lens=at["context_lens"][:size],
                block_tables=self._tables[:size],
                slot_mapping=at["slot_mapping"][:size],
                num_seqs=size,
                max_query_len=1,
                max_context_len=self._max_model_len,
                work=work
                and replace(
                    work, items=at["items"][: size + work.spare], cuts=at["cuts"], parts=2 * work.spare
                ),
            ),
            segments=segments if kind.longest else None,
            sample_segments=segments if kind.longest else None,
            sampling=Sampling([]),
            rows=[],
        )


def cuda_capture() -> Capture:
    """Captures on the current device: all graphs in one pool of memory, all work on one side stream.

    One stream, because cuBLAS keeps a workspace for each that it has worked on.
    """
    pool = torch.cuda.graph_pool_handle()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # no hints

    def capture(work: Work) -> Work:
        with _undone_on_failure():
            _rehearse(work, side)
            graph = torch.cuda.CUDAGraph()
            # The thread that loads adapters may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                work()
        return graph.replay

    return capture


def _rehearse(work: Work, side: torch.cuda.Stream) -> None:
    """Compile kernels and make workspaces, which a capture may not. Raises where work waits for the device.

    A capture would refuse that too, but one that fails leaves the allocator in a state that is not undone.
    """
    current, mode = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
    side.wait_stream(current)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            work()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    current.wait_stream(side)


@contextmanager
def _undone_on_failure() -> Iterator[None]:
    """Turns any failure into NotCapturable; then the current stream and torch's random numbers are as before.

    `torch.cuda.graph` leaves both to the capture when ending that raises (torch/cuda/graphs.py, and before
    2.13 the generator's one state stays marked as captured).
    """
    stream, generator = (
        torch.cuda.current_stream(),
        torch.cuda.default_generators[torch.cuda.current_device()],
    )
    state = generator.clone_state()
    try:
        yield
    except Exception as reason:  # Triton's OutOfResources is no RuntimeError
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(state)
        raise NotCapturable(f"{type(reason).__name__}: {reason}") from reason
