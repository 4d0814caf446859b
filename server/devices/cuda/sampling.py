"""Tokens from rows of logits on CUDA: one launch for the likeliest, one for all that are drawn.

One program takes a row and reads it several times, from the second-level cache after the first. Nothing is
sorted: where a distribution is cut (top-k, top-p), the score at which it is cut is found by its bits, a few
bits with each reading.

Shape suffixes: N rows of a batch, D of them that are drawn, V the vocabulary, B a block of it, P pivots.
"""

# Triton kernels have no Python types to state, and `triton.jit` is untyped:
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import numpy as np
import torch

from server.devices.cuda.jit import constexpr, jit, kernel, power_of_2, tl
from server.model.sampling import Draws

_BLOCK = 4096
_PIVOTS = 8  # tried with each reading: its range shrinks to a ninth
_ROUNDS = 10  # 9^10 > 2^31, the bits of a distance
_ALL = constexpr(0x7F800000)  # the bits of infinity: no score is farther from the largest


@kernel()
def _argmax(scores, indices, finite, stride, vocabulary, BLOCK: tl.constexpr):
    """The first index of a row's maximum, and whether that is finite and no NaN beside it. Grid (N,)."""
    row = tl.program_id(0).to(tl.int64)
    b_B = tl.arange(0, BLOCK)
    best, index, odd = float("-inf"), vocabulary, 0
    for first in range(0, vocabulary, BLOCK):
        mask_B = first + b_B < vocabulary
        x_B = tl.load(scores + row * stride + first + b_B, mask=mask_B, other=float("-inf")).to(tl.float32)
        odd += tl.sum((x_B != x_B).to(tl.int32), axis=0)
        x_B = tl.where(x_B != x_B, float("-inf"), x_B)
        top = tl.max(x_B, axis=0)
        at = tl.min(tl.where(mask_B & (x_B == top), first + b_B, vocabulary), axis=0)
        index = tl.where(top > best, at, index)
        best = tl.maximum(best, top)
    is_finite = (odd == 0) & (best > float("-inf")) & (best < float("inf"))
    tl.store(indices + row, tl.minimum(index, vocabulary - 1).to(tl.int64))
    tl.store(finite + row, is_finite)


@jit()
def _weights(x, first, vocabulary, top, temperature, BLOCK: tl.constexpr):
    """Of a block of a row: how far each score is below the largest, as bits, and its weight e^-distance."""
    at_B = first + tl.arange(0, BLOCK)
    x_B = tl.load(x + at_B, mask=at_B < vocabulary, other=float("-inf")).to(tl.float32)
    below_B = (top - x_B) / temperature
    weight_B = tl.where(at_B < vocabulary, tl.exp(-below_B), 0.0)
    return below_B.to(tl.int32, bitcast=True), weight_B


