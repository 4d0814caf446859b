"""A launch that finds its compiled kernel by itself takes no other than Triton would."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton._C.libtriton import native_specialize_impl  # noqa: E402  (after the skip)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import CompiledKernel, make_backend  # noqa: E402

from server.devices.cuda.jit import Kernel, _kinds  # noqa: E402  (the same)

COUNTS = [0, 1, 2, 15, 16, 17, 32, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, 2**33, -1, -16, -17, 2.5]
TENSORS = [torch.empty(9, dtype=dtype)[at:] for dtype in (torch.float32, torch.bfloat16) for at in (0, 1)]
X = torch.empty(4)
ARGUMENTS: list[Any] = [*COUNTS, *TENSORS]


def test_what_looks_the_same_is_compiled_the_same() -> None:
    backend = make_backend(GPUTarget("cuda", 90, 32))
    told = [(_kinds([each]), native_specialize_impl(backend, each, False, True, True)) for each in ARGUMENTS]
    for ((aligned, one), mine), ((also_aligned, other), yours) in product(told, told):
        if aligned and also_aligned and one == other:
            assert mine == yours, (one, mine, yours)


class Compiled(CompiledKernel):
    """One that notes its launches."""

    def __init__(self, launched: list[Any]) -> None:
        self.launched = launched
        self.module = None  # that is looked at in the end

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launched.append((grid, arguments))


class Jitted:
    """Triton's look-up: what it gives is of the kinds of its arguments."""

    def __init__(self) -> None:
        self.looked_up: list[Any] = []
        self.launched: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> Compiled:
            self.looked_up.append(arguments)
            return Compiled(self.launched)

        return launch


def a_kernel(x, n, BLOCK, PDL):  # type: ignore[no-untyped-def]  # as kernels are
    """Never run."""


def test_a_launch_of_a_known_kind_is_not_looked_up() -> None:
    kernel, jitted = Kernel(a_kernel, ["n"]), Jitted()
    kernel.jitted = jitted
    x, y = torch.empty(4), torch.empty(4)
    kernel[(3,)](x, 32, PDL=False, BLOCK=8, num_warps=4)
    kernel[(5, 2)](y, 48, PDL=False, BLOCK=8, num_warps=4)
    assert jitted.launched == [((5, 2, 1, 1), (y, 48, 8, False))], "constants by their place, options not"
    assert len(jitted.looked_up) == 1


@pytest.mark.parametrize(
    ("x", "n", "block"),
    [
        (torch.empty(4), 33, 8),
        (torch.empty(4), 1, 8),
        (torch.empty(4).half(), 32, 8),
        (torch.empty(4), 32, 9),
    ],
)
def test_one_of_another_kind_is_looked_up(x: torch.Tensor, n: int, block: int) -> None:
    kernel, jitted = Kernel(a_kernel, ["n"]), Jitted()
    kernel.jitted = jitted
    kernel[(1,)](torch.empty(4), 32, BLOCK=8, PDL=False)
    kernel[(1,)](x, n, BLOCK=block, PDL=False)
    assert len(jitted.looked_up) == 2
    assert not jitted.launched


def test_a_tensor_that_begins_anywhere_is_looked_up_each_time() -> None:
    kernel, jitted = Kernel(a_kernel, ["n"]), Jitted()
    kernel.jitted = jitted
    for _ in range(2):
        kernel[(1,)](torch.empty(5)[1:], 32, BLOCK=8, PDL=False)
    assert len(jitted.looked_up) == 2
