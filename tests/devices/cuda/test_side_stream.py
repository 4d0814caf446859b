"""Shrink beside the base's product, over a device that only keeps books; kernels are interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles here: tests/gpu runs these kernels", allow_module_level=True)

from server.devices.cuda import lora  # noqa: E402  (after the skip)
from server.devices.cuda.levers import Levers  # noqa: E402
from server.devices.cuda.lora import TritonKernels  # noqa: E402
from server.lora.kernels.interface import Modules  # noqa: E402
from server.lora.kernels.reference import ReferenceKernels  # noqa: E402
from server.lora.segments import Segments  # noqa: E402
from tests.lora.kernels import random_arena  # noqa: E402


class Books:
    """What happens on which stream, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, capturing: bool) -> None:
        self.done: list[str] = []
        self.current: Any = Stream("main", self)
        made = iter(range(9))
        names: dict[str, object] = {
            "is_initialized": lambda: True,
            "is_current_stream_capturing": lambda: capturing,
            "Stream": lambda: Stream(f"side {next(made)}", self),
            "current_stream": lambda: self.current,
            "stream": self.on,
        }
        for name, stands_in in names.items():
            monkeypatch.setattr(torch.cuda, name, stands_in)
        for name in ("shrink_rows", "expand_rows", "shrink_tiles", "expand_tiles"):
            monkeypatch.setattr(lora, name, Noted(getattr(lora, name), name, self))

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def note(self, what: str) -> None:
        self.done.append(f"{self.current.name}: {what}")


class Stream:
    def __init__(self, name: str, books: Books) -> None:
        self.name, self._books = name, books

    def wait_stream(self, other: Stream) -> None:
        self._books.done.append(f"{self.name} waits for {other.name}")


class Noted:
    def __init__(self, kernel: Any, name: str, books: Books) -> None:
        self._kernel, self._name, self._books = kernel, name, books

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self._books.note(self._name)
        return self._kernel[grid]


def apply(books: Books, rows: int, levers: Levers, times: int = 1) -> None:
    """LoRA of so many rows, each with an adapter of its own, as a layer does it; right in any case."""
    arena = random_arena([[4]] * rows, [(24, 16)], torch.float32, seed=0)
    segments = Segments.build([(((slot, 1.0),), 1) for slot in range(rows)])
    assert segments is not None
    kernels, modules = TritonKernels(max_mix_rank=16, levers=levers), Modules(0, (16,))
    for _ in range(times):
        x, base = torch.randn(rows, 24), torch.randn(rows, 16)
        begun = kernels.begin(x.clone(), modules, kernels.prepare(segments), arena)
        books.note("product")
        got, want = base.clone(), base.clone()
        begun.finish(got)
        ReferenceKernels().begin(x, modules, segments, arena).finish(want)
        torch.testing.assert_close(got, want)


def test_a_captured_step_forks_before_shrink_and_joins_before_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    """And all of a model's branches are on one stream."""
    books = Books(monkeypatch, capturing=True)
    apply(books, 8, Levers(), times=2)
    assert books.done == 2 * [
        "side 0 waits for main",
        "side 0: shrink_rows",
        "main: product",
        "main waits for side 0",
        "main: expand_rows",
    ]


@pytest.mark.parametrize(
    ("rows", "capturing", "levers"),
    [(8, False, Levers()), (7, True, Levers()), (8, True, Levers(shrink_beside=False))],
    ids=["as it is", "few rows", "off"],
)
def test_else_all_is_on_the_current_stream(
    monkeypatch: pytest.MonkeyPatch, rows: int, capturing: bool, levers: Levers
) -> None:
    books = Books(monkeypatch, capturing=capturing)
    apply(books, rows, levers)
    assert books.done == ["main: shrink_rows", "main: product", "main: expand_rows"]


def test_what_shrink_reads_is_held_until_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller may have made x for this call alone: its memory must not become the product's."""
    Books(monkeypatch, capturing=True)
    arena = random_arena([[4]] * 8, [(24, 16)], torch.float32, seed=0)
    segments = Segments.build([(((0, 1.0),), 1)] * 8)
    assert segments is not None
    kernels, x = TritonKernels(max_mix_rank=16), torch.randn(8, 24)
    begun = kernels.begin(x, Modules(0, (16,)), kernels.prepare(segments), arena)
    assert begun.x is x
