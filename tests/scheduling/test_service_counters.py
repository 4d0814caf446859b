from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from server.scheduling.service_counters import ServiceCounters


def served(counters: ServiceCounters[str], key: str, amount: float) -> None:
    """One of it comes, runs, is served that much and goes."""
    counters.waits(key)
    counters.starts(key)
    counters.charge(key, amount)
    counters.stops(key)


def test_who_comes_back_has_saved_up_nothing() -> None:
    counters = ServiceCounters[str]()
    counters.waits("busy")
    for _ in range(10):
        counters.waits("busy")
        counters.starts("busy")
        counters.charge("busy", 5.0)
        counters.stops("busy")
    counters.waits("new")
    assert (counters["busy"], counters["new"]) == (50.0, 45.0)


def test_who_stays_below_its_share_saves_up_so_much_and_no_more() -> None:
    counters = ServiceCounters[str](credit=20.0)
    for _ in range(10):
        counters.waits("busy")
        counters.starts("busy")
        counters.charge("busy", 5.0)
        counters.stops("busy")
    counters.waits("new")
    assert (counters["busy"], counters["new"]) == (30.0, 5.0)


def test_who_goes_and_comes_back_at_once_keeps_what_it_had() -> None:
    counters = ServiceCounters[str]()
    counters.waits("light")
    served(counters, "heavy", 100.0)
    counters.waits("heavy")
    assert (counters["light"], counters["heavy"]) == (0.0, 100.0)


def test_it_forgets_those_who_would_be_lifted_anyway() -> None:
    counters = ServiceCounters[int]()
    for key in range(10_000):
        counters.waits(key)
        counters.starts(key)
        counters.charge(key, 3.0)
        counters.stops(key)
        counters.waits(-1)
        counters.charge(-1, 1.0)
        counters.starts(-1)
        counters.stops(-1)
        assert len(counters) < 10


def test_coming_and_going_unserved_leaves_nothing_behind() -> None:
    counters = ServiceCounters[str]()
    served(counters, "it", 9.0)
    for _ in range(10_000):
        counters.waits("it")
        counters.gives_up("it")
    assert counters["it"] == 9.0
    assert len(counters._idle) < 200


CALLS = ["waits", "starts", "gives_up", "stops", "charge"]
ACTION = st.tuples(st.sampled_from("abc"), st.sampled_from(CALLS))


@given(actions=st.lists(ACTION, max_size=60))
def test_counters_never_fall_while_somebody_is_here(actions: list[tuple[str, str]]) -> None:
    counters = ServiceCounters[str]()
    waiting, running = Counter[str](), Counter[str]()
    before: dict[str, float] = {}
    for key, action in actions:
        if action == "waits":
            waiting[key] += 1
            counters.waits(key)
        elif action in ("starts", "gives_up") and waiting[key]:
            waiting[key] -= 1
            running[key] += action == "starts"
            getattr(counters, action)(key)
        elif action == "stops" and running[key]:
            running[key] -= 1
            counters.stops(key)
        elif action == "charge" and running[key]:
            counters.charge(key, 1.5)
        here = +waiting | +running
        assert all(counters[key] >= before.get(key, 0.0) for key in here)
        before = {key: counters[key] for key in here}
        assert (counters.are_waiting, counters.are_running) == (+waiting, +running)
        assert here.keys() <= counters._served.keys()
