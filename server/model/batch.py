"""A StepPlan as tensors."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch

from server.engine.sequence import MixKey, Tokens
from server.engine.step_plan import ScheduledRun
from server.lora.segments import Segments
from server.model.attention.interface import AttentionPlan
from server.model.sampler import SampleRow


@dataclass(frozen=True)
class Batch:
    """The T tokens of a step in plan order, and the N rows among them that a token is sampled from."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    sample_rows: torch.Tensor  # [N] int64, indices into T
    attention: AttentionPlan
    segments: Segments | None  # over the T tokens
    sample_segments: Segments | None  # over the N rows
    samples: list[SampleRow]

    def to(self, device: torch.device) -> Batch:
        """The same on `device`; itself where it is there already."""
        if self.token_ids.device == device:
            return self
        return replace(
            self,
            token_ids=self.token_ids.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            sample_rows=self.sample_rows.to(device, non_blocking=True),
            attention=self.attention.to(device),
            segments=None if self.segments is None else self.segments.to(device),
            sample_segments=None if self.sample_segments is None else self.sample_segments.to(device),
        )


class BatchBuilder:
    """Turns the plans of one engine into batches, on the host.

    `slot_of`: the arena slot of a resident adapter, by digest.
    """

    def __init__(
        self,
        slot_of: Callable[[str], int],
        block_size: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._block_size = block_size
        self._eos_token_ids = eos_token_ids
        self._segments = _SegmentsMemo(slot_of)
        self._sample_segments = _SegmentsMemo(slot_of)

    def build(self, runs: Ordered[ScheduledRun]) -> Batch:
        """Runs of one mix are neighbours, those of the base model come last."""
        block_size = self._block_size
        lengths_S = np.array([run.num_tokens for run in runs])
        starts_S = np.array([run.start for run in runs])
        query_starts = np.zeros(len(runs) + 1, dtype=np.int32)
        np.cumsum(lengths_S, out=query_starts[1:])
        sequence_T = np.repeat(np.arange(len(runs)), lengths_S)
        positions_T = np.arange(query_starts[-1]) - (query_starts[:-1] - starts_S)[sequence_T]

        context_S = (starts_S + lengths_S).astype(np.int32)
        blocks_S = -(-context_S // block_size)
        tables = np.zeros((len(runs), int(blocks_S.max())), dtype=np.int32)
        in_use = chain.from_iterable(
            run.seq.block_ids[:blocks] for run, blocks in zip(runs, blocks_S.tolist(), strict=True)
        )
        tables[np.arange(tables.shape[1]) < blocks_S[:, None]] = np.fromiter(
            in_use, np.int32, int(blocks_S.sum())
        )
        slots_T = tables[sequence_T, positions_T // block_size].astype(np.int64) * block_size
        slots_T += positions_T % block_size

        sampling = [i for i, run in enumerate(runs) if run.samples]

        segments = self._segments.build([(run.seq.mix_key, run.num_tokens) for run in runs])
        if len(sampling) == query_starts[-1]:  # every token is sampled from
            sample_segments = segments
        else:
            sample_segments = self._sample_segments.build([(runs[i].seq.mix_key, 1) for i in sampling])

        return Batch(
            token_ids=torch.from_numpy(_token_ids(runs)),
            positions=torch.from_numpy(positions_T),
            sample_rows=torch.from_numpy(query_starts[1:][sampling].astype(np.int64) - 1),
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
            samples=[_sample_row(runs[i], self._eos_token_ids) for i in sampling],
        )


def _token_ids(runs: Ordered[ScheduledRun]) -> Tokens:
    """The tokens of all runs: [T]. Nearly all runs of nearly all steps are the one token sampled last."""
    if all(run.num_tokens == 1 and run.samples for run in runs):
        return np.array([run.seq.last_token for run in runs])
    return np.concatenate([run.seq.tokens[run.start : run.start + run.num_tokens] for run in runs])


class _SegmentsMemo:
    """Makes a step's segments; while no sequence comes or goes they are the last step's again."""

    def __init__(self, slot_of: Callable[[str], int]) -> None:
        self._slot_of = slot_of
        self._merged: list[tuple[MixKey, list[int], int]] = []  # mix, its slots, tokens
        self._segments: Segments | None = None

    def build(self, mixes: list[tuple[MixKey, int]]) -> Segments | None:
        """Neighbours of one mix become one segment; the base model's tokens, which come last, have none."""
        merged: list[tuple[MixKey, list[int], int]] = []
        last: MixKey = ()
        for mix, tokens in mixes:
            if not mix:
                break
            if mix == last:
                merged[-1] = (mix, merged[-1][1], merged[-1][2] + tokens)
            else:
                merged.append((mix, [self._slot_of(digest) for digest, _ in mix], tokens))
                last = mix
        if merged != self._merged:
            self._merged = merged
            self._segments = Segments.build(
                [
                    ([(slot, weight) for slot, (_, weight) in zip(slots, mix, strict=True)], tokens)
                    for mix, slots, tokens in merged
                ]
            )
        return self._segments


def _sample_row(run: ScheduledRun, eos_token_ids: tuple[int, ...]) -> SampleRow:
    seq = run.seq
    return SampleRow(
        params=seq.sampling,
        seed=seq.seed,
        position=seq.num_tokens,
        tokens=seq.tokens,
        num_prompt_tokens=seq.num_prompt_tokens,
        eos_token_ids=eos_token_ids,
    )
