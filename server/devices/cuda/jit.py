"""What kernels in Triton share: its compiler where it is installed, tiles of a batch, powers of two.

Shape suffix: S runs of tokens (sequences, or segments of one adapter mix).
"""

# Triton kernels have no Python types to state, and `triton.jit` is untyped:
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.compiler import CompiledKernel
except ModuleNotFoundError:  # a CPU install: whoever launches a kernel says so
    triton = tl = None

__all__ = [
    "after_the_last",
    "constexpr",
    "jit",
    "kernel",
    "launch_options",
    "power_of_2",
    "power_of_2_below",
    "tile_of",
    "tl",
    "triton",
]


def jit(*counts: str) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit`, harmless without Triton. `counts`: int arguments whose value never recompiles."""
    if triton is None:
        return lambda function: function
    return triton.jit(do_not_specialize=counts)  # type: ignore[no-any-return]  # triton is untyped


def kernel(*counts: str) -> Callable[[Callable[..., Any]], Any]:
    """`jit` of what the host launches: `Kernel`."""
    if triton is None:
        return lambda function: function
    return lambda function: Kernel(function, counts)


class Kernel:
    """A kernel whose launches find by themselves what Triton has compiled for such arguments.

    Triton asks of each argument what may change the code, makes a text of that and looks it up, which takes
    more than half of a launch's time on the host. Here the same is told from types, dtypes and a few bits.
    For one device in a process.
    """

    def __init__(self, function: Callable[..., Any], counts: Sequence[str]) -> None:
        self.jitted = triton.jit(do_not_specialize=counts)(function)
        self._names = list(inspect.signature(function).parameters)
        self._compiled: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """`arguments` are the kernel's first, by place; its constants are among the options, by name."""
        aligned, kinds = _kinds(arguments)
        key = (*kinds, *options.items())
        known = self._compiled.get(key) if aligned else None
        if known is not None:
            compiled, constants = known
            compiled[(*grid, 1, 1)](*arguments, *constants)
            return
        compiled = self.jitted[grid](*arguments, **options)
        if aligned and isinstance(compiled, CompiledKernel):  # the interpreter gives nothing
            constants = tuple(options[name] for name in self._names[len(arguments) :])
            self._compiled[key] = compiled, constants


def _kinds(arguments: Sequence[Any]) -> tuple[bool, list[object]]:
    """Whether all tensors begin on 16 bytes, and of each argument what a kernel may be compiled for."""
    kinds: list[object] = []
    addresses = 0
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            addresses |= argument.data_ptr()
            kinds.append(argument.dtype)
        elif type(argument) is int:  # one, or a multiple of 16 or none, of 32 or 64 bits
            kinds.append("one" if argument == 1 else 2 * (argument >> 31) + (argument & 15 == 0))
        else:
            kinds.append(type(argument))
    return addresses & 15 == 0, kinds


def constexpr(value: int) -> Any:
    """A number of the module that kernels read as a constant."""
    return value if tl is None else tl.constexpr(int(value))


@jit()
def after_the_last():
    """First of all in a kernel, before it returns anywhere: the next kernel's programs may start, and this
    one's wait until what the kernel before has written can be read (programmatic dependent launch).

    Each kernel that is launched so waits for the one before, so that by then all before that are over too.
    """
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


def launch_options(*, dependent: bool) -> dict[str, bool]:
    """Of a kernel that can begin with `after_the_last`."""
    return {"PDL": True, "launch_pdl": True} if dependent else {"PDL": False}


@jit()
def tile_of(starts, n_runs, tile, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """Run of a tile of tokens, its first token and the end of its run (first >= end: no such tile).

    `starts`: [n_runs + 1]. BLOCK_S == 0: every run fits one tile. Otherwise run s owns the tiles from
    starts[s] // BLOCK_T + s on: enough for each, and at most T // BLOCK_T + S in all.
    """
    if BLOCK_S == 0:
        s = tile
        first = tl.load(starts + s)
    else:
        s_S = tl.arange(0, BLOCK_S)
        starts_S = tl.load(starts + s_S, mask=s_S < n_runs, other=0)
        mine_S = (s_S < n_runs) & (starts_S // BLOCK_T + s_S <= tile)
        s = tl.sum(mine_S.to(tl.int32), axis=0) - 1
        first = tl.load(starts + s)
        first += (tile - first // BLOCK_T - s) * BLOCK_T
    return s, first, tl.load(starts + s + 1)


def power_of_2(n: int) -> int:
    """The smallest power of two >= n >= 1."""
    return 1 << (n - 1).bit_length()


def power_of_2_below(n: int) -> int:
    """The largest power of two <= n, n >= 1."""
    return 1 << (n.bit_length() - 1)
