"""How tokens are taken from a batch's logits, row by row, as the host knows it."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from server.guidance.matcher import Matcher
from server.messages import SamplingParams
from server.scheduling.sequence import Sequence, Tokens

# Below this a row is greedy: a logit that is 0.001 less than the largest would be e^-100 times as likely, and
# what is left to draw is rounding. Far below it no float32 is left of the temperature to divide by.
SMALLEST_TEMPERATURE = 1e-5


@dataclass(slots=True)
class SampleRow:
    """One row of logits that a token is taken from, and what is known of its sequence."""

    params: SamplingParams
    seed: int
    position: int  # of the token to be drawn, in the sequence
    tokens: Tokens  # prompt and output
    num_prompt_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    guide: Matcher | None = None  # of the output's grammar, at the output's beginning
    state: dict[str, Any] = field(default_factory=dict)  # the sequence's own, which processors keep things in

    @classmethod
    def of(cls, seq: Sequence, eos_token_ids: tuple[int, ...]) -> SampleRow:
        """For the sequence's next token."""
        return cls(
            params=seq.sampling,
            seed=seq.seed,
            position=seq.num_tokens,
            tokens=seq.tokens,
            num_prompt_tokens=seq.num_prompt_tokens,
            eos_token_ids=eos_token_ids,
            guide=seq.guide,
            state=seq.logits_state,
        )

    @classmethod
    def of_next_read(cls, seq: Sequence, eos_token_ids: tuple[int, ...]) -> SampleRow:
        """For the first token that the host has not read yet."""
        row = cls.of(seq, eos_token_ids)
        row.position -= seq.num_unread
        row.tokens = row.tokens[: row.position]
        return row

    @property
    def output(self) -> Tokens:
        return self.tokens[self.num_prompt_tokens :]


@dataclass(frozen=True)
class Draws:
    """The D rows of a batch whose tokens are drawn, and from which part of their distribution.

    One array for each parameter, so that kernels read them as they are. `positions` moves on with the steps.
    """

    rows: npt.NDArray[np.int64]  # which of the batch's N they are
    temperature: npt.NDArray[np.float32]  # SMALLEST_TEMPERATURE or more
    top_k: npt.NDArray[np.int32]  # 0 = off
    top_p: npt.NDArray[np.float32]  # 1 = off
    min_p: npt.NDArray[np.float32]  # 0 = off
    seeds: npt.NDArray[np.uint64]
    positions: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, rows: abc.Iterable[SampleRow]) -> Draws | None:
        """Those of a batch's rows that are not greedy; None where all are."""
        drawn = [(n, row) for n, row in enumerate(rows) if row.params.temperature >= SMALLEST_TEMPERATURE]
        if not drawn:
            return None
        params = [row.params for _, row in drawn]
        return cls(
            np.array([n for n, _ in drawn]),
            np.array([p.temperature for p in params], np.float32),
            np.array([p.top_k for p in params], np.int32),
            np.array([p.top_p for p in params], np.float32),
            np.array([p.min_p for p in params], np.float32),
            np.array([row.seed for _, row in drawn], np.uint64),
            np.array([row.position for _, row in drawn], np.uint64),
        )

    @property
    def cuts(self) -> npt.NDArray[np.bool_]:
        """[D]: whether a row leaves out a part of its distribution."""
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)

    def uniforms(self) -> npt.NDArray[np.float64]:
        """[D]: each row's own number in [0, 1)."""
        return uniforms(self.seeds, self.positions)


def uniforms(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) from (seed, position): SplitMix64's finaliser (Steele et al. 2014), twice."""
    z = seeds * np.uint64(0x9E3779B97F4A7C15) + positions * np.uint64(0xD1B54A32D192ED03)
    z += np.uint64(0x9E3779B97F4A7C15)
    for _ in range(2):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Sampling:
    """The N rows of a batch's logits, and which of them ask for more than the largest."""

    rows: list[SampleRow]
    draws: Draws | None = None
    changed: list[int] = field(default_factory=list)  # rows that a processor of logits.py may change
    with_logprobs: list[int] = field(default_factory=list)
    must_be_read: bool = False  # whether the host must know the tokens before the next are taken

    def advance(self, tokens: abc.Iterable[Tokens]) -> None:
        """To the next token of every row; `tokens`: each row's sequence, with the one that was taken."""
        for row, of_row in zip(self.rows, tokens, strict=True):
            row.position, row.tokens = len(of_row), of_row
        if self.draws is not None:
            self.draws.positions[:] += np.uint64(1)
