"""The sequences that do not run: in which order they are tried, who has wanted arena room for too long."""

from __future__ import annotations

import bisect
from collections.abc import Collection

from server.scheduling.adapter_gate import AcquireStatus
from server.scheduling.policy import Policy
from server.scheduling.sequence import Sequence, State


class WaitingLine:
    """Arrivals in order, preempted sequences ahead of them. `starving` and `in_order` look at all of them."""

    def __init__(self, patience_s: float) -> None:
        self.for_adapter = 0  # how many of them were passed over because of their adapters
        self._patience_s = patience_s
        self._arrived: dict[Sequence, None] = {}
        self._preempted: list[Sequence] = []  # oldest first
        self._wants_room: dict[Sequence, float] = {}  # answered FULL -> its room_wanted_since
        self._granted: dict[Sequence, None] = {}  # last answered PENDING, so there is room kept for them
        self._asked_for: dict[str, int] = {}  # digest -> sequences here that need it

    def __len__(self) -> int:
        return len(self._arrived) + len(self._preempted)

    @property
    def digests(self) -> tuple[str, ...]:
        """The adapters asked for here, each once."""
        return tuple(self._asked_for)

    def in_order(self, policy: Policy, running: Collection[Sequence], now: float) -> list[Sequence]:
        """Everyone here, in the order to try."""
        return [*self._preempted, *policy.order(self._arrived.keys(), running, now)]

    def add(self, seq: Sequence) -> None:
        self._arrived[seq] = None
        self._enter(seq)

    def add_preempted(self, seq: Sequence) -> None:
        bisect.insort(self._preempted, seq, key=lambda other: other.order)
        self._enter(seq)

    def _enter(self, seq: Sequence) -> None:
        seq.state = State.WAITING
        for digest, _ in seq.mix_key:
            self._asked_for[digest] = self._asked_for.get(digest, 0) + 1

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that is admitted or ends; the caller sets its new state."""
        if seq in self._arrived:
            del self._arrived[seq]
        else:
            self._preempted.remove(seq)
        self.adapters_ready(seq)
        self.grant(seq, False)
        self._wants_room.pop(seq, None)
        seq.room_wanted_since = None
        for digest, _ in seq.mix_key:
            self._asked_for[digest] -= 1
            if not self._asked_for[digest]:
                del self._asked_for[digest]

    def pass_over(self, seq: Sequence, status: AcquireStatus | None, now: float) -> None:
        """Its adapters are not here. FULL: nor is there room for them, so its patience runs from the first
        such answer on; PENDING: it has its room; None: the gate was not asked."""
        if seq.state is not State.WAITING_FOR_ADAPTER:
            seq.state = State.WAITING_FOR_ADAPTER
            self.for_adapter += 1
        if status is AcquireStatus.FULL:
            if seq.room_wanted_since is None:
                seq.room_wanted_since = now
            self._wants_room.setdefault(seq, seq.room_wanted_since)
        elif status is AcquireStatus.PENDING:
            self._wants_room.pop(seq, None)

    def grant(self, seq: Sequence, granted: bool) -> None:
        """Whether the gate, asked for this very sequence, keeps room for it."""
        if granted:
            self._granted[seq] = None
        else:
            self._granted.pop(seq, None)

    @property
    def granted(self) -> Collection[Sequence]:
        return self._granted.keys()

    def adapters_ready(self, seq: Sequence) -> None:
        """If it still waits, it is not for its adapters."""
        if seq.state is State.WAITING_FOR_ADAPTER:
            seq.state = State.WAITING
            self.for_adapter -= 1

    def starving(self, now: float) -> Sequence | None:
        """The one without arena room that has wanted it for longest, if for longer than patience allows."""
        seq = min(self._wants_room, key=self._wants_room.__getitem__, default=None)
        return seq if seq is not None and now - self._wants_room[seq] > self._patience_s else None

    def restart_patience(self, now: float) -> None:
        """Holding others back did not make room, so let everyone try again for a while."""
        for seq in self._wants_room:
            self._wants_room[seq] = seq.room_wanted_since = now
