"""Logits to tokens, as tensors over the batch.

A sampled token is a function of the logits and of (seed, position) only: each row draws one uniform number
from a counter-based hash and inverts the cumulative distribution, so a seeded request gives the same tokens
whoever shares its batch, and a preempted one continues as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from server.messages import Logprobs, SamplingParams
from server.model.logits import PROCESSORS, LogitsProcessor
from server.model.sampling import SMALLEST_TEMPERATURE, Draws, SampleRow, Sampling

_NEVER = float("-inf")


@dataclass(frozen=True)
class SampledLogprobs:
    """Of L of a batch's N rows."""

    rows: list[int]
    counts: list[int]  # how many of the likeliest tokens each row asks for, K at most
    chosen: torch.Tensor  # [L] float32, of the sampled tokens
    top: torch.Tensor  # [L, K] float32, of the likeliest tokens
    top_ids: torch.Tensor  # [L, K] int64


@dataclass(frozen=True)
class Sampled:
    """What was taken from N rows of logits, in row order, where the logits are."""

    token_ids: torch.Tensor  # [N] int64
    finite: (
        torch.Tensor
    )  # [N] bool; where NaN or +Inf was in the logits, or came of them, the token means nothing
    logprobs: SampledLogprobs | None = None

    def tensors(self) -> list[torch.Tensor]:
        """All there are."""
        of_logprobs = self.logprobs
        if of_logprobs is None:
            return [self.token_ids, self.finite]
        return [self.token_ids, self.finite, of_logprobs.chosen, of_logprobs.top, of_logprobs.top_ids]

    def on_host(self, tensors: Sequence[torch.Tensor]) -> SampledTokens:
        """The same, from the copies of what `tensors` gave."""
        token_ids, finite, *of_logprobs = (tensor.tolist() for tensor in tensors)
        logprobs: list[Logprobs | None] = [None] * len(token_ids)
        if self.logprobs is not None:
            asked = zip(self.logprobs.rows, self.logprobs.counts, *of_logprobs, strict=True)
            for row, count, chosen, top, top_ids in asked:
                if finite[row]:
                    likeliest = [
                        pair for pair in zip(top_ids[:count], top[:count], strict=True) if pair[1] > _NEVER
                    ]
                    logprobs[row] = Logprobs(token_ids[row], chosen, likeliest)
        return SampledTokens(token_ids, finite, logprobs)


@dataclass(frozen=True)
class SampledTokens:
    """Tokens in row order, on the host. `finite[n]` is False where NaN or +Inf was in the logits, or came of
    them by a processor: no token."""

    token_ids: list[int]
    finite: list[bool]
    logprobs: list[Logprobs | None]


