"""Batches of consecutive steps: what is carried over from the step before equals what is built anew."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

from server.messages import AdapterRef, Request, SamplingParams
from server.model.batch import Batch, BatchBuilder
from server.model.sampling import Sampling
from server.scheduling.sequence import Sequence
from server.scheduling.step_plan import ScheduledRun

BLOCK_SIZE = 4
BLOCKS_OF_PROMPT = 3


def builder() -> BatchBuilder:
    return BatchBuilder(int, BLOCK_SIZE, (2,))


def sequence(number: int, mix: tuple[str, ...] = (), prompt: int = 9) -> Sequence:
    """A sequence whose prompt is in the cache; digests are slot numbers."""
    refs = tuple(AdapterRef(digest, "", 0.5) for digest in mix)
    seq = Sequence(Request(f"r{number}", list(range(5, 5 + prompt)), SamplingParams(500), refs), 0.0, number)
    seq.num_computed = prompt - 1
    seq.block_ids = list(range(100 * number, 100 * number + -(-prompt // BLOCK_SIZE)))
    return seq


def decode(sequences: list[Sequence]) -> list[ScheduledRun]:
    return [ScheduledRun(seq, seq.mix_key, seq.num_computed, 1, rows=1) for seq in sequences]


def sampled(sequences: list[Sequence]) -> None:
    """What the scheduler does after a step: a token more, and a block where it begins one."""
    for seq in sequences:
        seq.num_computed += 1
        seq.append(random.randrange(3, 200))
        if seq.num_computed == len(seq.block_ids) * BLOCK_SIZE:
            seq.block_ids.append(1000 + 7 * seq.order + len(seq.block_ids))


def values(part: object) -> Iterator[tuple[str, object]]:
    """Every leaf of a batch, but for block tables where no token is."""
    assert is_dataclass(part)
    for field in fields(part):
        value = getattr(part, field.name)
        if field.name == "block_tables":
            blocks = -(-part.context_lens // BLOCK_SIZE)
            value = [row[:count].tolist() for row, count in zip(value, blocks, strict=True)]
        elif field.name == "rows" and isinstance(part, Sampling):
            value = [[(f, str(getattr(row, f))) for f in row.__slots__] for row in value]
        if is_dataclass(value):
            yield from values(value)
        else:
            yield field.name, value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else value


def assert_same(got: Batch, want: Batch) -> None:
    assert list(values(got)) == list(values(want))


def is_carried_over(batches: BatchBuilder, runs: list[ScheduledRun]) -> bool:
    """Whether the next batch stands in the tensors of the last one."""
    assert batches._last is not None
    before = batches._last.batch.positions.data_ptr()
    return batches.build(runs).positions.data_ptr() == before


def test_decode_steps_are_carried_over_and_equal_those_built_anew() -> None:
    random.seed(0)
    sequences = [sequence(i, mix, 9 + i) for i, mix in enumerate([("3",), ("3",), ("1", "2"), (), ()])]
    batches = builder()
    batches.build(decode(sequences))
    carried = 0
    for _ in range(60):
        sampled(sequences)
        runs = decode(sequences)
        before = batches._last.batch.positions.data_ptr() if batches._last else 0
        batch = batches.build(runs)
        carried += batch.positions.data_ptr() == before
        assert_same(batch, builder().build(runs))
    assert carried >= 57, "only a wider table is built anew"


@pytest.fixture
def running() -> tuple[BatchBuilder, list[Sequence]]:
    """A builder that has just built a decode step of two sequences, which then went on."""
    sequences = [sequence(0, ("3",)), sequence(1)]
    batches = builder()
    batches.build(decode(sequences))
    sampled(sequences)
    return batches, sequences


Running = tuple[BatchBuilder, list[Sequence]]


def test_the_same_again_is_carried_over(running: Running) -> None:
    batches, sequences = running
    assert is_carried_over(batches, decode(sequences))


def test_another_sequence_is_not(running: Running) -> None:
    batches, sequences = running
    runs = decode([sequences[0], sequence(2)])
    assert not is_carried_over(batches, runs)


def test_one_less_is_not(running: Running) -> None:
    batches, sequences = running
    assert not is_carried_over(batches, decode(sequences[:1]))


def test_a_step_that_failed_and_is_planned_again_is_not(running: Running) -> None:
    batches, sequences = running
    batches.build(decode(sequences))
    runs = decode(sequences)
    assert not is_carried_over(batches, runs)
    assert_same(batches.build(runs), builder().build(runs))


def test_a_sequence_that_came_back_into_other_blocks_is_not(running: Running) -> None:
    """Preempted, and all but its last token found in the prefix cache."""
    batches, sequences = running
    sequences[0].block_ids = [50, 51, 52]
    runs = decode(sequences)
    batch = batches.build(runs)
    assert batch.attention.block_tables[0, :3].tolist() == [50, 51, 52]
    assert_same(batch, builder().build(runs))


def test_parts_of_prompts_are_built_anew(running: Running) -> None:
    batches, sequences = running
    late = sequence(2, prompt=12)
    late.num_computed = 0
    for start, tokens, samples in ((0, 5, False), (5, 6, False), (11, 1, True)):
        runs = [*decode(sequences), ScheduledRun(late, (), start, tokens, int(samples))]
        batch = batches.build(runs)
        assert_same(batch, builder().build(runs))
        assert batch.sample_rows.tolist() == [0, 1, 2][: 2 + samples]
        assert np.array_equal(batch.token_ids[2:], late.tokens[start : start + tokens])
        sampled(sequences)
    late.num_computed = 11
    late.append(7)
    late.num_computed += 1
    late.block_ids.append(77)
    runs = decode([*sequences, late])
    assert is_carried_over(batches, runs)
    assert_same(batches.build(decode([*sequences, late])), builder().build(runs))
