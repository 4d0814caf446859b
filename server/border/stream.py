"""The outputs of one request between the process border and the task that reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial

from server.errors import ChorusError
from server.messages import TokenOutput
from server.turns import Turns


class OutputStream:
    """Outputs of a request and its forks, read by one task of the event loop.

    It is woken in its turn, once for all that has come by then: a loop that is behind has fewer wakes.
    """

    __slots__ = ("_error", "_outputs", "_turns", "_waiter", "running")

    def __init__(self, request_ids: Iterable[str], turns: Turns) -> None:
        self._turns = turns
        self._outputs: list[TokenOutput] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: ChorusError | None = None
        self.running = set(request_ids)  # of its choices, that the engine still works on

    def push(self, output: TokenOutput) -> None:
        self._outputs.append(output)
        if output.finish_reason is not None:
            self.running.discard(output.request_id)
        self._wake()

    def give_up(self, request_id: str) -> None:
        self.running.discard(request_id)
        self._wake()

    def fail(self, error: ChorusError) -> None:
        """What came before is still read; then `error` is raised. No effect on a finished stream."""
        if self.running:
            self.running.clear()
            self._error = error
            self._wake()

    async def take(self) -> list[TokenOutput]:
        """At least one output, none at the end. Raises what `fail` was given."""
        while not self._outputs:
            if self._error is not None:
                raise self._error
            if not self.running:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        outputs, self._outputs = self._outputs, []
        return outputs

    def _wake(self) -> None:
        if self._waiter is not None:
            self._turns.enter(partial(_end, self._waiter))
            self._waiter = None


def _end(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():  # cancelled meanwhile
        waiter.set_result(None)
