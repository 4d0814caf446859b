"""Which sequences have run out of time."""

from __future__ import annotations

import heapq
from collections.abc import Container

from server.scheduling.sequence import Sequence

_SPARE = 64


class Deadlines:
    """Of the sequences in `live`, by request id, that have one. The next to pass is at hand; one that ends
    earlier is passed over when its turn comes, or thrown out with others."""

    def __init__(self, live: Container[str]) -> None:
        self._live = live
        self._heap: list[tuple[float, int, str]] = []  # with the sequence's order
        self._swept_to = 0

    def add(self, seq: Sequence) -> None:
        if seq.deadline is None:
            return
        heapq.heappush(self._heap, (seq.deadline, seq.order, seq.request_id))
        if len(self._heap) > 2 * self._swept_to + _SPARE:
            self._heap = [entry for entry in self._heap if entry[2] in self._live]
            heapq.heapify(self._heap)
            self._swept_to = len(self._heap)

    @property
    def next(self) -> float | None:
        """The earliest one, seconds of the scheduler's clock."""
        while self._heap and self._heap[0][2] not in self._live:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def passed(self, now: float) -> list[str]:
        """Request ids whose deadline has passed; each is given once."""
        passed = []
        while (deadline := self.next) is not None and deadline <= now:
            passed.append(heapq.heappop(self._heap)[2])
        return passed
