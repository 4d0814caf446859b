"""How many requests begin in one turn of the event loop: a thousand at once must not hold up the others."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

_BEGUN_AT_ONCE = 8  # a request's first step takes less than a millisecond


class Entrance:
    """Begins requests in the order in which they came, a few in each turn of the loop."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._left = _BEGUN_AT_ONCE  # in this turn
        self._armed = False

    def enter(self, begin: Callable[[], None], *, at_once: bool = False) -> None:
        """Call `begin` now, or in a later turn. `at_once`: of probes, which wait behind nobody."""
        if at_once or (self._left > 0 and not self._waiting):
            self._left -= 1
            begin()
        else:
            self._waiting.append(begin)
        if not self._armed:
            self._armed = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._left = _BEGUN_AT_ONCE
        while self._waiting and self._left > 0:
            self._left -= 1
            self._waiting.popleft()()
        self._armed = self._left < _BEGUN_AT_ONCE
        if self._armed:
            asyncio.get_running_loop().call_soon(self._next_turn)
