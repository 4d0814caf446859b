"""Log-probabilities of prompt tokens, from the logits of the tokens before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import torch

from server.messages import Logprobs
from server.scheduling.step_plan import ScheduledRun

_AT_ONCE = 64  # rows of float32 as wide as the vocabulary
_LOWEST = -9999.0  # what OpenAI's API says of the all but impossible; JSON has no infinity


@dataclass(frozen=True)
class ToldPrompts:
    """What each run of a step says of its prompt, in plan order; `broken`: runs whose logits held a NaN."""

    of_runs: list[list[Logprobs]]
    broken: list[int]


@dataclass(frozen=True)
class PromptScores:
    """Of P scored rows, where the logits are."""

    rows: ScoredRows
    chosen: torch.Tensor  # [P] float32, of the prompt's next tokens
    ranks: torch.Tensor  # [P] int64, how many tokens are as likely at least
    top: torch.Tensor  # [P, K] float32, of the likeliest tokens
    top_ids: torch.Tensor  # [P, K] int64

    def tensors(self) -> list[torch.Tensor]:
        return [self.chosen, self.ranks, self.top, self.top_ids]

    def on_host(self, tensors: Sequence[torch.Tensor]) -> ToldPrompts:
        """The same, from the copies of what `tensors` gave."""
        broken_P = tensors[0].isnan().tolist()
        columns = zip(self.rows.token_ids.tolist(), self.rows.counts, *_lists(tensors), strict=True)
        told = [
            Logprobs(token_id, chosen, list(zip(top_ids[:count], top[:count], strict=True)), rank)
            for token_id, count, chosen, rank, top, top_ids in columns
        ]
        of_runs = [slice(first, last) for first, last in pairwise(accumulate(self.rows.of_runs, initial=0))]
        broken = [run for run, rows in enumerate(of_runs) if any(broken_P[rows])]
        return ToldPrompts([told[rows] for rows in of_runs], broken)


def _lists(tensors: Sequence[torch.Tensor]) -> list[list]:  # type: ignore[type-arg]  # of numbers and of rows
    return [tensor.tolist() for tensor in tensors]


@dataclass(frozen=True)
class ScoredRows:
    """The P of a batch's N rows of logits that say how likely the prompt's next token was."""

    at: torch.Tensor  # [P] int64, indices into N
    others: torch.Tensor  # [N - P] int64, the rows that are sampled
    token_ids: torch.Tensor  # [P] int64, the prompt's next
    counts: list[int]  # how many of the likeliest tokens each row asks for
    of_runs: list[int]  # how many of the P are each run's

    @classmethod
    def of(cls, runs: Sequence[ScheduledRun]) -> ScoredRows | None:
        """In plan order, each run's before those that it samples; None where no run has any."""
        if not any(run.scored for run in runs):
            return None
        is_scored_N = np.repeat(
            [True, False] * len(runs), [n for run in runs for n in (len(run.scored), run.rows)]
        )
        token_ids = [run.seq.tokens[run.scored.start + 1 : run.scored.stop + 1] for run in runs]
        counts = [run.seq.sampling.prompt_logprobs or 0 for run in runs for _ in run.scored]
        return cls(
            torch.from_numpy(np.flatnonzero(is_scored_N)),
            torch.from_numpy(np.flatnonzero(~is_scored_N)),
            torch.from_numpy(np.concatenate(token_ids)),
            counts,
            [len(run.scored) for run in runs],
        )

    @staticmethod
    def places(runs: Sequence[ScheduledRun], starts: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Where they stand among the tokens of the batch, whose runs begin at `starts`: [P]."""
        return np.concatenate(
            [
                np.arange(run.scored.start, run.scored.stop) - run.start + start
                for run, start in zip(runs, starts.tolist(), strict=False)
            ]
        )

    def split(self, logits_NV: torch.Tensor) -> tuple[torch.Tensor, PromptScores]:
        """The logits of the rows that are sampled, and what the others say."""
        at_P, others, token_ids_P = (
            tensor.to(logits_NV.device, non_blocking=True)
            for tensor in (self.at, self.others, self.token_ids)
        )
        most = min(max(self.counts), logits_NV.shape[1])
        pieces = zip(*(torch.split(tensor, _AT_ONCE) for tensor in (at_P, token_ids_P)), strict=True)
        columns = zip(*(_score(logits_NV[at_R], ids_R, most) for at_R, ids_R in pieces), strict=True)
        return logits_NV[others], PromptScores(self, *map(torch.cat, columns))


def _score(
    logits_RV: torch.Tensor, token_ids_R: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `PromptScores`, of some rows."""
    logprobs_RV = logits_RV.float().log_softmax(dim=-1).clamp_min(_LOWEST)
    chosen_R1 = logprobs_RV.gather(1, token_ids_R[:, None])
    top = logprobs_RV.topk(most)
    return chosen_R1[:, 0], (logprobs_RV >= chosen_R1).sum(dim=-1), top.values, top.indices
