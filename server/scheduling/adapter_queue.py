"""Those who wait for the same adapters."""

from __future__ import annotations

from bisect import bisect_left, insort

from server.scheduling.adapter_gate import AcquireStatus
from server.scheduling.sequence import Sequence, State


class AdapterQueue:
    """Sequences that wait for the adapters `digests`, in the order to try: preempted ones first, then by age.

    What the gate says to one of them is true of all. To pass over a queue costs a look at those who have come
    since the last time, not at all of them.
    """

    def __init__(self, digests: frozenset[str]) -> None:
        self.digests = digests
        self._sequences: list[Sequence] = []
        self._new: dict[Sequence, None] = {}  # not passed over since they came, or since they were ready
        self._untimed: list[Sequence] = []  # whose patience does not run yet, in the same order
        self._timed: dict[Sequence, float] = {}  # the others -> since when it runs, earliest first
        self._lacks_room = False

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, at: int) -> Sequence:
        return self._sequences[at]

    @property
    def num_passed_over(self) -> int:
        return len(self._sequences) - len(self._new)

    @property
    def room_wanted_since(self) -> float | None:
        """Since when the first of those here has wanted arena room, seconds; None: they have it."""
        return next(iter(self._timed.values()), None) if self._lacks_room else None

    def add(self, seq: Sequence) -> None:
        insort(self._sequences, seq, key=place)
        insort(self._untimed, seq, key=place)
        self.ready(seq)

    def remove(self, seq: Sequence) -> None:
        """The caller sets its new state."""
        del self._sequences[bisect_left(self._sequences, place(seq), key=place)]
        if self._timed.pop(seq, None) is None:
            del self._untimed[bisect_left(self._untimed, place(seq), key=place)]
        self._new.pop(seq, None)

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

    def start_patience(self, now: float, before: Sequence | None) -> None:
        """That of those before that one, or of all: see `WaitingLine.start_patience`."""
        end = len(self._untimed) if before is None else bisect_left(self._untimed, place(before), key=place)
        self._timed |= dict.fromkeys(self._untimed[:end], now)
        del self._untimed[:end]


def place(seq: Sequence) -> tuple[bool, int]:
    """Sorts those who wait for the same adapters."""
    return not seq.num_preemptions, seq.order
