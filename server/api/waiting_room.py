"""How many sequences were sent to the engine and have no token yet: bounded, so that memory and waits are."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.errors import QueueFull, QueueShareFull

_TENANT_SHARE = 4  # a tenant may have waiting so many times what is still free, so some always is
_MEASURED_STARTS = 64
_LONGEST_WAIT_S = 60
_UNMEASURED_PER_S = 64  # starts a second, as long as there were none to measure


class Ticket:
    """Of one request: how many of its sequences still wait for their first token."""

    def __init__(self, room: WaitingRoom, tenant: str, sequences: int) -> None:
        self.waiting = sequences
        self._room = room
        self._tenant = tenant

    def started(self) -> None:
        """One of them has its first token."""
        if self.waiting:
            self._room.count_start()
            self.leave(1)

    def leave(self, sequences: int) -> None:
        """So many of them wait no longer, however that came."""
        self.waiting -= sequences
        self._room.give_back(self._tenant, sequences)


class WaitingRoom:
    """Places for `limit` sequences. What does not fit is refused at once, at no cost to the engine.

    With nobody waiting any request is let in, so that none is too large for ever. A named tenant may have at
    most four times as many waiting as there are places left: alone it fills four fifths of them, and each
    further tenant finds some. `limit` may change: who waits by then goes on. `clock`: seconds.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._waiting = 0
        self._by_tenant = Counter[str]()
        self._between: deque[float] = deque(maxlen=_MEASURED_STARTS)  # starts, while somebody waits: seconds
        self._since = 0.0  # the last start, or since when somebody waits

    @property
    def waiting(self) -> int:
        return self._waiting

    def check(self, tenant: str, sequences: int = 1) -> None:
        """Raises QueueFull, or QueueShareFull where others would still be let in."""
        if not self._waiting:
            return
        free = self.limit - self._waiting - sequences
        if free < 0:
            raise QueueFull(
                f"As many sequences wait for their first token as this server lets: {self.limit}.",
                retry_after_s=self.retry_after_s,
            )
        if tenant and self._by_tenant[tenant] + sequences > _TENANT_SHARE * free:
            raise QueueShareFull(
                f"{self._by_tenant[tenant]} sequences of yours wait for their first token; the places left "
                "are for others.",
                retry_after_s=self.retry_after_s,
            )

    @contextmanager
    def enter(self, tenant: str, sequences: int) -> Iterator[Ticket]:
        """Places until each has its first token, or the request ends. Raises as `check`."""
        self.check(tenant, sequences)
        if not self._waiting:
            self._since = self._clock()
        self._waiting += sequences
        self._by_tenant[tenant] += sequences
        ticket = Ticket(self, tenant, sequences)
        try:
            yield ticket
        finally:
            ticket.leave(ticket.waiting)

    @property
    def retry_after_s(self) -> int:
        """How long those who wait now will take to start, by the rate of the last starts; 1 to 60 s."""
        if not self._between:
            return 1 + self._waiting // _UNMEASURED_PER_S
        each = (sum(self._between) + self._clock() - self._since) / len(self._between)
        return min(max(1, math.ceil(self._waiting * each)), _LONGEST_WAIT_S)

    def count_start(self) -> None:
        now = self._clock()
        self._between.append(now - self._since)
        self._since = now

    def give_back(self, tenant: str, sequences: int) -> None:
        self._waiting -= sequences
        self._by_tenant[tenant] -= sequences
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]
