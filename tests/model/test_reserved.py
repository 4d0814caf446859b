"""Zeros that take their pages when they are written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.model.reserved import zeros

CPU = torch.device("cpu")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("shape", [(3, 2, 5), (1,), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_zeros_of_that_shape_and_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = zeros(*shape, dtype=dtype, device=CPU)
    assert made.shape == shape
    assert made.dtype == dtype
    assert torch.equal(made, torch.zeros(shape, dtype=dtype))
    made[:1] = 3.0
    assert made[:1].eq(3.0).all()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells how much is resident")
def test_what_is_not_written_takes_no_memory() -> None:
    before = resident_bytes()
    made = zeros(2**8, 2**20, dtype=torch.float32, device=CPU)  # 1 GiB
    made[0] = 1.0
    assert resident_bytes() - before < 2**26
