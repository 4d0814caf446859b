"""Logits to tokens, as tensors over the batch.

A sampled token is a function of the logits and of (seed, position) only: each row draws one uniform number
from a counter-based hash and inverts the cumulative distribution, so a seeded request gives the same tokens
whoever shares its batch, and a preempted one continues as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from server.messages import Logprobs, SamplingParams
from server.model.logits import SampleRow, processed, wanted

Argmax = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position): SplitMix64's finaliser (Steele et al. 2014), twice."""
    z = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) & _MASK
    for _ in range(2):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        z ^= z >> 31
    return (z >> 11) * 2.0**-53


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
    finite: torch.Tensor  # [N] bool; where the logits held NaN or +Inf, the token means nothing
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
                    likeliest = list(zip(top_ids[:count], top[:count], strict=True))
                    logprobs[row] = Logprobs(token_ids[row], chosen, likeliest)
        return SampledTokens(token_ids, finite, logprobs)


@dataclass(frozen=True)
class SampledTokens:
    """Tokens in row order, on the host. `finite[n]` is False where the logits held NaN or +Inf: no token."""

    token_ids: list[int]
    finite: list[bool]
    logprobs: list[Logprobs | None]


def torch_argmax(scores_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Operators.argmax`. Where a score is not finite, its index means nothing."""
    indices_N = scores_NV.argmax(dim=-1)  # of a NaN where there is one
    return indices_N, torch.isfinite(scores_NV.gather(1, indices_N[:, None])[:, 0])


class Sampler:
    """Greedy, temperature, top-k, top-p, min-p, logprobs, after the processors of logits.py."""

    def __init__(self, argmax: Argmax = torch_argmax) -> None:
        """`argmax`: see `Operators.argmax`."""
        self._argmax = argmax

    def sample(self, logits_NV: torch.Tensor, rows: Sequence[SampleRow]) -> Sampled:
        """logits_NV: [N, vocabulary], any float type; `rows`: N of them. Does not wait for the device."""
        if not rows:
            none = logits_NV.new_empty(0)
            return Sampled(none.long(), none.bool())
        token_ids_N, finite_N = self._argmax(logits_NV)
        if not any(map(_more_than_greedy, rows)):
            return Sampled(token_ids_N, finite_N)
        raw_NV = logits_NV.float()
        scores_NV = processed(raw_NV, rows)
        if scores_NV is not raw_NV:
            token_ids_N, _ = self._argmax(scores_NV)
        drawn = [n for n, row in enumerate(rows) if row.params.temperature > 0]
        # The two ways give a row different tokens, so which one it takes must not depend on its neighbours.
        for draw, group in (
            (_draw, [n for n in drawn if not _cuts(rows[n].params)]),
            (_draw_cut, [n for n in drawn if _cuts(rows[n].params)]),
        ):
            if group:
                picked_NV = scores_NV if len(group) == len(rows) else scores_NV[group]
                token_ids_N[group] = draw(picked_NV, [rows[n] for n in group])
        return Sampled(token_ids_N, finite_N, _logprobs(raw_NV, token_ids_N, rows))


def _logprobs(
    raw_NV: torch.Tensor, token_ids_N: torch.Tensor, rows: Sequence[SampleRow]
) -> SampledLogprobs | None:
    asked = [(n, row.params.logprobs) for n, row in enumerate(rows) if row.params.logprobs is not None]
    if not asked:
        return None
    rows_L, counts = [n for n, _ in asked], [count for _, count in asked]
    logprobs_LV = raw_NV[rows_L].log_softmax(dim=-1)
    chosen_L1 = logprobs_LV.gather(1, token_ids_N[rows_L][:, None])
    top = logprobs_LV.topk(min(max(counts), raw_NV.shape[1]))
    return SampledLogprobs(rows_L, counts, chosen_L1[:, 0], top.values, top.indices)


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)[:, None]


def _softmax(scores_NV: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """softmax(scores / temperature): [N, V]."""
    temperature_N1 = _column([row.params.temperature for row in rows], scores_NV.device).float()
    # The largest score becomes 0 before the division, so that a tiny temperature cannot overflow.
    return ((scores_NV - scores_NV.amax(dim=-1, keepdim=True)) / temperature_N1).softmax(dim=-1)


def _uniforms(rows: Sequence[SampleRow], device: torch.device) -> torch.Tensor:
    return _column([uniform(row.seed, row.position) for row in rows], device)


def _draw(scores_NV: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """One token id for each row, from the whole distribution: [N]."""
    return _invert(_softmax(scores_NV, rows), _uniforms(rows, scores_NV.device))


def _draw_cut(scores_NV: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """One token id for each row, from the distribution cut by top-k, top-p and min-p: [N]."""
    device, vocabulary = scores_NV.device, scores_NV.shape[1]
    probs_NV, ids_NV = _softmax(scores_NV, rows).sort(dim=-1, descending=True, stable=True)
    top_k = [min(row.params.top_k or vocabulary, vocabulary) for row in rows]
    keep_NV = torch.arange(vocabulary, device=device) < _column([float(k) for k in top_k], device)
    kept_NV = probs_NV * keep_NV
    kept_NV = kept_NV / kept_NV.sum(dim=-1, keepdim=True)
    # Nucleus (Holtzman et al. 2019): a token stays while the mass before it is below top_p.
    before_NV = kept_NV.double().cumsum(dim=-1) - kept_NV
    keep_NV &= before_NV < _column([row.params.top_p for row in rows], device)
    keep_NV &= probs_NV >= probs_NV[:, :1] * _column([row.params.min_p for row in rows], device)
    keep_NV[:, 0] = True
    chosen_N1 = _invert(probs_NV * keep_NV, _uniforms(rows, device))[:, None]
    return ids_NV.gather(1, chosen_N1)[:, 0]


def _invert(weights_NV: torch.Tensor, u_N1: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative weight exceeds u times the total: [N]."""
    cumulative_NV = weights_NV.double().cumsum(dim=-1)
    target_N1 = u_N1 * cumulative_NV[:, -1:]
    index_N = torch.searchsorted(cumulative_NV, target_N1, right=True)[:, 0]
    # Rounding could reach past the last token of positive weight.
    last_N = weights_NV.shape[1] - 1 - (weights_NV > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(index_N, last_N)


def _cuts(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _more_than_greedy(row: SampleRow) -> bool:
    return row.params.temperature > 0 or row.params.logprobs is not None or bool(wanted(row))
