"""How far a kernel may be from float64, and memory that shows what a kernel forgot to write."""

from __future__ import annotations

import torch

# ||out - ref|| / ||ref||. float32 stays float32 (plain tf32 would show: it is near 3e-4); the two short types
# round their inputs, the softmax weights and the result.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    difference = (out.double() - reference).norm() / reference.norm()
    return float("inf") if difference.isnan() else difference.item()


def assert_near(out: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> None:
    error = relative_error(out, reference)
    assert error < BOUNDS[dtype], f"relative error {error:.2e} in {dtype}"


def poison_free_memory(largest: int = 2**28) -> None:
    """Leaves NaN in the memory that the next `torch.empty` of this process gets.

    `largest`: float32 values of one piece (1 GiB). With two of each smaller size it holds 1.5 GiB until the
    test is over, so that six workers fit on a card of 80 GB.
    """
    sizes = [2**size for size in range(9, 26) for _ in "ab"]
    held = [torch.full((size,), torch.nan, device="cuda") for size in [*sizes, largest]]
    del held
