from __future__ import annotations

import pytest
import torch
from torch import nn

from server.devices.cpu.linear import PackedLinear, packed
from server.devices.cpu.native import libraries, library

pytestmark = pytest.mark.skipif(library() is None, reason="no compiler on this machine")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 32), (33, 47), (576, 192), (192, 1536), (1, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 7, 12, 16, 31, 130])
def test_equals_linear(dtype: torch.dtype, bias: bool, n_in: int, n_out: int, tokens: int) -> None:
    torch.manual_seed(tokens)
    linear = nn.Linear(n_in, n_out, bias=bias, dtype=dtype)
    x = torch.randn(1, tokens, n_in, dtype=dtype)
    with torch.no_grad():
        expected = nn.functional.linear(
            x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double()
        )
    for lib in libraries():  # what another processor would run, too
        got = PackedLinear(linear, lib)(x)
        assert got.shape == (1, tokens, n_out)
        assert got.dtype == dtype
        error = (got.double() - expected).norm() / expected.norm()
        assert error < (1e-6 if dtype == torch.float32 else 5e-3)


def test_a_plain_linear_is_packed() -> None:
    assert isinstance(packed(nn.Linear(8, 8)), PackedLinear)


def test_a_quantised_linear_is_left_alone() -> None:
    class Quantised(nn.Linear):
        pass

    linear = Quantised(8, 8)
    assert packed(linear) is linear
