"""How much service each of several has had, so that the one with the least is next."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
_SPARE = 64


class ServiceCounters(Generic[Key]):
    """The virtual token counters of Sheng et al. 2024, "Fairness in Serving Large Language Models" (VTC).

    Who comes back after a pause is lifted to what the last one to be served had when it was chosen, less
    `credit`: that much service, and no more, is saved up in time in which nothing was asked for, so that who
    stays below its share may do so in bursts. Whoever has nobody here and would be lifted anyway is
    forgotten, so the books do not grow with all who ever came.
    """

    def __init__(self, credit: float = 0.0) -> None:
        self._credit = credit
        self._served: dict[Key, float] = {}
        self._waiting = Counter[Key]()
        self._running = Counter[Key]()
        self._level = 0.0  # what the last one had when it was chosen; it never falls
        self._idle: list[tuple[float, int, Key]] = []  # a heap of those who have nobody here
        self._idle_at: dict[Key, int] = {}  # the serial number of each one's valid entry
        self._serial = 0

    def __getitem__(self, key: Key) -> float:
        return self._served.get(key, self._floor)

    @property
    def _floor(self) -> float:
        return self._level - self._credit

    def __len__(self) -> int:
        """How many are remembered."""
        return len(self._served)

    def behind(self, key: Key) -> float:
        """How much less it had than the last one when that was chosen."""
        return self._level - self[key]

    def running(self, key: Key) -> int:
        return self._running[key]

    @property
    def are_running(self) -> Counter[Key]:
        """How many run, of each that has any."""
        return self._running

    @property
    def are_waiting(self) -> Counter[Key]:
        return self._waiting

    def waits(self, key: Key) -> None:
        """One more of it waits."""
        if not self._waiting[key]:
            self._served[key] = max(self[key], self._floor)
            self._idle_at.pop(key, None)
        self._waiting[key] += 1

    def starts(self, key: Key) -> None:
        """One of those that wait was chosen, and runs."""
        self._level = max(self._level, self[key])
        self._running[key] += 1
        self._one_less(self._waiting, key)
        while self._idle and self._idle[0][0] <= self._floor:
            _, serial, idle = heapq.heappop(self._idle)
            if self._idle_at.get(idle) == serial:
                del self._idle_at[idle], self._served[idle]

    def gives_up(self, key: Key) -> None:
        """One of those that wait does so no longer."""
        self._one_less(self._waiting, key)

    def stops(self, key: Key) -> None:
        """One of those that run does so no longer."""
        self._one_less(self._running, key)

    def charge(self, key: Key, amount: float) -> None:
        """It was served that much; only for one that is here."""
        self._served[key] += amount

    def _one_less(self, counts: Counter[Key], key: Key) -> None:
        counts[key] -= 1
        if not counts[key]:
            del counts[key]
        if key not in self._waiting and key not in self._running:
            self._leaves(key)

    def _leaves(self, key: Key) -> None:
        served = self._served[key]
        if served <= self._floor:
            del self._served[key]
        else:
            self._serial += 1
            self._idle_at[key] = self._serial
            heapq.heappush(self._idle, (served, self._serial, key))
        if len(self._idle) > 2 * len(self._idle_at) + _SPARE:  # many came back and went again
            self._idle = [entry for entry in self._idle if self._idle_at.get(entry[2]) == entry[1]]
            heapq.heapify(self._idle)
