"""Where captured steps read their inputs: memory that stays, filled before each replay."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from server.devices.cuda.lora_work import SHARED, lora_work
from server.lora.segments import Segments, SegmentWork
from server.model.attention.interface import AttentionPlan, AttentionWork
from server.model.batch import Batch
from server.model.sampling import Sampling

ENTRIES_PER_SEQUENCE = 4  # adapters of a mix, on average, that a captured step has room for


@dataclass(frozen=True)
class Kind:
    """What a graph is captured for: at most so many of each."""

    tokens: int
    sequences: int  # and rows whose logits are wanted
    prompts: bool = False  # else each sequence has one token, whose logits are wanted
    longest: int = 0  # tokens of an item of the LoRA kernels' work; 0: no adapters

    @property
    def entries(self) -> int:
        return ENTRIES_PER_SEQUENCE * self.sequences


class _Memory:
    """A step's short arrays in one piece, so that one copy brings them to the device.

    For at most what `most` says and `items` and `cuts` of attention; all arrays start on 64-byte lines.
    """

    def __init__(self, most: Kind, items: int, cuts: int, device: torch.device, *, pin: bool = False) -> None:
        shapes: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
            ("token_ids", torch.int64, (most.tokens,)),
            ("positions", torch.int64, (most.tokens,)),
            ("slot_mapping", torch.int64, (most.tokens,)),
            ("sample_rows", torch.int64, (most.sequences,)),
            ("query_starts", torch.int32, (most.sequences + 1,)),
            ("context_lens", torch.int32, (most.sequences,)),
            ("items", torch.int32, (items, 8)),
            ("cuts", torch.int32, (cuts, 4)),
        ]
        for name in ("segments", "sample_segments"):  # as `Batch` names them
            shapes += [
                (f"{name}.items", torch.int32, (1 + most.tokens, 8)),
                (f"{name}.slots", torch.int32, (most.entries,)),
                (f"{name}.weights", torch.float32, (most.entries,)),
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


class GraphInputs:
    """The inputs of all captured steps of one model, on the device and as the host fills them.

    `most`: the most of each that a kind has. `works`: the attention's work of no sequences, for decode steps
    and for steps with prompts, which says how tiles look; None where a backend has none. `blocks`: of the
    longest context.
    """

    def __init__(
        self, most: Kind, works: dict[bool, AttentionWork | None], blocks: int, device: torch.device
    ) -> None:
        self._works = works
        cuda = device.type == "cuda"
        spare = max((work.spare for work in works.values() if work), default=0)
        items = most.tokens + spare
        self._host = _Memory(most, items, spare, torch.device("cpu"), pin=cuda)
        self._arrays = {name: tensor.numpy() for name, tensor in self._host.tensors.items()}
        self._inputs = _Memory(most, items, spare, device)
        self._host_tables = torch.zeros(most.sequences * blocks, dtype=torch.int32, pin_memory=cuda)
        self._tables = torch.zeros(most.sequences, blocks, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]  # no hints

    def fill(self, batch: Batch, work: AttentionWork | None, kind: Kind) -> None:
        """Bring a batch on the host to the device, with empty rows up to what the kind has."""
        if self._copied is not None:
            self._copied.synchronize()  # the copy before may still read the host's side
        plan = batch.attention
        for name, values, room, blank in (
            ("token_ids", batch.token_ids, kind.tokens, 0),
            ("positions", batch.positions, kind.tokens, 0),
            ("slot_mapping", plan.slot_mapping, kind.tokens, -1),
            ("sample_rows", batch.sample_rows, kind.sequences, 0),
            ("query_starts", plan.query_starts, kind.sequences + 1, len(batch.token_ids)),
            ("context_lens", plan.context_lens, kind.sequences, 0),
        ):
            self._put(name, values.numpy(), room, blank)
        if kind.longest:
            self._put_segments("segments", batch.segments, kind.longest)
        if kind.longest and kind.prompts:
            self._put_segments("sample_segments", batch.sample_segments, SHARED)
        if work is not None:
            self._put("items", work.items.numpy(), self._items(kind), 0)
            self._put("cuts", work.cuts.numpy(), work.spare, 0)
        self._inputs.memory.copy_(self._host.memory, non_blocking=True)
        if batch.carried is not None:
            batch.carried.put_into(self._inputs.tensors["token_ids"])
        self._copy_tables(plan)
        if self._copied is not None:
            self._copied.record()

    def _put(self, name: str, values: np.ndarray, room: int, blank: int) -> None:
        to = self._arrays[name]
        to[: len(values)] = values
        to[len(values) : room] = blank

    def _put_segments(self, name: str, segments: Segments | None, longest: int) -> None:
        items = lora_work(segments, longest).items.numpy()
        self._arrays[f"{name}.items"][: len(items)] = items  # of the rows beyond, the first tells
        if segments is not None:
            self._arrays[f"{name}.slots"][: segments.num_entries] = segments.slots.numpy()
            self._arrays[f"{name}.weights"][: segments.num_entries] = segments.weights.numpy()

    def _copy_tables(self, plan: AttentionPlan) -> None:
        """Only as wide as the longest context: a whole table is megabytes where contexts may be long."""
        live_tables = plan.block_tables[:, : self._tables.shape[1]]
        tables = self._host_tables[: live_tables.numel()].view_as(live_tables)
        tables.copy_(live_tables)
        self._tables[: len(tables), : tables.shape[1]].copy_(
            tables.to(self._tables.device, non_blocking=True), non_blocking=True
        )

    def _items(self, kind: Kind) -> int:
        """Room for items of attention: a tile for each begun `block_t` tokens of a run, and what is cut."""
        work = self._works[kind.prompts]
        assert work is not None
        return min(kind.tokens, kind.tokens // work.block_t + kind.sequences) + work.spare

    def batch(self, kind: Kind, max_model_len: int) -> Batch:
        """What a graph is captured over: as large as it can be, in memory whose contents change."""
        at, work = self._inputs.tensors, self._works[kind.prompts]
        if work is not None:
            items, cuts = at["items"][: self._items(kind)], at["cuts"][: work.spare]
            work = replace(work, items=items, cuts=cuts, parts=2 * work.spare)
        segments = samples = None
        if kind.longest:
            segments = samples = self._segments("segments", kind, kind.tokens, kind.longest)
            if kind.prompts:
                samples = self._segments("sample_segments", kind, kind.sequences, SHARED)
        return Batch(
            token_ids=at["token_ids"][: kind.tokens],
            positions=at["positions"][: kind.tokens],
            sample_rows=at["sample_rows"][: kind.sequences],
            attention=AttentionPlan(
                query_starts=at["query_starts"][: kind.sequences + 1],
                context_lens=at["context_lens"][: kind.sequences],
                block_tables=self._tables[: kind.sequences],
                slot_mapping=at["slot_mapping"][: kind.tokens],
                num_seqs=kind.sequences,
                max_query_len=kind.tokens if kind.prompts else 1,
                max_context_len=max_model_len,
                work=work,
            ),
            segments=segments,
            sample_segments=samples,
            sampling=Sampling([]),
            rows=[],
        )

    def _segments(self, name: str, kind: Kind, tokens: int, longest: int) -> Segments:
        """As the kernels of CUDA read them: from the list of items, not from where segments start."""
        at = self._inputs.tensors
        room = min(tokens, tokens // longest + kind.sequences)
        return Segments(
            token_starts=_NO_STARTS,
            entry_starts=_NO_STARTS,
            slots=at[f"{name}.slots"][: kind.entries],
            weights=at[f"{name}.weights"][: kind.entries],
            num_tokens=tokens,
            max_tokens=longest,
            work=SegmentWork(at[f"{name}.items"][: 1 + room], longest),
        )


_NO_STARTS = torch.zeros(1, dtype=torch.int32)
_NO_TOKENS = torch.zeros(0, dtype=torch.int64)
NO_SEQUENCES = Batch(
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
