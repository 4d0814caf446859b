from __future__ import annotations

import time

import msgspec

from load_tests.fake_engine import TickingEngine, empty_stats
from server.messages import EngineStats, Request, SamplingParams, TokenOutput


def request(name: str, tokens: int) -> Request:
    return Request(name, [1, 2, 3], SamplingParams(max_tokens=tokens))


def drain(engine: TickingEngine) -> dict[str, list[TokenOutput]]:
    """Steps as the worker does, until it has nothing to do."""
    outputs: dict[str, list[TokenOutput]] = {}
    while (idle_ms := engine.idle_ms()) is not None:
        time.sleep(idle_ms / 1000)
        for output in engine.step()[0]:
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def test_exactly_the_tokens_asked_for() -> None:
    engine = TickingEngine(step_s=0.0)
    for name, tokens in (("one", 1), ("seven", 7), ("many", 2000)):
        engine.add(request(name, tokens))
    outputs = drain(engine)
    assert {name: len(made) for name, made in outputs.items()} == {"one": 1, "seven": 7, "many": 2000}
    for made in outputs.values():
        assert all(len(output.token_ids) == 1 for output in made)
        assert [output.finish_reason for output in made] == [None] * (len(made) - 1) + ["length"]


def test_a_tick_comes_in_its_time() -> None:
    engine = TickingEngine(step_s=0.01)
    engine.add(request("a", 5))
    began = time.monotonic()
    assert engine.step() == ([], [])
    assert len(drain(engine)["a"]) == 5
    assert time.monotonic() - began > 0.04


def test_a_late_tick_is_caught_up_with() -> None:
    engine = TickingEngine(step_s=0.01)
    engine.add(request("a", 5))
    time.sleep(0.05)
    assert [len(engine.step()[0]) for _ in range(3)] == [1, 1, 1]


def test_aborted_requests_get_nothing_more() -> None:
    engine = TickingEngine(step_s=0.0)
    engine.add(request("a", 5))
    engine.step()
    engine.abort(["a", "unknown"])
    assert engine.idle_ms() is None
    assert engine.step() == ([], [])


def test_stats_cross_the_border() -> None:
    engine = TickingEngine(step_s=0.0)
    engine.add(request("a", 5))
    stats = engine.stats()
    assert stats.running == 1
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(stats), type=EngineStats) == stats
    assert empty_stats().resident == ()
