"""The compiled ways to a token against torch's, for every library that this machine can run."""

from __future__ import annotations

import pytest
import torch

from server.devices.cpu import sampling as module
from server.devices.cpu.native import libraries
from server.devices.cpu.sampling import argmax, draw
from tests.model.draws import assert_draws_as_the_reference

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 49152), (3, 511), (16, 1537), (5, 512)])
def test_argmax_is_that_of_torch(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for lib in [*libraries(), None]:
        monkeypatch.setattr(module, "library", lambda lib=lib: lib)
        indices, finite = argmax(scores)
        assert torch.equal(indices, scores.argmax(dim=-1))
        assert finite.all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_of_equals_counts_and_rows_may_lie_apart(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.zeros(4, 2000, dtype=dtype)
    scores[:, [700, 1300]] = 3
    for lib in libraries():
        monkeypatch.setattr(module, "library", lambda lib=lib: lib)
        assert argmax(scores[::2, :1500])[0].tolist() == [700, 700]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_a_finite_maximum_is_told(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(6, 1000, generator=torch.Generator().manual_seed(2)).to(dtype)
    scores[1, 999] = float("nan")
    scores[2, 0] = float("inf")
    scores[3] = float("-inf")
    scores[4, 1:] = float("-inf")  # one value is enough
    scores[5, 3] = float("inf")
    scores[5, 700] = float("nan")
    for lib in [*libraries(), None]:
        monkeypatch.setattr(module, "library", lambda lib=lib: lib)
        indices, finite = argmax(scores)
        assert finite.tolist() == [True, False, False, False, True, False]
        assert indices[4] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 511, 512, 3000, 49152])
def test_draws_are_those_of_torch(
    vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for lib in [*libraries(), None]:
        monkeypatch.setattr(module, "library", lambda lib=lib: lib)
        for without in ((), ("top_k",), ("top_k", "top_p", "min_p")):
            count = 300 if vocabulary < 10_000 else 30
            assert_draws_as_the_reference(draw, vocabulary, dtype, count, without)
