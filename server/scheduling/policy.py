"""The order in which waiting sequences are admitted."""

from __future__ import annotations

from typing import Protocol

from server.scheduling.sequence import Sequence


class Policy(Protocol):
    """Ranks the oldest of those who wait for the same adapters: the smallest rank is tried first.

    It is asked only when there is room for one more. Preempted sequences are not shown to it: they go
    before all others, oldest first, whatever the policy, because that is what rules out a livelock.
    """

    def rank(self, seq: Sequence, now: float) -> float:
        """The same arguments give the same rank; of equal ones the older sequence goes first. `now` is in
        seconds of the clock that `Sequence.arrival` is in."""
        ...


class FirstComeFirstServed:
    """In order of arrival."""

    def rank(self, seq: Sequence, now: float) -> float:
        return seq.order
