"""What the scheduler decided to run in one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from server.engine.messages import TokenOutput
from server.engine.sequence import Sequence


@dataclass(slots=True)
class ScheduledRun:
    """Tokens [start, start + num_tokens) of one sequence, whose blocks are there."""

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool  # the run reaches the last known token, so the next one is sampled from it


@dataclass
class StepPlan:
    """One step: `runs` of the same adapter mix are neighbours, those of the base model come last."""

    runs: list[ScheduledRun]
    failed: list[TokenOutput] = field(default_factory=list)  # ended while planning; owed to their clients

    @cached_property
    def num_tokens(self) -> int:
        return sum(run.num_tokens for run in self.runs)

    @cached_property
    def num_samples(self) -> int:
        return sum(run.samples for run in self.runs)
