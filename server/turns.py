"""How much is done in one turn of the event loop: a thousand requests at once must not hold up the others."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

_AT_ONCE = 8  # a request's first step takes less than a millisecond


class Turns:
    """Begins what comes in its order, `at_once` of it in each turn of the loop."""

    def __init__(self, at_once: int = _AT_ONCE) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._at_once = at_once
        self._left = at_once  # in this turn
        self._armed = False

    def enter(self, begin: Callable[[], None], *, at_once: bool = False) -> None:
        """Call `begin` now, or in a later turn. `at_once`: of probes, which wait behind nobody while they are
        few."""
        if (at_once and self._left > -self._at_once) or (self._left > 0 and not self._waiting):
            self._left -= 1
            begin()
        else:
            self._waiting.append(begin)
        if not self._armed:
            self._armed = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    async def turn(self) -> None:
        """Waits for one's turn among those who go on in this way."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def go_on() -> None:
            if not turn.done():
                turn.set_result(None)

        self.enter(go_on)
        await turn

    def _next_turn(self) -> None:
        self._left = self._at_once
        while self._waiting and self._left > 0:
            self._left -= 1
            self._waiting.popleft()()
        self._armed = self._left < self._at_once
        if self._armed:
            asyncio.get_running_loop().call_soon(self._next_turn)
