"""The order in which waiting sequences are admitted, and who makes way when there is no room."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection
from typing import Literal, Protocol

from server.scheduling.sequence import Sequence
from server.scheduling.service_counters import ServiceCounters

Rank = tuple[float, ...]

_PER_PROMPT_TOKEN, _PER_OUTPUT_TOKEN = 1.0, 2.0  # what a token of service costs, as in VTC
_CREDIT_STEPS = 8  # a tenant's credit, in steps full of prompt tokens
_IN_CREDIT = 3.0  # so many times the places of another may one have that has credit left


class Policy(Protocol):
    """Ranks those who wait: the smallest rank is tried first.

    The sequences of one class and tenant that wait for the same adapters are a lane, in order of arrival but
    for preempted ones, which go first. Of lanes of equal ranks the one whose first is the oldest goes first.
    """

    def lane(self, seq: Sequence) -> tuple[int, str]:
        """Its class and tenant, as far as they count."""
        ...

    def class_rank(self, level: int, now: float) -> Rank:
        """Of a class of sequences; of all classes the same number of numbers. Grows within a plan at most."""
        ...

    def rank(self, tenant: str, digests: frozenset[str]) -> Rank:
        """Of a lane within its class. It never falls while somebody waits in it."""
        ...

    def waits(self, seq: Sequence, now: float) -> None:
        """It has got in line: an arrival, or one that was preempted."""
        ...

    def starts(self, seq: Sequence, now: float) -> None:
        """It has left the line and runs. `num_computed` tokens of it came from the cache."""
        ...

    def generated(self, seq: Sequence, tokens: int) -> None:
        """A running one got so many."""
        ...

    def gives_up(self, seq: Sequence) -> None:
        """It waits no longer, and never ran since."""
        ...

    def stops(self, seq: Sequence) -> None:
        """It runs no longer."""
        ...

    def victim(self, running: Collection[Sequence]) -> Sequence:
        """Which of them, at least one, is sent back when memory is short."""
        ...

    def goes_first(self, seq: Sequence) -> bool:
        """Whether its prompt is computed before those of others, while there are any."""
        ...

    @property
    def may_hand_over(self) -> bool:
        """Whether somebody who waits may be owed a place of one who runs."""
        ...

    def owed_by(self, seq: Sequence, running: Collection[Sequence]) -> Sequence | None:
        """Which of them makes way for a waiting one; None: nobody owes it that."""
        ...


class FirstComeFirstServed:
    """In order of arrival, whoever asks. The youngest makes way."""

    may_hand_over = False

    def lane(self, seq: Sequence) -> tuple[int, str]:
        return 0, ""

    def class_rank(self, level: int, now: float) -> Rank:
        return ()

    def rank(self, tenant: str, digests: frozenset[str]) -> Rank:
        return ()

    def waits(self, seq: Sequence, now: float) -> None:
        pass

    def starts(self, seq: Sequence, now: float) -> None:
        pass

    def generated(self, seq: Sequence, tokens: int) -> None:
        pass

    def gives_up(self, seq: Sequence) -> None:
        pass

    def stops(self, seq: Sequence) -> None:
        pass

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return max(running, key=lambda seq: seq.order)

    def goes_first(self, seq: Sequence) -> bool:
        return False

    def owed_by(self, seq: Sequence, running: Collection[Sequence]) -> Sequence | None:
        return None


class FairShare:
    """The tenant that has had the least service goes first, and of its adapters the one that has (VTC, see
    `ServiceCounters`), within classes of priority.

    ageing_s: a class that has waited so long since one of it last started goes before all others, for one.
    credit: service, in tokens of prompts and twice those of outputs, that a tenant may save up while it asks
    for less than its share. Without any, one that comes in bursts waits as long as one that always asks.
    """

    def __init__(self, ageing_s: float = 5.0, credit: float = 0.0) -> None:
        self._ageing_s = ageing_s
        self._lag = credit / 2 if credit else math.inf  # behind another's service, and it has credit left
        self._tenants = ServiceCounters[str](credit)
        self._adapters: dict[str, ServiceCounters[frozenset[str]]] = {}  # of tenants with anybody here
        self._weights: dict[str, float] = {}  # of the same
        self._heaviest = 0.0  # of all that were ever here
        self._classes: dict[int, _Class] = {}  # of those who wait

    def lane(self, seq: Sequence) -> tuple[int, str]:
        return seq.priority, seq.tenant

    def class_rank(self, level: int, now: float) -> Rank:
        since = self._classes[level].since
        return (0.0, since) if now - since > self._ageing_s else (1.0, float(level))

    def rank(self, tenant: str, digests: frozenset[str]) -> Rank:
        return self._tenants[tenant], self._adapters[tenant][digests]

    def waits(self, seq: Sequence, now: float) -> None:
        self._tenants.waits(seq.tenant)
        self._adapters.setdefault(seq.tenant, ServiceCounters()).waits(seq.digests)
        self._weights[seq.tenant] = seq.weight
        self._heaviest = max(self._heaviest, seq.weight)
        level = self._classes.setdefault(seq.priority, _Class(now))
        level.waiting += 1

    def starts(self, seq: Sequence, now: float) -> None:
        self._tenants.starts(seq.tenant)
        self._adapters[seq.tenant].starts(seq.digests)
        self._classes[seq.priority].since = now
        self._leaves_class(seq)
        if not seq.num_preemptions:  # what has to be computed again is no service
            self._charge(seq, _PER_PROMPT_TOKEN * (seq.num_tokens - seq.num_computed))

    def generated(self, seq: Sequence, tokens: int) -> None:
        self._charge(seq, _PER_OUTPUT_TOKEN * tokens)

    def gives_up(self, seq: Sequence) -> None:
        self._tenants.gives_up(seq.tenant)
        self._adapters[seq.tenant].gives_up(seq.digests)
        self._leaves_class(seq)
        self._forget(seq.tenant)

    def stops(self, seq: Sequence) -> None:
        self._tenants.stops(seq.tenant)
        self._adapters[seq.tenant].stops(seq.digests)
        self._forget(seq.tenant)

    def _leaves_class(self, seq: Sequence) -> None:
        level = self._classes[seq.priority]
        level.waiting -= 1
        if not level.waiting:
            del self._classes[seq.priority]

    def _charge(self, seq: Sequence, amount: float) -> None:
        self._tenants.charge(seq.tenant, amount / self._weights[seq.tenant])
        self._adapters[seq.tenant].charge(seq.digests, amount)

    def _forget(self, tenant: str) -> None:
        """Its adapters, once it has nobody here: between them, too, nobody saves up idle time."""
        if not (self._tenants.running(tenant) or self._tenants.are_waiting[tenant]):
            del self._adapters[tenant], self._weights[tenant]

    def victim(self, running: Collection[Sequence]) -> Sequence:
        """The youngest, of the tenant with most places for its weight, of the least urgent class."""
        return max(running, key=lambda seq: (seq.priority, self._places(seq.tenant), seq.order))

    def goes_first(self, seq: Sequence) -> bool:
        """While its tenant has credit left."""
        return self._tenants.behind(seq.tenant) > self._lag

    @property
    def may_hand_over(self) -> bool:
        if len(self._adapters) < 2:
            return False
        most = heapq.nlargest(2, self._tenants.are_running, key=self._places)
        if not most or not self._owed(self._places(most[0]), 0.0, self._heaviest, _IN_CREDIT):
            return False  # nor is anybody, and there may be many
        waiting = self._tenants.are_waiting
        return any(self._is_owed(tenant, other) for tenant in waiting for other in most if other != tenant)

    def owed_by(self, seq: Sequence, running: Collection[Sequence]) -> Sequence | None:
        """The youngest of the tenant with most places beside its own, where that one has had more service and
        has more places, or, while it has much more service, a third as many; and the youngest is of no more
        urgent class."""
        others = [other for other in running if other.priority >= seq.priority and other.tenant != seq.tenant]
        if not others:
            return None
        other = max(others, key=lambda other: (self._places(other.tenant), other.order))
        has_more = self._tenants[other.tenant] >= self._tenants[seq.tenant]
        return other if has_more and self._is_owed(seq.tenant, other.tenant) else None

    def _is_owed(self, tenant: str, other: str) -> bool:
        in_credit = self._tenants[other] - self._tenants[tenant] > self._lag
        times = _IN_CREDIT if in_credit else 1.0
        return self._owed(self._places(other), self._places(tenant), self._weights[tenant], times)

    @staticmethod
    def _owed(most: float, places: float, weight: float, times: float) -> bool:
        """Whether it would have no more places than are left of the `most`, with one of them, or so many
        times as many: so two that have about as many never take places from each other back and forth. Who
        is far behind in service takes further ones for a burst, and nobody takes them back from it: that
        one would have to be behind."""
        return places + 1 / weight <= times * (most - 1 / weight)

    def _places(self, tenant: str) -> float:
        """In which it runs, for its weight."""
        return self._tenants.running(tenant) / self._weights[tenant]


class _Class:
    """Of one priority: how many wait, and since when none of it has started while somebody waited."""

    def __init__(self, now: float) -> None:
        self.waiting = 0
        self.since = now


def new_policy(name: Literal["fair", "fcfs"], max_num_batched_tokens: int) -> Policy:
    """By its name in the settings, for an engine with so many tokens in a step."""
    return (
        FairShare(credit=_CREDIT_STEPS * max_num_batched_tokens) if name == "fair" else FirstComeFirstServed()
    )
