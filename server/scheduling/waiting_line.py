"""The sequences that do not run: who waits for which adapters, in which order, and for how long."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator

from server.scheduling.adapter_gate import AcquireStatus
from server.scheduling.adapter_queue import AdapterQueue
from server.scheduling.policy import Policy
from server.scheduling.sequence import Sequence


class WaitingLine:
    """A queue for each set of adapters that is waited for, and one for the base model.

    Nothing here but `add` and `remove` of one sequence costs more for a long queue than for a short one.
    """

    def __init__(self, patience_s: float, policy: Policy) -> None:
        self._patience_s = patience_s
        self._policy = policy
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
            self._queues[seq.digests] = AdapterQueue(seq.digests, self._policy)
        self._queues[seq.digests].add(seq)
        self._length += 1

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that is admitted or ends; the caller sets its new state."""
        queue = self._queues[seq.digests]
        queue.remove(seq)
        if not queue:
            del self._queues[seq.digests]
        self._length -= 1

    def in_order(self, now: float, passed_over: Container[frozenset[str]]) -> Iterator[Sequence]:
        """Everyone here in the order to try, but nobody more of a queue whose digests get into `passed_over`.
        The caller may take out the sequence that it was given last, and put others in."""
        turns = []
        for at, queue in enumerate(self._queues.values()):
            queue.rewind()
            if found := queue.next(now):
                turns.append((found[0], at, queue))
        heapq.heapify(turns)
        while turns:
            rank, at, queue = turns[0]
            found = None if queue.digests in passed_over else queue.next(now)
            if found is None:
                heapq.heappop(turns)
            elif found[0] != rank:  # those before it have gone, or were served meanwhile
                heapq.heapreplace(turns, (found[0], at, queue))
            elif (seq := found[1].next) is not None:
                yield seq
                queue.pass_by(seq, found[1])

    def pass_over(self, digests: frozenset[str], status: AcquireStatus | None) -> None:
        """These adapters are not here, for all who wait for them. FULL: nor is there room; PENDING: they have
        their room; None: the gate was not asked."""
        self._queues[digests].pass_over(status)

    def start_patience(
        self, digests: frozenset[str], now: float, before: Sequence | None, tried: Sequence | None = None
    ) -> None:
        """It runs from now on, if it did not yet, for those who wait for these adapters and are older than
        `before` (None: for all of them), and for the one that was `tried`."""
        self._queues[digests].start_patience(now, before, tried)

    def ready(self, seq: Sequence) -> None:
        """If it still waits, it is not for its adapters."""
        self._queues[seq.digests].ready(seq)

    def starving(self, now: float) -> frozenset[str] | None:
        """The adapters that have wanted room for longest, if for longer than patience allows."""
        wanting = [
            (max(wanted[0], self._patience_from), *wanted, digests)
            for digests, queue in self._queues.items()
            if (wanted := queue.room_wanted_since) is not None
        ]
        if not wanting:
            return None
        since, *_, digests = min(wanting)
        return digests if now - since > self._patience_s else None

    def restart_patience(self, now: float) -> None:
        """Holding others back did not make room, so let everyone try again for a while."""
        self._patience_from = now
