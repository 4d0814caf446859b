from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from load_tests.gpu import sweep
from load_tests.gpu.context import Context
from load_tests.gpu.figures import Deadline, Results
from load_tests.gpu.subject import Subject, Version, subject
from load_tests.gpu.sweep import ClosedLoop, Load, Window, draw, figures_of, window, windows
from load_tests.gpu.workload import WORKLOADS

LOAD = Load(rank=8, concurrency=6, alpha=1.0, prompt=16, output=(2, 6))


@pytest.fixture
def on() -> Iterator[Subject]:
    with subject(
        "tiny",
        ranks=[8],
        arena_ranks=8 * sweep.IN_ARENA,
        max_num_seqs=LOAD.concurrency,
        kv_tokens=64,
        host_bytes=2**30,
    ) as found:
        yield found


def test_draws_follow_the_seed_and_a_power_law() -> None:
    first = draw(50, LOAD, seed=3)
    assert first == draw(50, LOAD, seed=3)
    assert first != draw(50, LOAD, seed=4)
    times = Counter(request.rank for request in first)
    assert set(times) <= set(range(1, 51))
    assert times[1] / times[2] == pytest.approx(2, rel=0.3)
    assert times[1] / times[8] == pytest.approx(8, rel=0.5)
    even = Counter(request.rank for request in draw(50, replace(LOAD, alpha=0.0), seed=3))
    assert max(even.values()) < 2 * min(even.values())
    assert {request.max_tokens for request in first} == {2, 3, 4, 5, 6}


def test_the_loop_keeps_as_many_requests_and_waits_for_the_last(on: Subject) -> None:
    loop = ClosedLoop(on, LOAD, draw(20, LOAD, seed=0))
    assert loop.run(0.2) > 0
    stats = on.engine.stats()
    assert 0 < stats.running + stats.waiting <= LOAD.concurrency
    loop.end()
    stats = on.engine.stats()
    assert stats.running == stats.waiting == 0
    assert all(waited > 0 for _, waited in loop.ttft)


def test_a_first_token_waits_for_its_adapter(on: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts turns: with one place and one adapter, the wait for it is all there is."""
    turn = Subject.turn
    turns: list[Subject] = []

    def counted(self: Subject) -> Any:
        turns.append(self)
        return turn(self)

    monkeypatch.setattr(Subject, "turn", counted)
    monkeypatch.setattr(sweep.time, "perf_counter", lambda: float(len(turns)))
    loop = ClosedLoop(on, replace(LOAD, concurrency=1), draw(1, LOAD, seed=0))
    loop.run(40)
    (_, cold), *warm = loop.ttft
    assert on.engine.stats().adapter_loads == 1
    assert {waited for _, waited in warm} == {1.0}
    assert cold > 1


def test_points_beyond_the_arena_load_and_evict(on: Subject) -> None:
    points = [1, sweep.IN_ARENA + 80]
    load = replace(LOAD, alpha=0.0)
    seen = windows(on, load, points, longest_s=1.0, rounds=2, deadline=Deadline(60), results=Results("sweep"))
    assert [one.registered for one in seen] == [1, 1, 180, 180]
    assert [one.loads > 0 for one in seen] == [False, False, True, True]
    for one in seen:
        assert one.tokens > 0
        assert 0 < one.ttft_ms(50) <= one.ttft_ms(99) < math.inf
    stats = on.engine.stats()
    assert len(stats.resident) <= sweep.IN_ARENA
    assert stats.adapter_evictions > 0
    assert len(stats.on_host) > sweep.IN_ARENA


def test_the_most_popular_are_brought_in(on: Subject) -> None:
    sweep.bring_in(on, LOAD, 8, Deadline(60))
    stats = on.engine.stats()
    assert stats.resident == tuple(f"rank-8-{number}" for number in reversed(range(8)))
    assert on.ref(Version(8, 7)).digest in stats.on_host


def test_a_window_without_requests_is_an_error(on: Subject) -> None:
    with pytest.raises(RuntimeError, match="no request"):
        window(on, LOAD, 1, 0.0, 0)


def test_figures_hold_every_point_against_the_fewest_adapters() -> None:
    seen = [
        Window(8, 2.0, 300, (0.1, 0.3), 20),
        Window(1, 2.0, 400, (0.1, 0.1), 0),
        Window(1, 1.0, 100, (0.2, 0.2), 0),
        Window(8, 1.0, 100, (0.2, 0.2), 5),
    ]
    figures = {figure.name.strip(): figure.values for figure in figures_of(seen)}
    assert figures["1 adapters: tokens/s"] == (200, 100)
    assert figures["8 adapters: speed / 1"] == (0.75, 1.0)
    assert figures["8 adapters: TTFT p50, ms"] == pytest.approx((200, 200))
    assert figures["8 adapters: TTFT p99, ms"] == pytest.approx((298, 200))
    assert figures["8 adapters: loads/s"] == (10, 5)


def test_the_part(on: Subject) -> None:
    results = Results("sweep")
    sweep.measure(Context(WORKLOADS["tiny"], results, Deadline(1), lambda: on))
    assert [row.registered for row in results.rows] == [1, 4]
    assert results.about["fast_paths"] == {"fused": True, "flat": True, "graphs": False}
    assert "4 adapters: speed / 1" in results.text
