"""Whose turn it is when more adapters are asked for than the arena can hold."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

from server.scheduling.adapter_gate import Acquire, AcquireStatus, AdapterGate
from server.scheduling.sequence import MixKey, Sequence
from server.scheduling.waiting_line import WaitingLine

_BASE_MODEL = Acquire(AcquireStatus.READY)


class AdapterTurns:
    """One plan's dealings with the gate.

    A sequence whose adapters are not here is passed over, not waited for, until one has been passed over
    for want of room for longer than patience allows. From then on no sequence that needs other adapters
    starts before that one does: the running ones drain, and room appears. Whoever waits with the same mix
    as one that starts may start along with it, so that a turn serves all who wait for it.
    """

    def __init__(self, gate: AdapterGate, line: WaitingLine, running: Collection[MixKey], now: float) -> None:
        self._gate = gate
        self._line = line
        self._running = running  # mixes with adapters that run
        self._now = now
        self._starving = line.starving(now)
        self._served: set[MixKey] = set()  # mixes of those that started in this plan
        self._passed_over: dict[MixKey, AcquireStatus | None] = {}  # None: not asked for, not its turn

    def take(self, seq: Sequence) -> Acquire | None:
        """Take references to the adapters of a waiting sequence if it may start now.

        READY: taken. FAILED: it has to end. None: passed over, and its state says so.
        """
        mix = seq.mix_key
        if not mix:
            return _BASE_MODEL
        status = self._passed_over.get(mix, AcquireStatus.READY)
        if status is AcquireStatus.READY:  # the first of its mix, or those before it could start
            status = None
            if not self._must_wait(seq):
                answer = self._gate.acquire(seq.adapters)
                status = answer.status
                self._line.grant(seq, status is AcquireStatus.PENDING)
                if status is AcquireStatus.READY:
                    self._line.adapters_ready(seq)
                if status in (AcquireStatus.READY, AcquireStatus.FAILED):
                    return answer
            self._passed_over[mix] = status
        self._line.pass_over(seq, status, self._now)
        if seq is self._starving:
            self._starving_passed_over(seq, status)
        return None

    def give_back(self, seq: Sequence) -> None:
        """It cannot start after all."""
        if seq.mix_key:
            self._gate.release(seq.adapters)

    def started(self, seq: Sequence) -> None:
        """It has left the line and runs."""
        self._served.add(seq.mix_key)
        if seq is self._starving:
            self._starving = self._line.starving(self._now)

    def _starving_passed_over(self, seq: Sequence, status: AcquireStatus | None) -> None:
        if status is AcquireStatus.PENDING:  # it has its room, so others need not wait for that
            self._starving = self._line.starving(self._now)
        elif status is AcquireStatus.FULL and not self._room_may_appear(seq.mix_key):
            self._line.restart_patience(self._now)

    def _must_wait(self, seq: Sequence) -> bool:
        if self._starving is None or seq.mix_key in self._served or seq in self._line.granted:
            return False
        return not _digests(seq.mix_key) <= _digests(self._starving.mix_key)

    def _room_may_appear(self, mix: MixKey) -> bool:
        """Whether sequences that run, or are about to, hold adapters that `mix` does not need itself."""
        wanted = _digests(mix)
        about_to_run = (seq.mix_key for seq in self._line.granted)
        return any(not _digests(other) <= wanted for other in chain(self._running, about_to_run))


def _digests(mix: MixKey) -> frozenset[str]:
    return frozenset(digest for digest, _ in mix)
