"""Those who wait for the same adapters."""

from __future__ import annotations

from bisect import bisect_left, insort

from server.scheduling.adapter_gate import AcquireStatus
from server.scheduling.lanes import Lanes, TenantLane, place
from server.scheduling.policy import Policy, Rank
from server.scheduling.sequence import Sequence, State


class AdapterQueue:
    """Sequences that wait for the adapters `digests`, in lanes by class and tenant as the policy has them.

    What the gate says to one of them is true of all. To pass over a queue costs a look at those who have come
    since the last time, not at all of them.
    """

    def __init__(self, digests: frozenset[str], policy: Policy) -> None:
        self.digests = digests
        self._policy = policy
        self._length = 0
        self._classes: dict[int, Lanes] = {}  # none is empty
        self._new: dict[Sequence, None] = {}  # not passed over since they came, or since they were ready
        self._untimed: list[Sequence] = []  # whose patience does not run yet, by `place`
        self._timed: dict[Sequence, float] = {}  # the others -> since when it runs, earliest first
        self._lacks_room = False

    def __len__(self) -> int:
        return self._length

    @property
    def num_passed_over(self) -> int:
        return self._length - len(self._new)

    @property
    def room_wanted_since(self) -> tuple[float, tuple[bool, int]] | None:
        """Since when the first of those here has wanted arena room, seconds, and its place; None: they have
        it."""
        if not (self._timed and self._lacks_room):
            return None
        seq, since = next(iter(self._timed.items()))
        return since, place(seq)

    def add(self, seq: Sequence) -> None:
        level, tenant = self._policy.lane(seq)
        if level not in self._classes:
            self._classes[level] = Lanes(lambda tenant: self._policy.rank(tenant, self.digests))
        self._classes[level].add(seq, tenant)
        self._length += 1
        insort(self._untimed, seq, key=place)
        self.ready(seq)

    def remove(self, seq: Sequence) -> None:
        """The caller sets its new state."""
        level, tenant = self._policy.lane(seq)
        self._classes[level].remove(seq, tenant)
        if not self._classes[level]:
            del self._classes[level]
        self._length -= 1
        if self._timed.pop(seq, None) is None:
            self._take_untimed(seq)
        self._new.pop(seq, None)

    def next(self, now: float) -> tuple[Rank, TenantLane] | None:
        """The lane whose next is to be tried before all others here, and how it ranks; None: all were."""
        ranked = [
            ((*self._policy.class_rank(level, now), *found[0]), found[1])
            for level, lanes in self._classes.items()
            if (found := lanes.next()) is not None
        ]
        return min(ranked, default=None, key=lambda found: found[0])

    def pass_by(self, seq: Sequence, lane: TenantLane) -> None:
        """This plan has tried it, the lane's next, and leaves it here if it still is."""
        level, _ = self._policy.lane(seq)
        if lane.next is seq:
            self._classes[level].pass_by(lane)

    def rewind(self) -> None:
        """Another plan begins."""
        for lanes in self._classes.values():
            lanes.rewind()

    def ready(self, seq: Sequence) -> None:
        """If it still waits, it is not for its adapters."""
        self._new[seq] = None
        seq.state = State.WAITING

    def pass_over(self, status: AcquireStatus | None) -> None:
        """All of them: see `WaitingLine.pass_over`."""
        for seq in self._new:
            seq.state = State.WAITING_FOR_ADAPTER
        self._new.clear()
        if status is not None:
            self._lacks_room = status is AcquireStatus.FULL

    def start_patience(self, now: float, before: Sequence | None, tried: Sequence | None) -> None:
        """That of those before that one, or of all: see `WaitingLine.start_patience`."""
        end = len(self._untimed) if before is None else bisect_left(self._untimed, place(before), key=place)
        self._timed |= dict.fromkeys(self._untimed[:end], now)
        del self._untimed[:end]
        if tried is not None and tried not in self._timed:
            self._take_untimed(tried)
            self._timed[tried] = now

    def _take_untimed(self, seq: Sequence) -> None:
        del self._untimed[bisect_left(self._untimed, place(seq), key=place)]
