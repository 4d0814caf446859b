"""Whose turn it is when more adapters are wanted than the arena can hold."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

from server.scheduling.adapter_gate import Acquire, AcquireStatus, AdapterGate
from server.scheduling.sequence import Sequence
from server.scheduling.waiting_line import WaitingLine

_BASE_MODEL = Acquire(AcquireStatus.READY)


class AdapterTurns:
    """One plan's dealings with the gate.

    A sequence whose adapters are not here is passed over, not waited for, until one has been passed over
    for want of room for longer than patience allows. From then on no sequence that needs other adapters
    starts before that one does: the running ones drain, and room appears. Whoever waits for the same adapters
    as one that starts may start along with it, so that a turn serves all who wait for it.

    `running`: those that run, by mix.
    """

    def __init__(
        self, gate: AdapterGate, line: WaitingLine, running: Collection[list[Sequence]], now: float
    ) -> None:
        self.passed_over: dict[frozenset[str], AcquireStatus | None] = {}  # by digests; None: not their turn
        self._tried: dict[frozenset[str], Sequence] = {}  # for whom the gate had no room
        self._gate = gate
        self._line = line
        self._running = running
        self._now = now
        self._starving = line.starving(now)
        self._served: set[frozenset[str]] = set()  # digests of those who started in this plan

    def take(self, seq: Sequence) -> Acquire | None:
        """Take references to the adapters of a waiting sequence if it may start now.

        READY: taken. FAILED: it has to end. None: it is passed over, and with it all who wait for the same.
        """
        if not seq.digests:
            return _BASE_MODEL
        answer = None if self._must_wait(seq.digests) else self._gate.acquire(seq.adapters)
        if answer is not None and answer.status in (AcquireStatus.READY, AcquireStatus.FAILED):
            return answer
        self._tried[seq.digests] = seq
        self._pass_over(seq.digests, answer.status if answer else None)
        return None

    def give_back(self, seq: Sequence) -> None:
        """It cannot start after all."""
        self._line.ready(seq)
        if seq.digests:
            self._gate.release(seq.adapters)

    def started(self, seq: Sequence) -> None:
        """It has left the line and runs."""
        self._served.add(seq.digests)
        if seq.digests == self._starving:
            self._starving = self._line.starving(self._now)

    def end(self, first_not_tried: Sequence | None) -> None:
        """Those behind it were not passed over for want of room alone, so their patience does not run yet."""
        for digests, status in self.passed_over.items():
            if status is AcquireStatus.FULL:
                self._line.start_patience(digests, self._now, first_not_tried, self._tried[digests])

    def _must_wait(self, digests: frozenset[str]) -> bool:
        if self._starving is None or digests in self._served or digests in self._gate.promises:
            return False
        return not digests <= self._starving

    def _pass_over(self, digests: frozenset[str], status: AcquireStatus | None) -> None:
        self.passed_over[digests] = status
        self._line.pass_over(digests, status)
        if digests != self._starving:
            return
        if status is AcquireStatus.PENDING:  # it has its room, so others need not wait for that
            self._starving = self._line.starving(self._now)
        elif not self._room_may_appear(digests):
            self._line.restart_patience(self._now)

    def _room_may_appear(self, wanted: frozenset[str]) -> bool:
        """Whether sequences that run, or are about to, hold adapters that are not wanted themselves."""
        in_use = chain((group[0].digests for group in self._running), self._gate.promises)
        return any(not digests <= wanted for digests in in_use)
