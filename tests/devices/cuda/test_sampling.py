"""Argmax and draws in Triton against torch's, in the interpreter (tests/gpu runs them compiled)."""

from __future__ import annotations

import pytest
import torch

from server.devices.cuda.sampling import triton_argmax, triton_draw
from tests.model.draws import assert_draws_as_the_reference

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles here", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of infinities in numpy


@pytest.mark.parametrize("shape", [(1, 1), (3, 511), (2, 4096), (4, 9000)])
def test_argmax_is_that_of_torch(shape: tuple[int, int]) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    scores[-1] = scores[-1].round()  # the first of equals counts
    indices, finite = triton_argmax(scores)
    assert indices.tolist() == [int((row == row.max()).nonzero()[0]) for row in scores]
    assert finite.all()


def test_a_row_without_a_finite_maximum_is_told() -> None:
    scores = torch.randn(5, 9000)
    scores[0, 8999] = float("nan")
    scores[1, 0] = float("inf")
    scores[2] = float("-inf")
    scores[3, 1:] = float("-inf")
    indices, finite = triton_argmax(scores)
    assert finite.tolist() == [False, False, False, True, True]
    assert indices[3] == 0
    assert ((indices >= 0) & (indices < 9000)).all()


@pytest.mark.parametrize(
    ("vocabulary", "count", "without"),
    [
        (1, 5, ()),
        (7, 20, ()),
        (9000, 20, ()),
        (9000, 10, ("top_k",)),
        (9000, 10, ("top_p", "min_p")),
        (9000, 20, ("top_k", "top_p", "min_p")),
    ],
)
def test_draws_are_those_of_torch(vocabulary: int, count: int, without: tuple[str, ...]) -> None:
    assert_draws_as_the_reference(triton_draw, vocabulary, torch.float32, count, without)
