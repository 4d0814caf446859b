"""A StepPlan as tensors."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, replace
from itertools import accumulate, chain, groupby
from operator import itemgetter

import numpy as np
import torch

from server.lora.segments import Segments
from server.model.attention.interface import AttentionPlan
from server.model.logits import sampling_of
from server.model.prompt_logprobs import ScoredRows
from server.model.sampling import SampleRow, Sampling
from server.scheduling.sequence import MixKey
from server.scheduling.step_plan import ScheduledRun

_SPARE_BLOCKS = 8  # columns of the block tables that sequences may grow into


@dataclass(frozen=True)
class Carried:
    """Tokens of a batch that the step before sampled, on the device: the host has not read them yet."""

    places: torch.Tensor  # [C] int64, indices into T
    rows: torch.Tensor  # [C] int64, the row of the step before that gave each
    token_ids: torch.Tensor  # [rows of the step before] int64, on the device

    def put_into(self, token_ids_T: torch.Tensor) -> None:
        """Each in its place of a batch's tokens on the device."""
        places_C, rows_C = (
            tensor.to(token_ids_T.device, non_blocking=True) for tensor in (self.places, self.rows)
        )
        token_ids_T.index_copy_(0, places_C, self.token_ids.index_select(0, rows_C))


@dataclass(frozen=True)
class Batch:
    """The T tokens of a step in plan order, and the N rows among them whose logits are wanted."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    sample_rows: torch.Tensor  # [N] int64, indices into T; those sampled and those scored
    attention: AttentionPlan
    segments: Segments | None  # over the T tokens
    sample_segments: Segments | None  # over the N rows
    sampling: Sampling  # of the N rows but those scored
    rows: list[int]  # how many of the sampled rows are each run's
    scored: ScoredRows | None = None  # those of the N rows that give no token
    # [B, 2] int64: blocks to copy before anything is computed, from and to
    copies: torch.Tensor | None = None
    carried: Carried | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on `device`, with all its tokens; itself where nothing is missing there."""
        if self.token_ids.device == device and self.carried is None:
            return self
        token_ids_T = self.token_ids.to(device, non_blocking=True, copy=True)
        if self.carried is not None:
            self.carried.put_into(token_ids_T)
        return replace(
            self,
            token_ids=token_ids_T,
            carried=None,
            positions=self.positions.to(device, non_blocking=True),
            sample_rows=self.sample_rows.to(device, non_blocking=True),
            attention=self.attention.to(device),
            segments=None if self.segments is None else self.segments.to(device),
            sample_segments=None if self.sample_segments is None else self.sample_segments.to(device),
            copies=None if self.copies is None else self.copies.to(device, non_blocking=True),
        )


