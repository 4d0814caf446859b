"""A token bucket that may be overdrawn: what a request costs is known in full only when it has ended."""

from __future__ import annotations


class TokenBucket:
    """Fills by `rate` a second up to one second's worth, at least 1. Times are monotonic seconds.

    A level of 0 or less lets nothing in; what was let in takes its whole cost. So over any time T no more
    than `rate * T`, one bucket and what runs at its end is given out.
    """

    def __init__(self, rate: float, now: float) -> None:
        self.rate = rate
        self.capacity = max(rate, 1.0)
        self._level = self.capacity
        self._at = now

    def level(self, now: float) -> float:
        return min(self.capacity, self._level + max(0.0, now - self._at) * self.rate)

    def take(self, cost: float, now: float) -> None:
        """Below zero if need be."""
        self._level = self.level(now) - cost
        self._at = max(now, self._at)

    def wait_s(self, wanted: float, now: float) -> float:
        """How long until the level is `wanted`; 0 where it is."""
        return max(0.0, min(wanted, self.capacity) - self.level(now)) / self.rate
