"""No decode step waits for the device: none of its operations gives the host a value that was computed.

On a CPU nothing waits, so operations are judged by name, and what Triton's interpreter does is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from server.engine.engine import Engine
from tests.devices.cuda.interpreted import capture, make_interpreted
from tests.model.tiny_models import Job, add_adapter, build, serve, targets_of

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles here: warm-ups of captures refuse waits", allow_module_level=True)

from triton.runtime.interpreter import InterpretedFunction  # noqa: E402  (after the skip)

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # as in test_graphs.py

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


class Watched:
    """A capture whose work, and its replays, may not wait."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.replays += 1
            with refusing():
                work()

        with refusing():
            work()
        return replay


@pytest.fixture(params=["llama", "qwen3"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    engine = make_interpreted(build(request.param, tmp_path / "model"), max_model_len=64, max_num_seqs=2)
    yield engine
    engine.close()


def test_no_decode_step_waits(engine: Engine, tmp_path: Path) -> None:
    watched = Watched()
    capture(engine, watched, most=2)
    before = watched.replays
    targets = targets_of("llama")
    adapter = add_adapter(tmp_path / "model", tmp_path / "adapter", seed=1, rank=4, target_modules=targets)
    serve(engine, [Job([5, 6, 7], adapter, 3), Job([8, 9], None, 3)])
    assert watched.replays - before >= 2


PLANTED: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.flatten().tolist(),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: (x > 0).nonzero(),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: torch.repeat_interleave(x, torch.ones(len(x), dtype=torch.long), dim=0),
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_wait_in_the_forward_would_be_seen(planted: str) -> None:
    embed = torch.nn.Embedding(5, 3)
    ids = torch.tensor([1, 2])
    with refusing():
        embed(ids)
    embed.register_forward_hook(lambda module, args, out: (PLANTED[planted](out), out)[1])
    with pytest.raises(Waits), refusing():
        embed(ids)


@pytest.mark.parametrize("engine", ["llama"], indirect=True)
def test_a_wait_in_the_model_would_be_seen(engine: Engine) -> None:
    embed = engine._runner._model.get_input_embeddings()
    embed.register_forward_hook(lambda module, args, out: out * out.abs().max().item())
    with pytest.raises(Waits, match="item"):
        capture(engine, Watched(), most=2)
