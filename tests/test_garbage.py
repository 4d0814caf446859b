"""When garbage is looked for: never because of a rush of objects, which may take a tenth of a second."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from server.garbage import Garbage


class Clock:
    """Goes on by itself while the interpreter looks for garbage."""

    def __init__(self) -> None:
        self.now = 0.0
        self.a_look_takes = 0.0
        self.full_looks = 0

    def __call__(self) -> float:
        return self.now

    def looked(self, phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and info["generation"] == 2:
            self.full_looks += 1
            self.now += self.a_look_takes


@pytest.fixture
def clock() -> Iterator[Clock]:
    before, clock = gc.get_threshold(), Clock()
    gc.callbacks.append(clock.looked)
    yield clock
    gc.callbacks.remove(clock.looked)
    gc.unfreeze()
    gc.set_threshold(*before)


class Circle:
    def __init__(self) -> None:
        self.me = self


def test_a_rush_of_objects_is_not_looked_through(clock: Clock) -> None:
    rush = [[] for _ in range(300_000)]  # type: ignore[var-annotated]
    assert clock.full_looks > 0, "Python's own rule"
    del rush
    Garbage(clock)
    before = clock.full_looks
    rush = [[] for _ in range(300_000)]
    assert clock.full_looks == before
    del rush


@pytest.mark.parametrize(("quiet", "due"), [(True, 10.0), (False, 300.0)])
def test_garbage_goes_when_a_look_is_due(clock: Clock, quiet: bool, due: float) -> None:
    garbage, circle = Garbage(clock), Circle()
    left = weakref.ref(circle)
    del circle
    clock.now = due - 0.1
    assert not garbage.look_if_due(quiet=quiet)
    assert left() is not None
    clock.now = due
    assert garbage.look_if_due(quiet=quiet)
    assert left() is None
    clock.now += due - 0.1
    assert not garbage.look_if_due(quiet=quiet)


def test_what_a_slow_look_found_alive_is_not_looked_at_again(clock: Clock) -> None:
    garbage = Garbage(clock)
    alive = [[] for _ in range(1000)]  # type: ignore[var-annotated]
    frozen = gc.get_freeze_count()
    clock.now = 10.0
    assert garbage.look_if_due(quiet=True)
    assert gc.get_freeze_count() == frozen
    clock.now, clock.a_look_takes = 20.0, 0.02
    assert garbage.look_if_due(quiet=True)
    assert gc.get_freeze_count() >= frozen + len(alive)
