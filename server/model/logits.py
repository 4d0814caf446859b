"""What changes a row's logits before a token is taken from it: penalties, bias, a minimum length.

A sampling option that acts on logits is one `LogitsProcessor` in `PROCESSORS`: whether a row wants it and
what it then does stand side by side, and the sampler asks no other question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from server.messages import SamplingParams
from server.scheduling.sequence import Tokens


@dataclass(slots=True)
class SampleRow:
    """One row of logits that a token is taken from, and what is known of its sequence."""

    params: SamplingParams
    seed: int
    position: int  # of the token to be drawn, in the sequence
    tokens: Tokens  # prompt and output
    num_prompt_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)  # the sequence's own, which processors keep things in

    @property
    def output(self) -> Tokens:
        return self.tokens[self.num_prompt_tokens :]


class LogitsProcessor(Protocol):
    """One option's effect on logits."""

    reads_output: bool  # whether it needs to know every token before the one to be drawn

    def wants(self, row: SampleRow) -> bool:
        """Whether the row's logits change by it."""
        ...

    def apply(self, scores_V: torch.Tensor, row: SampleRow) -> None:
        """Change the scores [vocabulary] of a row that wants it, in place, on their device.

        Some may be -inf already, by a processor before.
        """
        ...


class RepetitionPenalty:
    """Over prompt and output (Keskar et al. 2019)."""

    reads_output = True

    def wants(self, row: SampleRow) -> bool:
        return row.params.repetition_penalty != 1.0

    def apply(self, scores_V: torch.Tensor, row: SampleRow) -> None:
        penalty = row.params.repetition_penalty
        seen = torch.as_tensor(np.unique(row.tokens), device=scores_V.device)
        scores = scores_V[seen]
        scores_V[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)


class CountPenalties:
    """Presence and frequency penalties, over the output, as OpenAI's."""

    reads_output = True

    def wants(self, row: SampleRow) -> bool:
        return bool(row.params.presence_penalty or row.params.frequency_penalty)

    def apply(self, scores_V: torch.Tensor, row: SampleRow) -> None:
        counts_V = torch.bincount(torch.as_tensor(row.output), minlength=scores_V.numel()).to(scores_V.device)
        scores_V -= row.params.frequency_penalty * counts_V + row.params.presence_penalty * (counts_V > 0)


class LogitBias:
    """A number added to the logit of each token that the request names."""

    reads_output = False

    def wants(self, row: SampleRow) -> bool:
        return bool(row.params.logit_bias)

    def apply(self, scores_V: torch.Tensor, row: SampleRow) -> None:
        if "logit_bias" not in row.state:
            bias = row.params.logit_bias or {}
            ids = torch.tensor(list(bias), device=scores_V.device)
            row.state["logit_bias"] = ids, torch.tensor(list(bias.values()), device=scores_V.device)
        ids, values = row.state["logit_bias"]
        scores_V[ids] += values


class MinimumLength:
    """No token that would end the sequence before `min_tokens`."""

    reads_output = False

    def wants(self, row: SampleRow) -> bool:
        return len(row.tokens) - row.num_prompt_tokens < row.params.min_tokens

    def apply(self, scores_V: torch.Tensor, row: SampleRow) -> None:
        if "ending" not in row.state:
            ending = [*row.params.stop_token_ids, *(() if row.params.ignore_eos else row.eos_token_ids)]
            row.state["ending"] = torch.tensor(ending, dtype=torch.long, device=scores_V.device)
        scores_V[row.state["ending"]] = float("-inf")


# In the order in which they act.
PROCESSORS: tuple[LogitsProcessor, ...] = (
    RepetitionPenalty(),
    CountPenalties(),
    LogitBias(),
    MinimumLength(),
)


def wanted(row: SampleRow) -> list[LogitsProcessor]:
    """Those that change the row's logits, in order; none for most rows."""
    return [processor for processor in PROCESSORS if processor.wants(row)]


def reads_output(row: SampleRow) -> bool:
    """Whether a token is drawn from the row only where all before it are known."""
    return any(processor.reads_output and processor.wants(row) for processor in PROCESSORS)


def processed(logits_NV: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """The rows' scores in float32 [N, V]: `logits_NV` itself where it is float32 and nobody changes it."""
    raw_NV = logits_NV.float()
    changes = [(n, processors) for n, row in enumerate(rows) if (processors := wanted(row))]
    if not changes:
        return raw_NV
    scores_NV = raw_NV.clone()
    for n, processors in changes:
        for processor in processors:
            processor.apply(scores_NV[n], rows[n])
    return scores_NV
