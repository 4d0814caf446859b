"""Who is served when more is asked for than there is: by tenant, adapter and class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec
import pytest

from server.messages import Request
from server.scheduling.policy import FairShare, FirstComeFirstServed, Policy
from server.scheduling.sequence import State
from tests.scheduling.fake_step import FakeGate, Harness, request


def asks(
    name: str,
    tenant: str,
    *adapters: str,
    prompt: int = 4,
    max_tokens: int = 8,
    priority: int = 0,
    weight: float = 1.0,
) -> Request:
    wanted = request(name, prompt, *adapters, max_tokens=max_tokens)
    return msgspec.structs.replace(wanted, tenant=tenant, priority=priority, weight=weight)


def site(policy: Policy | None = None, **options: object) -> Harness:
    settings = {"max_num_seqs": 4, "num_blocks": 512, "prefix_caching": False} | options
    return Harness(policy=policy or FairShare(), **settings)  # type: ignore[arg-type]  # free-form


def tokens_by(h: Harness, of: Callable[[Request], str]) -> Counter[str]:
    counts = Counter[str]()
    for name, wanted in h.requests.items():
        counts[of(wanted)] += len(h.tokens(name))
    return counts


def tenant_of(wanted: Request) -> str:
    return wanted.tenant


def crowd(h: Harness, each: int, *tenants: str, weights: dict[str, float] | None = None) -> None:
    """So many requests of each tenant, all of the first before any of the second."""
    for tenant in tenants:
        weight = (weights or {}).get(tenant, 1.0)
        h.add(*(asks(f"{tenant}{i}", tenant, weight=weight) for i in range(each)))


def test_first_come_first_served_lets_who_came_first_go_first() -> None:
    h = site(FirstComeFirstServed())
    crowd(h, 40, "greedy", "light")
    for _ in range(40):
        h.step()
    assert set(tokens_by(h, tenant_of)) == {"greedy", "light"}
    assert tokens_by(h, tenant_of)["light"] == 0


def test_tenants_that_both_want_more_get_the_same() -> None:
    h = site()
    crowd(h, 40, "greedy", "light")
    for _ in range(60):
        h.step()
    served = tokens_by(h, tenant_of)
    assert abs(served["greedy"] - served["light"]) <= 2 * 4 * 8
    assert served["light"] > 60


def test_a_tenant_of_weight_three_gets_three_times_as_much() -> None:
    h = site()
    crowd(h, 100, "paying", "free", weights={"paying": 3.0})
    for _ in range(120):
        h.step()
    served = tokens_by(h, tenant_of)
    assert 2.3 < served["paying"] / served["free"] < 3.7


def test_long_requests_are_not_a_way_to_get_more() -> None:
    h = site(max_num_seqs=2, max_model_len=512)
    h.add(*(asks(f"a{i}", "long", prompt=40, max_tokens=40) for i in range(20)))
    h.add(*(asks(f"b{i}", "short", prompt=4, max_tokens=4) for i in range(200)))
    for _ in range(500):
        h.step()
    served = Counter[str]()
    for name, wanted in h.requests.items():
        if h.tokens(name):
            served[wanted.tenant] += len(wanted.prompt_token_ids) + 2 * len(h.tokens(name))
    assert 0.7 < served["long"] / served["short"] < 1.4


def test_of_one_tenants_adapters_none_crowds_out_another() -> None:
    h = site(gate=FakeGate(capacity=4))
    h.add(*(asks(f"a{i}", "t", "hot") for i in range(60)))
    h.add(*(asks(f"b{i}", "t", "cold") for i in range(60)))
    for _ in range(60):
        h.step()
    served = tokens_by(h, lambda wanted: wanted.adapters[0].digest)
    assert abs(served["hot"] - served["cold"]) <= 2 * 4 * 8


def test_who_was_away_saved_up_nothing() -> None:
    h = site()
    h.add(*(asks(f"a{i}", "busy") for i in range(200)))
    for _ in range(100):
        h.step()
    before = tokens_by(h, tenant_of)
    h.add(*(asks(f"b{i}", "back") for i in range(100)))
    for _ in range(60):
        h.step()
    gained = tokens_by(h, tenant_of) - before
    assert gained["busy"] > 0.35 * gained.total()


# -- a place for who has few


def start_of_light(policy: Policy, max_tokens: int) -> int:
    """In which step after it came a tenant's only request starts, where another fills all places for long."""
    h = site(policy, max_num_seqs=8, max_model_len=1024)
    h.add(*(asks(f"a{i}", "greedy", max_tokens=max_tokens) for i in range(40)))
    for _ in range(3):
        h.step()
    (light,) = h.add(asks("b", "light", max_tokens=4))
    steps = 0
    while light.state is State.WAITING:
        h.step()
        steps += 1
    h.drain(20_000)
    assert all(h.reason(name) == "length" for name in h.requests)
    return steps


@pytest.mark.parametrize("max_tokens", [50, 200])
def test_a_tenant_gets_a_place_at_once_where_another_has_them_all(max_tokens: int) -> None:
    assert start_of_light(FairShare(), max_tokens) == 1
    assert start_of_light(FirstComeFirstServed(), max_tokens) > max_tokens


