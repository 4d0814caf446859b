"""One request on its connection: what its app receives and sends, and how long that waits for the client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from starlette.types import Message
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from server.errors import TooSlow


class AnswerFlow(FlowControl):
    """Whether an answer waits for its client, since when, and how much of it."""

    def __init__(self, transport: asyncio.Transport, clock: Callable[[], float]) -> None:
        super().__init__(transport)
        self._clock = clock
        self.last_words = False  # what is written now does not wait
        self.paused_at = 0.0
        self.most_unread = 0  # bytes, since then

    async def drain(self) -> None:
        if not self.last_words:
            await super().drain()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.paused_at = self._clock()
        self.most_unread = 0

    def overdue(self, now: float, patience_s: float, rate: int) -> bool:
        """Whether the client has read too little since the answer began to wait for it."""
        if not self.write_paused:
            return False
        unread = self._transport.get_write_buffer_size()
        self.most_unread = max(self.most_unread, unread)
        return now - self.paused_at > patience_s + (self.most_unread - unread) / rate


class Exchange:
    """`receive` and `send` of one request: a body that is late is told of, the last words do not wait."""

    def __init__(self, flow: AnswerFlow, cycle: RequestResponseCycle) -> None:
        self.cycle = cycle
        self.close_after_body = False  # the connection, once the request's last byte is here
        self._flow = flow
        self._late: TooSlow | None = None

    async def receive(self) -> Message:
        """Raises TooSlow after the end of the body's time."""
        message = await self.cycle.receive()
        if self._late is not None:
            raise self._late
        return cast(Message, message)

    async def send(self, message: Message) -> None:
        if message["type"] != "http.response.body" or message.get("more_body", False):
            await self.cycle.send(cast(Any, message))
            return
        if self.cycle.more_body and not self.cycle.keep_alive:  # to close now might lose a sender the answer
            self.cycle.keep_alive = self.close_after_body = True
        self._flow.last_words = True
        try:
            await self.cycle.send(cast(Any, message))
        finally:
            self._flow.last_words = False

    def give_up(self, error: TooSlow) -> None:
        """Have the app answer with `error`, and the connection closed then."""
        self._late = error
        self.cycle.keep_alive = False
        self.cycle.message_event.set()

    def hang_up(self) -> None:
        """Have the app know that its client is gone."""
        if not self.cycle.response_complete:
            self.cycle.disconnected = True
        self.cycle.message_event.set()

    @property
    def given_up(self) -> bool:
        return self._late is not None
