"""Those of one class and tenant who wait for the same adapters, and which of several such lanes is next."""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left
from collections.abc import Callable

from server.scheduling.policy import Rank
from server.scheduling.sequence import Sequence


def place(seq: Sequence) -> tuple[bool, int]:
    """Sorts those of a lane: preempted ones first, then by age."""
    return not seq.num_preemptions, seq.order


class TenantLane:
    """Waiting sequences in the order to try. `at`: how many of them this plan has tried and left here."""

    __slots__ = ("at", "entry", "sequences", "tenant")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.sequences: list[Sequence] = []
        self.at = 0
        self.entry: tuple[Rank, int, TenantLane] | None = None  # its valid one in `Lanes`

    @property
    def next(self) -> Sequence | None:
        return self.sequences[self.at] if self.at < len(self.sequences) else None

    def add(self, seq: Sequence) -> None:
        at = bisect_left(self.sequences, place(seq), key=place)
        self.sequences.insert(at, seq)
        self.at += at < self.at  # the plan has gone past that place

    def remove(self, seq: Sequence) -> None:
        at = bisect_left(self.sequences, place(seq), key=place)
        del self.sequences[at]
        self.at -= at < self.at


class Lanes:
    """Lanes of one class, the next one to try at hand.

    Ranks only grow while somebody waits, so a heap of what they were is right once its first entry is up to
    date: a change costs nothing until the lane comes to the front.
    """

    def __init__(self, rank: Callable[[str], Rank]) -> None:
        self._rank = rank
        self._lanes: dict[str, TenantLane] = {}
        self._heap: list[tuple[Rank, int, TenantLane]] = []
        self._serial = itertools.count()
        self._tried: list[TenantLane] = []  # with sequences that this plan has gone past

    def __bool__(self) -> bool:
        return bool(self._lanes)

    def add(self, seq: Sequence, tenant: str) -> None:
        lane = self._lanes.setdefault(tenant, TenantLane(tenant))
        lane.add(seq)
        self._enter(lane)

    def remove(self, seq: Sequence, tenant: str) -> None:
        lane = self._lanes[tenant]
        lane.remove(seq)
        if not lane.sequences:
            del self._lanes[tenant]
            lane.entry = None

    def next(self) -> tuple[Rank, TenantLane] | None:
        """The lane to try and the rank of its next sequence; None when this plan has gone past all."""
        heap = self._heap
        while heap:
            entry = heap[0]
            rank, _, lane = entry
            now = self._rank_of(lane) if lane.entry is entry else None
            if now is None:
                heapq.heappop(heap)
                lane.entry = None if lane.entry is entry else lane.entry
            elif now == rank:
                return rank, lane
            else:
                lane.entry = now, next(self._serial), lane
                heapq.heapreplace(heap, lane.entry)
        return None

    def pass_by(self, lane: TenantLane) -> None:
        """This plan leaves the lane's next where it is, and goes on behind it."""
        self._tried.append(lane)
        lane.at += 1

    def rewind(self) -> None:
        """Another plan begins."""
        for lane in self._tried:
            lane.at = 0
            self._enter(lane)
        self._tried.clear()

    def _rank_of(self, lane: TenantLane) -> Rank | None:
        seq = lane.next
        return None if seq is None else (*self._rank(lane.tenant), *place(seq))

    def _enter(self, lane: TenantLane) -> None:
        """Its next may be an earlier one than before."""
        rank = self._rank_of(lane)
        if rank is not None and (lane.entry is None or rank < lane.entry[0]):
            lane.entry = rank, next(self._serial), lane
            heapq.heappush(self._heap, lane.entry)