class SamplingOperators(Protocol):
    """What a device has for taking tokens."""

    def argmax(self, scores_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The index of each row's largest score, [N] int64, and whether that is finite, [N] bool.

        It is not in a row with a NaN.
        """
        ...

    def draw(self, scores_NV: torch.Tensor, draws: Draws) -> torch.Tensor:
        """A token for each row of `draws`, by its own number: [D] int64. scores_NV: any float type.

        The distribution is softmax(scores / temperature) over the tokens that are left: the `top_k` largest,
        of those the fewest that hold `top_p` of what they hold together (Holtzman et al. 2019), at least
        `min_p` times as likely as the likeliest. Equal scores stay or go together. The token is the first in
        the order of the vocabulary up to which there is more than the row's number of the whole.
        """
        ...


class Sampler:
    """Greedy, temperature, top-k, top-p, min-p, logprobs, after the processors of logits.py."""

    def __init__(self, operators: SamplingOperators) -> None:
        self._operators = operators
        self._processors = [new_processor() for new_processor in PROCESSORS]

    def sample(self, logits_NV: torch.Tensor, sampling: Sampling) -> Sampled:
        """logits_NV: [N, vocabulary], any float type. Does not wait for the device."""
        if not sampling.rows:
            none = logits_NV.new_empty(0)
            return Sampled(none.long(), none.bool())
        token_ids_N, finite_N = self._operators.argmax(logits_NV)
        changes = self._changes(sampling, logits_NV.device)
        scores_NV = logits_NV
        if changes:
            scores_NV = logits_NV.to(torch.float32, copy=True)
            for processor, at_R, rows in changes:
                processor.apply(scores_NV, at_R, rows)
            # A logit that a processor made NaN or +Inf makes the row's token mean nothing, as the model's own
            # does. One that a later processor banned does not count: no token can come of it.
            token_ids_N, still_finite_N = self._operators.argmax(scores_NV)
            finite_N &= still_finite_N
        if sampling.draws is not None:
            at_D = torch.from_numpy(sampling.draws.rows).to(logits_NV.device, non_blocking=True)
            token_ids_N.index_copy_(0, at_D, self._operators.draw(scores_NV, sampling.draws))
        for processor, at_R, rows in changes:
            processor.taken(token_ids_N[at_R], rows)
        return Sampled(token_ids_N, finite_N, _logprobs(logits_NV, scores_NV, token_ids_N, sampling))

    def begin(self, sampling: Sampling, vocabulary: int) -> None:
        """Before the logits of these rows are computed: what can be done beside that."""
        for processor in self._processors if sampling.changed else ():
            rows = [sampling.rows[n] for n in sampling.changed if processor.wants(sampling.rows[n])]
            if rows:
                processor.begin(rows, vocabulary)

    def _changes(
        self, sampling: Sampling, device: torch.device
    ) -> list[tuple[LogitsProcessor, torch.Tensor, list[SampleRow]]]:
        """Each processor that is wanted, where its rows stand, and those."""
        changes = []
        for processor in self._processors if sampling.changed else ():
            at = [n for n in sampling.changed if processor.wants(sampling.rows[n])]
            if at:
                at_R = torch.tensor(at).to(device, non_blocking=True)
                changes.append((processor, at_R, [sampling.rows[n] for n in at]))
        return changes


def _logprobs(
    logits_NV: torch.Tensor, scores_NV: torch.Tensor, token_ids_N: torch.Tensor, sampling: Sampling
) -> SampledLogprobs | None:
    """`scores_NV`: the logits after the processors."""
    rows_L = sampling.with_logprobs
    if not rows_L:
        return None
    counts = [sampling.rows[n].params.logprobs or 0 for n in rows_L]
    at_L = torch.tensor(rows_L).to(logits_NV.device, non_blocking=True)
    logprobs_LV = logits_NV[at_L].float().log_softmax(dim=-1)
    chosen_L1 = logprobs_LV.gather(1, token_ids_N[at_L][:, None])
    processed = [at for at, n in enumerate(rows_L) if sampling.rows[n].params.processed_logprobs]
    if processed:
        at_P = torch.tensor(processed).to(logits_NV.device, non_blocking=True)
        params = [sampling.rows[rows_L[at]].params for at in processed]
        token_ids_P1 = token_ids_N[at_L[at_P]][:, None]
        left_PV, chosen_P1 = _processed(scores_NV[at_L[at_P]].float(), token_ids_P1, params)
        logprobs_LV.index_copy_(0, at_P, left_PV)
        chosen_L1.index_copy_(0, at_P, chosen_P1)
    top = logprobs_LV.topk(min(max(counts), logits_NV.shape[1]))
    return SampledLogprobs(rows_L, counts, chosen_L1[:, 0], top.values, top.indices)


def _processed(
    scores_PV: torch.Tensor, token_ids_P1: torch.Tensor, params: Sequence[SamplingParams]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the distribution that each row is drawn from, -inf for what is left out; and those
    of the tokens that were drawn. Greedy rows have a temperature of 1, and leave nothing out."""
    limits = [
        (row.temperature, row.top_k, row.top_p, row.min_p)
        if row.temperature >= SMALLEST_TEMPERATURE
        else (1.0, 0, 1.0, 0.0)
        for row in params
    ]
    of_rows = torch.tensor(limits, dtype=torch.float32).to(scores_PV.device, non_blocking=True)
    temperature_P1, *cuts = of_rows[:, :, None].unbind(1)
    scores_PV = scores_PV / temperature_P1
    weights_PV = (scores_PV - scores_PV.amax(dim=-1, keepdim=True)).exp()
    left_out_PV = _cut(weights_PV, *cuts) == 0
    total_P1 = scores_PV.masked_fill(left_out_PV, _NEVER).logsumexp(dim=-1, keepdim=True)
    # The kernels that draw may round a limit otherwise: a drawn token has a finite one all the same.
    chosen_P1 = scores_PV.gather(1, token_ids_P1) - total_P1
    return (scores_PV - total_P1).masked_fill(left_out_PV, _NEVER), chosen_P1


def torch_argmax(scores_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `SamplingOperators.argmax`. Where a score is not finite, its index means nothing."""
    indices_N = scores_NV.argmax(dim=-1)  # of a NaN where there is one
    return indices_N, torch.isfinite(scores_NV.gather(1, indices_N[:, None])[:, 0])


def torch_draw(scores_NV: torch.Tensor, draws: Draws) -> torch.Tensor:
    """See `SamplingOperators.draw`: the reference, in float64 where it sums."""
    device = scores_NV.device

    def column(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)[:, None]

    scores_DV = scores_NV[column(draws.rows)[:, 0]].float()
    # The largest score becomes 0 before the division, so that a tiny temperature cannot overflow.
    weights_DV = ((scores_DV - scores_DV.amax(dim=-1, keepdim=True)) / column(draws.temperature)).exp()
    if draws.cuts.any():
        weights_DV = _cut(weights_DV, *map(column, (draws.top_k, draws.top_p, draws.min_p)))
    cumulative_DV = weights_DV.double().cumsum(dim=-1)
    target_D1 = column(draws.uniforms()) * cumulative_DV[:, -1:]
    index_D = torch.searchsorted(cumulative_DV, target_D1, right=True)[:, 0]
    # Rounding could reach past the last token of positive weight.
    last_D = weights_DV.shape[1] - 1 - (weights_DV > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(index_D, last_D)


def _cut(
    weights_DV: torch.Tensor, top_k_D1: torch.Tensor, top_p_D1: torch.Tensor, min_p_D1: torch.Tensor
) -> torch.Tensor:
    """The weights, the largest of which is 1, with 0 for those that are left out."""
    vocabulary = weights_DV.shape[1]
    sorted_DV = weights_DV.sort(dim=-1, descending=True).values
    last_D1 = torch.where(top_k_D1 > 0, top_k_D1, vocabulary).clamp(max=vocabulary).long() - 1
    sorted_DV *= sorted_DV >= sorted_DV.gather(1, last_D1)
    mass_DV = sorted_DV.double().cumsum(dim=-1)
    left_out_DV = mass_DV - sorted_DV >= top_p_D1 * mass_DV[:, -1:]  # so much of it is likelier
    left_out_DV[:, 0] = False
    smallest_D1 = sorted_DV.masked_fill(left_out_DV | (sorted_DV == 0), 1.0).amin(dim=-1, keepdim=True)
    return weights_DV * (weights_DV >= torch.maximum(smallest_D1, min_p_D1))