@pytest.mark.parametrize(("credit", "places"), [(0.0, 4), (400.0, 6)])
def test_who_has_credit_takes_more_places_for_a_burst(credit: float, places: int) -> None:
    """Its average is far below its share, so others that always want more do not hold its burst up."""
    h = site(FairShare(credit=credit), max_num_seqs=8, max_model_len=1024)
    h.add(*(asks(f"a{i}", "greedy", max_tokens=200) for i in range(40)))
    for _ in range(40):
        h.step()
    burst = h.add(*(asks(f"b{i}", "light", max_tokens=20) for i in range(8)))
    h.step()
    assert sum(seq.state is State.RUNNING for seq in burst) == places
    h.drain(20_000)
    assert all(h.reason(name) == "length" for name in h.requests)


@pytest.mark.parametrize("credit", [0.0, 30.0, 1000.0])
def test_places_are_not_taken_back_and_forth(credit: float) -> None:
    h = site(FairShare(credit=credit), max_num_seqs=8)
    crowd(h, 60, "a", "b", "c")
    h.drain(20_000)
    assert h.scheduler.preemptions <= 180 / 6


def test_a_tenant_alone_never_makes_way_for_itself() -> None:
    h = site()
    crowd(h, 40, "a")
    h.drain()
    assert h.scheduler.preemptions == 0


def test_a_place_is_handed_over_once_no_step_is_in_flight() -> None:
    h = site(max_num_seqs=8, ahead=True, max_model_len=1024)
    h.add(*(asks(f"a{i}", "greedy", max_tokens=100) for i in range(9)))
    for _ in range(3):
        h.step()
    h.add(asks("b", "light"))
    h.step()
    assert not h.scheduler.can_plan_ahead
    h.step()
    assert "b" in h.started
    assert h.scheduler.can_plan_ahead
    h.drain()


def test_a_place_comes_with_the_blocks_that_it_needs() -> None:
    h = site(max_num_seqs=8, num_blocks=64, max_model_len=256)
    h.add(*(asks(f"a{i}", "greedy", prompt=24, max_tokens=40) for i in range(8)))
    for _ in range(8):
        h.step()
    h.add(asks("b", "light", prompt=60))
    for _ in range(4):
        h.step()
    assert "b" in h.started
    h.drain(5_000)


def test_who_makes_room_is_of_the_tenant_with_most_places() -> None:
    h = site(max_num_seqs=4)
    h.add(*(asks(name, tenant) for name, tenant in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"))))
    h.step()
    assert h.scheduler.preempt()
    assert [name for name, seq in h.sequences.items() if seq.num_preemptions] == ["a3"]


def test_the_least_urgent_class_makes_room_first() -> None:
    h = site(max_num_seqs=4)
    h.add(asks("a1", "a"), asks("a2", "a"), asks("b1", "b", priority=5))
    h.step()
    assert h.scheduler.preempt()
    assert [name for name, seq in h.sequences.items() if seq.num_preemptions] == ["b1"]


# -- classes


def test_a_more_urgent_class_goes_first_whoever_asks() -> None:
    h = site(max_num_seqs=1)
    h.add(asks("a", "t", priority=2), asks("b", "t", priority=1), asks("c", "u", priority=0))
    h.add(asks("d", "u", priority=-1))
    h.drain()
    assert sorted(h.started, key=h.started.__getitem__) == ["d", "c", "b", "a"]


def test_no_class_waits_for_ever() -> None:
    """With more urgent work than there is room for, one of the other class starts every `ageing_s`."""
    h = site(FairShare(ageing_s=2.0), max_num_seqs=2)
    h.add(*(asks(f"low{i}", "t", priority=9) for i in range(3)))
    for i in range(400):
        h.add(asks(f"high{i}", "t", max_tokens=4))
        h.step()
    starts = [h.started[f"low{i}"] for i in range(3)]
    assert starts == sorted(starts)
    assert starts[2] < 3 * (2.0 + 1.0)
    assert len(h.started) > 100


def test_a_lane_is_looked_at_anew_when_one_of_it_comes_back() -> None:
    h = site(max_num_seqs=2)
    h.add(asks("a", "t", max_tokens=20), asks("b", "t", max_tokens=20), asks("c", "t"))
    h.step()
    assert h.scheduler.preempt()
    h.step()
    assert h.sequences["b"].state is State.RUNNING
    h.drain()


# -- prefixes


def test_what_one_tenant_asked_is_not_in_the_cache_for_another() -> None:
    h = site(prefix_caching=True)
    for name, tenant in (("a", "t"), ("b", "u"), ("c", "t")):
        h.add(msgspec.structs.replace(request(name, [1, 2, 3] * 6), tenant=tenant))
        h.drain()
    cached = {name: h.outputs[name][0].cached_tokens for name in "abc"}
    assert cached == {"a": 0, "b": 0, "c": 16}


# -- a step's tokens for who is far behind


def test_prompts_of_who_has_credit_are_computed_before_others_for_some_steps() -> None:
    """A step is as long as its tokens, so who has had much less service waits for few of the others'."""
    h = site(FairShare(credit=200.0), max_num_seqs=8, max_num_batched_tokens=32, max_model_len=1024)
    h.add(*(asks(f"a{i}", "greedy", max_tokens=300) for i in range(3)))
    for _ in range(40):
        h.step()
    h.add(asks("late", "greedy", prompt=120))
    h.step()
    tenants: list[set[str]] = []  # of the prompts in each step
    while not h.tokens("late"):
        h.add(asks(f"b{len(tenants)}", "light", prompt=8, max_tokens=1))
        plan = h.step()
        tenants.append({run.seq.tenant for run in plan.runs if run.num_tokens > 1})
    alone = [set_of == {"light"} for set_of in tenants]
    assert alone[:5] == [True, True, True, True, False]
    assert 3 <= alone.count(False) <= 6  # nor does it wait for ever while they keep coming