@jit()
def _last_below(
    x, vocabulary, top, temperature, most, limit, COUNT: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """The largest distance up to `most` for which what is nearer counts for less than `limit` in all.

    Each score counts for one (COUNT) or for its weight. Between `low`, which is one, and `high`, which is
    none, a round tries pivots at equal steps.
    """
    p_P = tl.arange(0, PIVOTS)
    low, high = most * 0, most + 1
    for _ in range(ROUNDS):
        step = (high - low) // (PIVOTS + 1) + 1
        pivot_P = tl.minimum(low + (p_P + 1) * step, high)
        nearer_P = tl.zeros([PIVOTS], tl.float32)
        for first in range(0, vocabulary, BLOCK):
            distance_B, weight_B = _weights(x, first, vocabulary, top, temperature, BLOCK)
            counted_B = tl.where(distance_B <= most, weight_B, 0.0)
            if COUNT:
                inside_B = first + tl.arange(0, BLOCK) < vocabulary
                counted_B = tl.where(inside_B & (distance_B <= most), 1.0, 0.0)
            nearer_BP = tl.where(distance_B[:, None] < pivot_P[None, :], counted_B[:, None], 0.0)
            nearer_P += tl.sum(nearer_BP, axis=0)
        is_below_P = (nearer_P < limit) & (pivot_P < high)
        is_above_P = nearer_P >= limit
        low = tl.maximum(low, tl.max(tl.where(is_below_P, pivot_P, 0), axis=0))
        high = tl.minimum(high, tl.min(tl.where(is_above_P, pivot_P, high), axis=0))
    return low


@kernel()
def _draw(
    scores, rows, floats, top_ks, token_ids, stride, vocabulary,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """A token for each drawn row. Grid (D,). `floats`: [D, 4], temperature, top-p, min-p, its number."""
    draw = tl.program_id(0).to(tl.int64)
    x = scores + tl.load(rows + draw) * stride
    temperature, top_p = tl.load(floats + 4 * draw), tl.load(floats + 4 * draw + 1)
    min_p, uniform = tl.load(floats + 4 * draw + 2), tl.load(floats + 4 * draw + 3)
    b_B = tl.arange(0, BLOCK)

    top = float("-inf")
    for first in range(0, vocabulary, BLOCK):
        mask_B = first + b_B < vocabulary
        x_B = tl.load(x + first + b_B, mask=mask_B, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, tl.max(x_B, axis=0))

    most = vocabulary * 0 + _ALL
    if TOP_K:
        top_k = tl.load(top_ks + draw)
        limit = tl.where(top_k > 0, top_k, vocabulary + 1).to(tl.float32)
        most = _last_below(x, vocabulary, top, temperature, most, limit, True, ROUNDS, BLOCK, PIVOTS)
    if TOP_P:
        mass = 0.0
        for first in range(0, vocabulary, BLOCK):
            distance_B, weight_B = _weights(x, first, vocabulary, top, temperature, BLOCK)
            mass += tl.sum(tl.where(distance_B <= most, weight_B, 0.0), axis=0)
        limit = tl.where(top_p < 1.0, top_p * mass, 2.0 * mass)
        most = _last_below(x, vocabulary, top, temperature, most, limit, False, ROUNDS, BLOCK, PIVOTS)

    mass = 0.0
    for first in range(0, vocabulary, BLOCK):
        distance_B, weight_B = _weights(x, first, vocabulary, top, temperature, BLOCK)
        mass += tl.sum(tl.where((distance_B <= most) & (weight_B >= min_p), weight_B, 0.0), axis=0)
    target = uniform * mass
    before, token, found = 0.0, 0, 0
    for first in range(0, vocabulary, BLOCK):
        distance_B, weight_B = _weights(x, first, vocabulary, top, temperature, BLOCK)
        weight_B = tl.where((distance_B <= most) & (weight_B >= min_p), weight_B, 0.0)
        beyond_B = (before + tl.cumsum(weight_B, axis=0) > target) & (weight_B > 0)
        at = tl.min(tl.where(beyond_B, first + b_B, vocabulary), axis=0)
        # Rounding could reach past the last token of positive weight: the last one there is, is kept so far.
        last = tl.max(tl.where(weight_B > 0, first + b_B, -1), axis=0)
        here = tl.where(at < vocabulary, at, tl.maximum(last, token))
        token = tl.where(found == 0, here, token)
        found = tl.where(at < vocabulary, 1, found)
        before += tl.sum(weight_B, axis=0)
    tl.store(token_ids + draw, token)


def triton_argmax(scores_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `SamplingOperators.argmax`."""
    rows, vocabulary = scores_NV.shape
    indices_N = torch.empty(rows, dtype=torch.int64, device=scores_NV.device)
    finite_N = torch.empty(rows, dtype=torch.bool, device=scores_NV.device)
    _argmax[(rows,)](
        scores_NV, indices_N, finite_N, scores_NV.stride(0), vocabulary, BLOCK=_block(vocabulary), num_warps=8
    )
    return indices_N, finite_N


def triton_draw(scores_NV: torch.Tensor, draws: Draws) -> torch.Tensor:
    """See `SamplingOperators.draw`. What it sums, it sums in float32."""
    device, vocabulary = scores_NV.device, scores_NV.shape[1]
    parameters = draws.temperature, draws.top_p, draws.min_p, draws.uniforms().astype(np.float32)
    floats = np.stack(parameters, axis=1)
    rows_D, floats_D4, top_k_D = (
        torch.from_numpy(array).to(device, non_blocking=True) for array in (draws.rows, floats, draws.top_k)
    )
    token_ids_D = torch.empty(len(floats), dtype=torch.int64, device=device)
    _draw[(len(floats),)](
        scores_NV, rows_D, floats_D4, top_k_D, token_ids_D, scores_NV.stride(0), vocabulary,
        TOP_K=bool((draws.top_k > 0).any()), TOP_P=bool((draws.top_p < 1).any()),
        ROUNDS=_ROUNDS, BLOCK=_block(vocabulary), PIVOTS=_PIVOTS, num_warps=8,
    )  # fmt: skip
    return token_ids_D


def _block(vocabulary: int) -> int:
    return min(_BLOCK, power_of_2(vocabulary))
