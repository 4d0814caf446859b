from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.scheduling.adapter_gate import AcquireStatus
from server.scheduling.policy import FirstComeFirstServed, Policy, Rank
from server.scheduling.sequence import Sequence, State
from server.scheduling.waiting_line import WaitingLine
from tests.scheduling.fake_step import FakeGate, Harness, request

FULL, PENDING = AcquireStatus.FULL, AcquireStatus.PENDING
X, Y = frozenset("x"), frozenset("y")


def sequence(order: int, *adapters: str, preempted: bool = False) -> Sequence:
    seq = Sequence(request(f"r{order}", 1, *adapters), arrival=float(order), order=order)
    seq.num_preemptions = int(preempted)
    return seq


def line_of(*sequences: Sequence, patience_s: float = 1.0, policy: Policy | None = None) -> WaitingLine:
    line = WaitingLine(patience_s, policy or FirstComeFirstServed())
    for seq in sequences:
        line.add(seq)
    return line


class ByName(FirstComeFirstServed):
    """The last adapter of the alphabet first."""

    def rank(self, tenant: str, digests: frozenset[str]) -> Rank:
        return (-float(ord(min(digests))),)


MEMBER = st.tuples(st.sampled_from([(), ("x",), ("y",), ("x", "y")]), st.booleans(), st.booleans())


@given(members=st.lists(MEMBER, max_size=20), skipped=st.sampled_from([None, X, frozenset("xy")]))
def test_preempted_ones_first_then_in_order_whatever_they_wait_for(
    members: list[tuple[tuple[str, ...], bool, bool]], skipped: frozenset[str] | None
) -> None:
    """Some are taken out when they are tried, and one queue is left after its first."""
    sequences = [
        sequence(order, *mix, preempted=preempted) for order, (mix, preempted, _) in enumerate(members)
    ]
    starts = {seq for seq, (_, _, start) in zip(sequences, members, strict=True) if start}
    line = line_of(*sequences)
    passed_over: set[frozenset[str]] = set()
    tried = []
    for seq in line.in_order(0.0, passed_over):
        tried.append(seq)
        if seq.digests == skipped:
            passed_over.add(skipped)
        elif seq in starts:
            line.remove(seq)
    expected = sorted(sequences, key=lambda seq: (not seq.num_preemptions, seq.order))
    behind = [seq for seq in expected if seq.digests == skipped][1:]
    assert tried == [seq for seq in expected if seq not in behind]
    assert len(line) == len(sequences) - sum(seq.digests != skipped for seq in starts)


def test_the_policy_ranks_lanes_and_in_each_preempted_ones_go_first() -> None:
    mixes = ["x", "y", "x", "z"]
    preempted = sequence(9, "x", preempted=True)
    line = line_of(*(sequence(order, mix) for order, mix in enumerate(mixes)), preempted, policy=ByName())
    assert [seq.order for seq in line.in_order(0.0, ())] == [3, 1, 9, 0, 2]


def test_a_queue_that_is_passed_over_waits_for_its_adapters_as_one() -> None:
    first, second, other = sequence(0, "x"), sequence(1, "x"), sequence(2, "y")
    line = line_of(first, second, other)
    line.pass_over(X, None)
    assert [seq.state for seq in (first, second)] == [State.WAITING_FOR_ADAPTER] * 2
    assert (other.state, line.for_adapter, len(line)) == (State.WAITING, 2, 3)
    line.ready(first)
    assert (first.state, line.for_adapter) == (State.WAITING, 1)
    line.remove(second)
    assert (line.for_adapter, line.waits_for(X), set(line.digests)) == (0, True, {"x", "y"})
    line.remove(first)
    assert (line.waits_for(X), line.digests) == (False, ("y",))


def test_patience_runs_from_the_first_time_that_there_was_no_room() -> None:
    first, second, other = sequence(0, "x"), sequence(1, "x"), sequence(2, "y")
    line = line_of(first, second, other)
    for now, digests in ((1.0, X), (1.5, Y), (1.8, X)):
        line.pass_over(digests, FULL)
        line.start_patience(digests, now, before=None)
    assert line.starving(2.0) is None
    assert line.starving(2.1) == X
    line.pass_over(X, PENDING)  # it has its room
    assert line.starving(2.6) == Y
    line.pass_over(X, FULL)
    assert line.starving(2.6) == X
    line.restart_patience(2.6)
    assert line.starving(3.6) is None
    assert line.starving(3.7) == X
    line.remove(first)
    line.remove(second)
    assert line.starving(3.7) == Y


def test_patience_does_not_run_for_those_who_were_not_tried() -> None:
    first, behind = sequence(0, "x"), sequence(2, "x")
    line = line_of(first, sequence(1, "y"), behind)
    line.pass_over(X, FULL)
    line.start_patience(X, 0.0, before=sequence(1))
    assert line.starving(2.0) == X
    line.remove(first)
    assert line.starving(2.0) is None
    line.start_patience(X, 2.0, before=None)
    assert line.starving(3.5) == X


class Watched(Sequence):
    """Counts every look at one of its kind."""

    __slots__ = ()
    looks = 0

    def __getattribute__(self, name: str) -> object:
        Watched.looks += 1
        return super().__getattribute__(name)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.scheduling.prompt_group.Sequence", Watched)


def looks_of_a_plan(h: Harness) -> int:
    h.step()  # takes note of those who have come
    Watched.looks = 0
    h.scheduler.plan()
    return Watched.looks


def crowded(gate: FakeGate, waiting: int, mixes: int = 1, patience_s: float = 1e9) -> Harness:
    """One runs with an adapter, the others wait for as many as `mixes` others."""
    h = Harness(gate=gate, patience_s=patience_s)
    h.add(request("hot", 1, "hot", max_tokens=200))
    while "hot" not in h.started:
        h.step()
    h.add(*(request(f"r{i}", 1, f"cold{i % mixes}") for i in range(waiting)))
    return h


@pytest.mark.parametrize("patience_s", [1e9, 0.05])
@pytest.mark.parametrize("copy_steps", [0, 100])
@pytest.mark.usefixtures("watched")
def test_those_who_wait_for_the_same_adapter_cost_a_plan_no_more_than_one_of_them(
    copy_steps: int, patience_s: float
) -> None:
    """FULL, PENDING, and held back for another that starves."""

    def looks(waiting: int) -> int:
        h = crowded(FakeGate(2 if copy_steps else 1, copy_steps), 1, patience_s=patience_s)
        h.add(*(request(f"w{i}", 1, "other") for i in range(waiting)))
        return looks_of_a_plan(h)

    assert looks(10_000) == looks(2) < 60


@pytest.mark.usefixtures("watched")
def test_a_plan_looks_once_at_each_set_of_adapters_that_is_waited_for() -> None:
    few, many = (looks_of_a_plan(crowded(FakeGate(1), 2_000, mixes)) for mixes in (10, 100))
    assert few < 10 * 20
    assert many < 100 * 20
