"""The order in which waiting sequences are admitted."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

from server.scheduling.sequence import Sequence


class Policy(Protocol):
    """A pure function of who waits, who runs and the time: the same arguments give the same order.

    It is asked only when there is room for one more. Preempted sequences are not shown to it: they go
    before all others, oldest first, whatever the policy, because that is what rules out a livelock.
    """

    def order(
        self, waiting: Collection[Sequence], running: Collection[Sequence], now: float
    ) -> Iterable[Sequence]:
        """`waiting`, all of it, in the order to try. It comes in order of arrival, `running` in order of
        admission; `now` is in seconds of the clock that `Sequence.arrival` is in."""
        ...


class FirstComeFirstServed:
    """In order of arrival."""

    def order(
        self, waiting: Collection[Sequence], running: Collection[Sequence], now: float
    ) -> Iterable[Sequence]:
        return waiting
