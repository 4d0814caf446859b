"""Draws of every kind, to hold a device's `draw` against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from server.model.sampler import torch_draw
from server.model.sampling import Draws


def random_draws(count: int, rows: int, vocabulary: int, seed: int) -> Draws:
    """Of `rows` rows of logits, some more than once: all combinations of cuts, some as tight as can be."""
    random = np.random.default_rng(seed)

    def choose(*values: float) -> np.ndarray:
        return random.choice(np.array(values), count)

    return Draws(
        rows=random.integers(0, rows, count),
        temperature=choose(0.01, 0.5, 1.0, 3.0, 50.0).astype(np.float32),
        top_k=choose(0, 0, 1, 3, 40, vocabulary, vocabulary + 1).astype(np.int32),
        top_p=choose(1.0, 1.0, 0.95, 0.5, 1e-6).astype(np.float32),
        min_p=choose(0.0, 0.0, 0.02, 0.5, 1.0).astype(np.float32),
        seeds=random.integers(0, 2**63, count).astype(np.uint64),
        positions=random.integers(0, 10_000, count).astype(np.uint64),
    )


def assert_draws_as_the_reference(
    draw: Callable[[torch.Tensor, Draws], torch.Tensor],
    vocabulary: int,
    dtype: torch.dtype,
    count: int = 400,
    without: tuple[str, ...] = (),
) -> None:
    """Scores with ties, with -inf among them, in rows that lie apart. `without` these cuts."""
    rows = 12
    generator = torch.Generator().manual_seed(vocabulary)
    scores = torch.randn(2 * rows, vocabulary + 3, generator=generator)[::2, :vocabulary] * 3
    scores[1] = scores[1].round()  # few values, many of each
    scores[2] = scores[2].mul(4).round().div(4)
    scores[3, 1:] = float("-inf")
    scores[4, torch.rand(vocabulary, generator=generator) < 0.9] = float("-inf")
    scores[4, vocabulary // 2] = 0.0
    scores[5] = 0.0
    scores[6] *= 1000
    scores = scores.to(dtype)
    draws = random_draws(count, rows, vocabulary, seed=vocabulary)
    off = {"top_k": draws.top_k * 0, "top_p": draws.top_p * 0 + 1, "min_p": draws.min_p * 0}
    draws = replace(draws, **{name: off[name] for name in without})
    got, want = draw(scores, draws), torch_draw(scores, draws)
    assert got.dtype == torch.int64
    # A number within rounding of where one token ends and the next begins may fall on either side.
    differ = (got != want).nonzero()[:, 0].tolist()
    assert len(differ) <= 1 + count // 100, [(draws.rows[n], got[n], want[n]) for n in differ]
