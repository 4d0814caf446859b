"""The sequences that do not run: who waits for which adapters, in which order, and for how long."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator

from server.scheduling.adapter_gate import AcquireStatus
from server.scheduling.adapter_queue import AdapterQueue, place
from server.scheduling.policy import Policy
from server.scheduling.sequence import Sequence


class WaitingLine:
    """A queue for each set of adapters that is waited for, and one for the base model.

    Nothing here but `add` and `remove` of one sequence costs more for a long queue than for a short one.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._patience_from = float("-inf")  # it runs for nobody from earlier on
        self._queues: dict[frozenset[str], AdapterQueue] = {}  # by digests; none is empty
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def for_adapter(self) -> int:
        """How many were passed over because of their adapters."""
        return sum(queue.num_passed_over for queue in self._queues.values())

    @property
    def digests(self) -> tuple[str, ...]:
        """The adapters waited for, each once."""
        return tuple(frozenset().union(*self._queues))

    def waits_for(self, digests: frozenset[str]) -> bool:
        """Whether somebody here needs these adapters and no others."""
        return digests in self._queues

    def add(self, seq: Sequence) -> None:
        """An arrival, or one that was preempted."""
        if seq.digests not in self._queues:
            self._queues[seq.digests] = AdapterQueue(seq.digests)
        self._queues[seq.digests].add(seq)
        self._length += 1

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that is admitted or ends; the caller sets its new state."""
        queue = self._queues[seq.digests]
        queue.remove(seq)
        if not queue:
            del self._queues[seq.digests]
        self._length -= 1

    def in_order(
        self, policy: Policy, now: float, passed_over: Container[frozenset[str]]
    ) -> Iterator[Sequence]:
        """Everyone here in the order to try, but nobody more of a queue whose digests get into `passed_over`.
        The caller may take out the sequence that it was given last."""

        def turn(queue: AdapterQueue, at: int) -> tuple[bool, float, int, int, AdapterQueue]:
            arrived, order = place(queue[at])
            return arrived, policy.rank(queue[at], now) if arrived else 0.0, order, at, queue

        turns = [turn(queue, 0) for queue in self._queues.values()]
        heapq.heapify(turns)
        while turns:
            *_, at, queue = turns[0]
            seq = queue[at]
            yield seq
            if at < len(queue) and queue[at] is seq:
                at += 1
            if at == len(queue) or queue.digests in passed_over:
                heapq.heappop(turns)
            else:
                heapq.heapreplace(turns, turn(queue, at))

    def pass_over(self, digests: frozenset[str], status: AcquireStatus | None) -> None:
        """These adapters are not here, for all who wait for them. FULL: nor is there room; PENDING: they have
        their room; None: the gate was not asked."""
        self._queues[digests].pass_over(status)

    def start_patience(self, digests: frozenset[str], now: float, before: Sequence | None) -> None:
        """It runs from now on, if it did not yet, for those who wait for these adapters and come `before` a
        sequence; None: for all of them."""
        self._queues[digests].start_patience(now, before)

    def ready(self, seq: Sequence) -> None:
        """If it still waits, it is not for its adapters."""
        self._queues[seq.digests].ready(seq)

    def starving(self, now: float) -> frozenset[str] | None:
        """The adapters that have wanted room for longest, if for longer than patience allows."""
        wanting = [
            (max(since, self._patience_from), since, place(queue[0]), digests)
            for digests, queue in self._queues.items()
            if (since := queue.room_wanted_since) is not None
        ]
        if not wanting:
            return None
        since, *_, digests = min(wanting)
        return digests if now - since > self._patience_s else None

    def restart_patience(self, now: float) -> None:
        """Holding others back did not make room, so let everyone try again for a while."""
        self._patience_from = now
