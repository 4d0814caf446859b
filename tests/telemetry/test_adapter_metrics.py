"""`/metrics/adapters` under many names: bounded, and no request is counted twice."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from load_tests.fake_engine import empty_stats
from server.messages import EngineStats
from server.telemetry.adapter_metrics import OUTCOMES, REST, SHOWN, AdapterMetrics, Served
from tests.scheduling.fake_step import Clock


def served(name: str, tokens: int = 10, outcome: str = "completed") -> Served:
    return Served(name, f"digest of {name}", outcome, 2, tokens, None if outcome == "aborted" else 0.5)


class Shown:
    """What the metrics show, read as Prometheus reads it."""

    def __init__(self, stats: EngineStats | None = None) -> None:
        self.clock = Clock()
        self.metrics = AdapterMetrics(lambda: stats, self.clock)
        self._registry = CollectorRegistry()
        self._registry.register(self.metrics)

    @property
    def text(self) -> str:
        return generate_latest(self._registry).decode()

    def values(self, name: str, label: str = "adapter") -> dict[str, float]:
        """Of each value of the label, summed over the others."""
        found = Counter[str]()
        for family in text_string_to_metric_families(self.text):
            for sample in family.samples:
                if sample.name == name:
                    found[sample.labels[label]] += sample.value
        return dict(found)

    @property
    def names(self) -> set[str]:
        return set(self.values("chorus_adapter_requests_total")) - {REST}


def test_each_figure_of_an_adapter() -> None:
    resident = msgspec.structs.replace(empty_stats(), resident=("digest of a",), on_host=("digest of b",))
    shown = Shown(resident)
    shown.metrics.count(served("a"))
    shown.metrics.count(served("a", outcome="failed"))
    shown.metrics.count(served("b", outcome="aborted"))
    shown.metrics.count(served("c"))
    lines = shown.text.splitlines()
    for line in (
        'chorus_adapter_requests_total{adapter="a",outcome="completed"} 1.0',
        'chorus_adapter_requests_total{adapter="a",outcome="failed"} 1.0',
        'chorus_adapter_requests_total{adapter="b",outcome="aborted"} 1.0',
        'chorus_adapter_requests_total{adapter="*",outcome="completed"} 0.0',
        'chorus_adapter_prompt_tokens_total{adapter="a"} 4.0',
        'chorus_adapter_output_tokens_total{adapter="a"} 20.0',
        'chorus_adapter_time_to_first_token_seconds_count{adapter="a"} 2.0',
        'chorus_adapter_time_to_first_token_seconds_sum{adapter="a"} 1.0',
        'chorus_adapter_time_to_first_token_seconds_count{adapter="b"} 0.0',
        'chorus_adapter_residency{adapter="a",location="arena"} 1.0',
        'chorus_adapter_residency{adapter="b",location="host"} 1.0',
        'chorus_adapter_residency{adapter="c",location="disk"} 1.0',
        "chorus_adapters_in_arena 1.0",
    ):
        assert line in lines
    assert shown.values("chorus_adapter_last_used_timestamp_seconds")["a"] > 1.7e9


def test_those_with_most_traffic_are_shown_and_the_others_as_one() -> None:
    shown = Shown()
    for at in range(2 * SHOWN):
        shown.metrics.count(served(f"small-{at}"))
    assert len(shown.names) == SHOWN
    assert shown.values("chorus_adapter_requests_total")[REST] == SHOWN
    for _ in range(5):
        shown.metrics.count(served("large", tokens=1000))
    assert "large" in shown.names
    assert len(shown.names) == SHOWN


def test_equals_do_not_take_turns() -> None:
    shown = Shown()
    for _ in range(20):
        for at in range(SHOWN + 5):
            shown.metrics.count(served(f"equal-{at}"))
    assert shown.names == {f"equal-{at}" for at in range(SHOWN)}
    assert shown.values("chorus_adapter_requests_total")[REST] == 20 * 5


def test_traffic_of_long_ago_counts_little() -> None:
    shown = Shown()
    for at in range(SHOWN):
        shown.metrics.count(served(f"old-{at}", tokens=10**6))
    shown.clock.now += 30 * 24 * 3600.0
    shown.metrics.count(served("new", tokens=1))
    assert "new" in shown.names
    shown.clock.now += 10 * 365 * 24 * 3600.0
    shown.metrics.count(served("newest", tokens=1))
    assert "newest" in shown.names


def test_a_hundred_thousand_names_leave_size_and_memory_as_they_were() -> None:
    shown = Shown()

    def come_and_go(names: range) -> None:
        for at in names:
            shown.metrics.count(served(f"customer-{at:06}", tokens=at % 100))

    come_and_go(range(5000))
    size = len(shown.text)
    tracemalloc.start()
    try:
        come_and_go(range(5000, 10_000))
        before = tracemalloc.get_traced_memory()[0]
        come_and_go(range(10_000, 100_000))
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(shown.text) < 1.1 * size < 66_000
    assert grown < 200_000


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3 * SHOWN), st.integers(0, 500), st.sampled_from(OUTCOMES))))
def test_no_counter_jumps_and_every_request_adds_one(requests: list[tuple[int, int, str]]) -> None:
    """What rate() is made of: from one scrape to the next all series together grow by what was served."""
    shown = Shown()
    before: dict[str, float] = {}
    for at, tokens, outcome in requests:
        shown.metrics.count(served(f"a{at}", tokens, outcome))
        after = shown.values("chorus_adapter_requests_total")
        grown = [after[name] - before.get(name, 0.0) for name in after]
        assert min(grown) >= 0
        assert sum(grown) == 1
        before = after
