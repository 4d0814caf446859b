from __future__ import annotations

import msgspec
import pytest

from server.messages import ErrorCode
from server.scheduling.deadlines import Deadlines
from server.scheduling.sequence import Sequence
from tests.scheduling.fake_step import FakeGate, Harness, request


def due(name: str, timeout_s: float | None, order: int = 0) -> Sequence:
    wanted = msgspec.structs.replace(request(name, 1), timeout_s=timeout_s)
    return Sequence(wanted, arrival=10.0, order=order)


def test_the_earliest_first_each_once_and_only_of_those_who_live() -> None:
    live = {"a", "b", "c", "d"}
    deadlines = Deadlines(live)
    for name, timeout in (("a", 3.0), ("b", 1.0), ("c", 2.0), ("d", None)):
        deadlines.add(due(name, timeout))
    assert (deadlines.next, deadlines.passed(10.9)) == (11.0, [])
    live.discard("c")
    assert deadlines.passed(13.0) == ["b", "a"]
    assert (deadlines.next, deadlines.passed(99.0)) == (None, [])


def test_those_who_end_early_do_not_pile_up() -> None:
    live: set[str] = set()
    deadlines = Deadlines(live)
    for i in range(10_000):
        live.clear()
        live.add(f"r{i}")
        deadlines.add(due(f"r{i}", 3600.0, i))
        assert len(deadlines._heap) < 200


def late_after(h: Harness, name: str) -> str:
    output = h.outputs[name][-1]
    assert (output.finish_reason, output.error) == ("error", ErrorCode.DEADLINE_EXCEEDED)
    return output.message


@pytest.mark.parametrize("ahead", [False, True])
def test_a_deadline_ends_who_waits_and_who_runs(ahead: bool) -> None:
    h = Harness(max_num_seqs=1, ahead=ahead, seconds_per_step=0.1)
    runs, waits, patient = (
        msgspec.structs.replace(request(name, 3, max_tokens=most), timeout_s=timeout)
        for name, most, timeout in (("a", 100, 1.0), ("b", 100, 0.5), ("c", 2, 60.0))
    )
    h.add(runs, waits, patient)
    h.drain()
    assert late_after(h, "b") == "The request's time of 0.5 s was over while it waited."
    assert late_after(h, "a") == "The request's time of 1 s was over while it ran."
    assert 0 < len(h.tokens("a")) < 12
    assert (h.tokens("b"), h.reason("c")) == ([], "length")
    assert (h.pool.held, h.scheduler.next_deadline) == (0, None)


def test_a_deadline_passes_while_it_waits_for_an_adapter_without_room() -> None:
    gate = FakeGate(capacity=1, pinned=frozenset({"pinned"}))
    h = Harness(gate=gate)
    h.add(msgspec.structs.replace(request("a", 3, "other"), timeout_s=0.3))
    h.step()
    assert not h.scheduler.runnable
    assert h.scheduler.next_deadline == pytest.approx(0.3)
    for _ in range(3):
        h.step()
    assert late_after(h, "a")
    assert not h.scheduler.has_work
