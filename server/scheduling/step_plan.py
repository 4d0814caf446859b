"""What the scheduler decided to run in one step."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.messages import TokenOutput
from server.scheduling.sequence import MixKey, Sequence


@dataclass(slots=True)
class ScheduledRun:
    """Tokens [start, start + num_tokens) of one sequence, whose blocks are there, under one adapter mix.

    `rows`: how many of the last of them give tokens: none of a prompt that goes on in a later step, one
    where the next token is sampled. `scored`: the positions, of prompt tokens, whose logits give the
    log-probability of the next prompt token.
    """

    seq: Sequence
    mix: MixKey
    start: int
    num_tokens: int
    rows: int
    scored: range = range(0)


@dataclass
class StepPlan:
    """One step: `runs` of the same adapter mix are neighbours, those of the base model come last.

    `copies`: (from, to), blocks whose K and V are copied before the step computes anything.
    """

    runs: list[ScheduledRun]
    failed: list[TokenOutput] = field(default_factory=list)  # ended while planning; owed to their clients
    copies: list[tuple[int, int]] = field(default_factory=list)
