"""Refuses what would wait for a device, on a machine that has none.

On a CPU nothing waits, so operations are judged by name, and what Triton's interpreter does is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

# Operations whose result, or its shape, the host reads off the device; and methods that do that undispatched.
WAITING_OPERATIONS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "repeat_interleave"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc"),
}
WAITING_METHODS = {
    *("item", "tolist", "cpu", "numpy", "__array__", "nonzero"),
    *("__bool__", "__int__", "__float__", "__index__", "__contains__"),
}


class Waits(Exception):
    """An operation that would wait for the device."""


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        by_mask = any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for indices in args[1:2]
            if isinstance(indices, list | tuple)
            for index in indices
        )
        name = func.overloadpacket.__name__
        if name in WAITING_OPERATIONS or (by_mask and name in ("index", "index_put", "index_put_")):
            raise Waits(str(func))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in WAITING_METHODS:
            raise Waits(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def refusing() -> Iterator[None]:
    """Raises Waits where the body's torch operations would wait; kernels are interpreted without it."""
    run = InterpretedFunction.run

    def unwatched(self: Any, *args: Any, **options: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(torch._C.DisableTorchFunction())
            stack.enter_context(torch.utils._python_dispatch._disable_current_modes())
            return run(self, *args, **options)

    InterpretedFunction.run = unwatched
    try:
        with _Methods(), _Operations():
            yield
    finally:
        InterpretedFunction.run = run