class BatchBuilder:
    """Turns the plans of one engine into batches, on the host.

    `slot_of`: the arena slot of a resident adapter, by digest.
    """

    def __init__(
        self,
        slot_of: abc.Callable[[str], int],
        block_size: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._slot_of = slot_of
        self._block_size = block_size
        self._eos_token_ids = eos_token_ids
        self._last: _Last | None = None

    def build(
        self,
        runs: abc.Sequence[ScheduledRun],
        copies: abc.Sequence[tuple[int, int]] = (),
        unread: torch.Tensor | None = None,
    ) -> Batch:
        """The batch of a step, valid until the next is built.

        Runs of one mix are neighbours, those of the base model come last. `copies`: see `StepPlan`.
        `unread`: the tokens on the device that the last batch built gave, where the host has not read them.
        """
        last = self._last
        if last is not None and self._follow(runs, last):
            batch = self._advanced(runs, last.batch)
        else:
            batch = self._built(runs)
        carried = None if last is None or unread is None else _carried(runs, last.runs, unread)
        self._last = _Last(runs, [run.seq.block_ids for run in runs], batch)
        return replace(batch, copies=torch.tensor(copies) if copies else None, carried=carried)

    def _follow(self, runs: abc.Sequence[ScheduledRun], last: _Last) -> bool:
        """Whether each run is one token, the one after the last step's, in the same blocks and some more.

        A sequence that was preempted and has come back has other blocks; a step that failed is planned again.
        """
        plan = last.batch.attention
        return (
            len(runs) == len(last.runs)
            and plan.max_context_len < plan.block_tables.shape[1] * self._block_size
            and all(
                run.seq is before.seq
                and run.start == before.start + 1
                and run.num_tokens == before.num_tokens == 1
                and run.rows == before.rows == 1
                and run.mix == before.mix
                and run.seq.block_ids is block_ids
                for run, before, block_ids in zip(runs, last.runs, last.block_ids, strict=True)
            )
        )

    def _advanced(self, runs: abc.Sequence[ScheduledRun], batch: Batch) -> Batch:
        """The batch one token later: nearly all steps are, and most of a batch is then as it was."""
        plan, block_size = batch.attention, self._block_size
        positions_T, slots_T = batch.positions.numpy(), plan.slot_mapping.numpy()
        batch.token_ids.numpy()[:] = [run.seq.last_token for run in runs]
        positions_T += 1
        slots_T += 1
        plan.context_lens.numpy()[:] += 1
        for s in np.flatnonzero(positions_T % block_size == 0).tolist():  # the first token of a block
            at = positions_T[s] // block_size
            block = runs[s].seq.block_ids[at]
            plan.block_tables.numpy()[s, at] = block
            slots_T[s] = block * block_size
        batch.sampling.advance(run.seq.tokens for run in runs)
        return replace(batch, attention=replace(plan, max_context_len=plan.max_context_len + 1))

    def _built(self, runs: abc.Sequence[ScheduledRun]) -> Batch:
        block_size = self._block_size
        lengths_S = np.array([run.num_tokens for run in runs])
        starts_S = np.array([run.start for run in runs])
        query_starts = np.zeros(len(runs) + 1, dtype=np.int32)
        np.cumsum(lengths_S, out=query_starts[1:])
        sequence_T = np.repeat(np.arange(len(runs)), lengths_S)
        positions_T = np.arange(query_starts[-1]) - (query_starts[:-1] - starts_S)[sequence_T]

        context_S = (starts_S + lengths_S).astype(np.int32)
        blocks_S = -(-context_S // block_size)
        tables = np.zeros((len(runs), int(blocks_S.max()) + _SPARE_BLOCKS), dtype=np.int32)
        in_use = chain.from_iterable(
            run.seq.block_ids[:blocks] for run, blocks in zip(runs, blocks_S.tolist(), strict=True)
        )
        tables[np.arange(tables.shape[1]) < blocks_S[:, None]] = np.fromiter(
            in_use, np.int32, int(blocks_S.sum())
        )
        slots_T = tables[sequence_T, positions_T // block_size].astype(np.int64) * block_size
        slots_T += positions_T % block_size

        rows_S = np.array([run.rows for run in runs])
        before_S = rows_S.cumsum() - rows_S  # rows of the runs before
        run_N = np.repeat(np.arange(len(runs)), rows_S)
        rows_N = (query_starts[1:] - rows_S - before_S)[run_N] + np.arange(len(run_N))
        scored = ScoredRows.of(runs)
        if scored is not None:
            rows_N = np.sort(np.concatenate([rows_N, scored.places(runs, query_starts)]))
        segments = self._segments([(run.mix, run.num_tokens) for run in runs])
        sample_segments = segments
        if len(rows_N) < query_starts[-1]:  # not every token's logits are wanted
            wanted = ((run.mix, run.rows + len(run.scored)) for run in runs)
            sample_segments = self._segments([(mix, count) for mix, count in wanted if count])

        rows = [SampleRow.of(runs[s].seq, self._eos_token_ids) for s in run_N.tolist()]
        return Batch(
            token_ids=torch.from_numpy(
                np.concatenate([run.seq.tokens[run.start : run.start + run.num_tokens] for run in runs])
            ),
            positions=torch.from_numpy(positions_T),
            sample_rows=torch.from_numpy(rows_N.astype(np.int64)),
            attention=AttentionPlan(
                query_starts=torch.from_numpy(query_starts),
                context_lens=torch.from_numpy(context_S),
                block_tables=torch.from_numpy(tables),
                slot_mapping=torch.from_numpy(slots_T),
                num_seqs=len(runs),
                max_query_len=int(lengths_S.max()),
                max_context_len=int(context_S.max()),
            ),
            segments=segments,
            sample_segments=sample_segments,
            sampling=sampling_of(rows),
            rows=rows_S.tolist(),
            scored=scored,
        )

    def _segments(self, runs: abc.Iterable[tuple[MixKey, int]]) -> Segments | None:
        """Neighbours of one mix become one segment; the base model's tokens, which come last, have none."""
        return Segments.build(
            [
                (
                    [(self._slot_of(digest), weight) for digest, weight in mix],
                    sum(tokens for _, tokens in group),
                )
                for mix, group in groupby(runs, key=itemgetter(0))
                if mix
            ]
        )


@dataclass(frozen=True)
class _Last:
    """The step before: its runs, the lists of their blocks, its batch."""

    runs: abc.Sequence[ScheduledRun]
    block_ids: list[list[int]]
    batch: Batch


def _carried(
    runs: abc.Sequence[ScheduledRun], last: abc.Sequence[ScheduledRun], unread_N: torch.Tensor
) -> Carried | None:
    """The last tokens of runs whose sequences have an unread one, which a run of the step before gave."""
    rows_of = {run.seq: row - 1 for run, row in zip(last, accumulate(run.rows for run in last), strict=True)}
    ends = accumulate(run.num_tokens for run in runs)
    places = [(end - 1, rows_of[run.seq]) for run, end in zip(runs, ends, strict=True) if run.seq.num_unread]
    if not places:
        return None
    places_C, rows_C = torch.tensor(places).unbind(1)
    return Carried(places_C, rows_C, unread_N)
