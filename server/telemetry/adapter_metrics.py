"""What `/metrics/adapters` shows: figures of the adapters with the most traffic, and of all others together.

However many names come and go, the number of series and the memory stay what they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from server.messages import EngineStats
from server.telemetry.exposition import gauge

SHOWN = 50  # adapters with series of their own
REST = "*"  # the label of all others; an adapter's name begins with a letter or a digit
OUTCOMES = ("completed", "failed", "aborted")

_TRACKED = 1000  # names whose traffic is known, twice as many for a while
_HALF_LIFE_S = 600.0  # after which traffic counts half
_MUCH_MORE = 2.0  # so many times the traffic of the least shown one takes its place, or two would alternate


@dataclass(eq=False)
class AdapterTotals:
    """What one adapter, or all others together, have served since they are shown."""

    requests: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_tokens: int = 0  # requests that got one
    first_token_s: float = 0.0  # of all these together, from handing over to the engine
    last_used: float = 0.0  # seconds since 1970
    digest: str = ""  # of the version that was used last


@dataclass(frozen=True)
class Served:
    """One request that has ended, for one of its adapters."""

    adapter: str  # its name
    digest: str
    outcome: str  # one of OUTCOMES
    prompt_tokens: int
    output_tokens: int
    first_token_s: float | None  # None: it ended before

    def add_to(self, totals: AdapterTotals) -> None:
        totals.requests[self.outcome] += 1
        totals.prompt_tokens += self.prompt_tokens
        totals.output_tokens += self.output_tokens
        if self.first_token_s is not None:
            totals.first_tokens += 1
            totals.first_token_s += self.first_token_s
        totals.last_used = time.time()
        totals.digest = self.digest


class RecentTraffic:
    """Tokens by name, halved every half-life, of a bounded number of names.

    A score is kept as it would be at a fixed moment, so that nothing is touched while time passes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._origin = clock()
        self._scores: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._scores)

    def __getitem__(self, name: str) -> float:
        """Comparable with others of the same moment; 0 for a name that is not known."""
        return self._scores.get(name, 0.0)

    def add(self, name: str, tokens: int) -> None:
        age = (self._clock() - self._origin) / _HALF_LIFE_S
        if age > 32:
            self._scores = {each: score * 2.0**-age for each, score in self._scores.items()}
            self._origin, age = self._clock(), 0.0
        self._scores[name] = self[name] + tokens * 2.0**age
        if len(self._scores) > 2 * _TRACKED:
            best = sorted(self._scores, key=self.__getitem__)[-_TRACKED:]
            self._scores = {each: self._scores[each] for each in best}


class AdapterMetrics(Collector):
    """Counts ended requests by adapter. `stats`: the engine's newest heartbeat, for where adapters are.

    A counter never jumps: a request is counted once, under its adapter where that is shown at the time, else
    under REST. An adapter that leaves takes its series along; one that comes back begins at 0.
    """

    def __init__(
        self,
        stats: Callable[[], EngineStats | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stats = stats
        self._traffic = RecentTraffic(clock)
        self._shown: dict[str, AdapterTotals] = {}
        self._rest = AdapterTotals()

    def count(self, served: Served) -> None:
        self._traffic.add(served.adapter, 1 + served.prompt_tokens + served.output_tokens)
        served.add_to(self._totals(served.adapter))

    def _totals(self, name: str) -> AdapterTotals:
        if name not in self._shown and self._make_room(name):
            self._shown[name] = AdapterTotals()
        return self._shown.get(name, self._rest)

    def _make_room(self, name: str) -> bool:
        """Whether it may be shown; takes out another one for it if need be."""
        if len(self._shown) < SHOWN:
            return True
        least = min(self._shown, key=self._traffic.__getitem__)
        if self._traffic[name] <= _MUCH_MORE * self._traffic[least]:
            return False
        del self._shown[least]
        return True

    def describe(self) -> list[Metric]:
        return []  # else registering would call collect() for the names

    def collect(self) -> Iterator[Metric]:
        rows = [*sorted(self._shown.items()), (REST, self._rest)]
        yield _requests(rows)
        prompts, outputs = [(n, t.prompt_tokens) for n, t in rows], [(n, t.output_tokens) for n, t in rows]
        yield _counters("chorus_adapter_prompt_tokens", "Prompt tokens.", prompts)
        yield _counters("chorus_adapter_output_tokens", "Tokens given.", outputs)
        yield _first_token(rows)
        last_used = GaugeMetricFamily(
            "chorus_adapter_last_used_timestamp_seconds", "End of its last request.", labels=["adapter"]
        )
        for name, totals in rows:
            last_used.add_metric([name], totals.last_used)
        yield last_used
        yield from self._residency()

    def _residency(self) -> Iterator[Metric]:
        stats = self._stats()
        arena = frozenset(stats.resident if stats else ())
        host = frozenset(stats.on_host if stats else ())
        where = GaugeMetricFamily(
            "chorus_adapter_residency", "1 where its weights are.", labels=["adapter", "location"]
        )
        for name, totals in sorted(self._shown.items()):
            place = "arena" if totals.digest in arena else "host" if totals.digest in host else "disk"
            where.add_metric([name, place], 1)
        yield where
        yield gauge("chorus_adapters_in_arena", "Versions in the arena.", len(arena))
        yield gauge("chorus_adapters_on_host", "Versions in host memory, in the arena too or not.", len(host))


def _requests(rows: list[tuple[str, AdapterTotals]]) -> Metric:
    family = CounterMetricFamily(
        "chorus_adapter_requests", "Ended requests, by outcome.", labels=["adapter", "outcome"]
    )
    for name, totals in rows:
        for outcome, count in totals.requests.items():
            family.add_metric([name, outcome], count)
    return family


def _counters(name: str, text: str, rows: list[tuple[str, int]]) -> Metric:
    family = CounterMetricFamily(name, text, labels=["adapter"])
    for adapter, count in rows:
        family.add_metric([adapter], count)
    return family


def _first_token(rows: list[tuple[str, AdapterTotals]]) -> Metric:
    family = SummaryMetricFamily(
        "chorus_adapter_time_to_first_token_seconds", "Of each request's first choice.", labels=["adapter"]
    )
    for name, totals in rows:
        family.add_metric([name], totals.first_tokens, totals.first_token_s)
    return family
