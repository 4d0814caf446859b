"""Argmax and draws on CUDA against torch's, at the vocabularies of real models."""

from __future__ import annotations

import pytest
import torch

from server.devices.cuda.sampling import triton_argmax, triton_draw
from server.model.sampling import Draws
from tests.gpu.errors import poison_free_memory
from tests.model.draws import assert_draws_as_the_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@DTYPES
@pytest.mark.parametrize("vocabulary", [49152, 128256, 151936])
@pytest.mark.parametrize("rows", [1, 64, 256])
def test_argmax(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    scores = torch.randn(rows, vocabulary, device="cuda").to(dtype)
    scores[0, 7] = float("nan")
    poison_free_memory()
    indices, finite = triton_argmax(scores)
    assert finite.tolist() == [False] + [True] * (rows - 1)
    best = scores[1:].amax(dim=-1, keepdim=True)
    assert torch.equal(indices[1:], (scores[1:] == best).int().argmax(dim=-1))


@DTYPES
@pytest.mark.parametrize("vocabulary", [7, 49152, 128256])
def test_draws(vocabulary: int, dtype: torch.dtype) -> None:
    def draw(scores: torch.Tensor, draws: Draws) -> torch.Tensor:
        poison_free_memory()
        return triton_draw(scores.cuda(), draws).cpu()

    assert_draws_as_the_reference(draw, vocabulary, dtype, count=200)
