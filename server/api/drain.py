"""Ending without cutting anyone off: new requests are refused, running ones get their time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ChorusError, Unavailable

_LAST_WORDS_S = 2.0  # for the error events of what was cut
_READING = {"GET", "HEAD", "OPTIONS"}  # methods that change nothing


class Drain:
    """Who is being served, and whether the server is on its way out."""

    def __init__(self) -> None:
        self.draining = False
        self._running: set[Callable[[ChorusError], None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def check(self) -> None:
        """Raises Unavailable when the server is on its way out."""
        if self.draining:
            raise Unavailable("The server is shutting down.", code="shutting_down")

    @contextmanager
    def serving(self, cut: Callable[[ChorusError], None]) -> Iterator[None]:
        """Around one request. `cut` ends it with an error when its time is over."""
        self.check()
        self._running.add(cut)
        self._idle.clear()
        try:
            yield
        finally:
            self._running.discard(cut)
            if not self._running:
                self._idle.set()

    async def finish(self, grace_s: float) -> None:
        """Refuse new requests, wait up to `grace_s` seconds for the running ones, then end them."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
        except TimeoutError:
            await self.cut_all()

    async def cut_all(self) -> None:
        """End what still runs, each with an error that its client sees."""
        self.draining = True
        for cut in list(self._running):
            cut(Unavailable("The server is shutting down.", code="shutting_down"))
        try:
            await asyncio.wait_for(self._idle.wait(), _LAST_WORDS_S)
        except TimeoutError:
            return  # a client that does not read its stream


def changes_something(scope: Scope) -> bool:
    """Whether the request is of a method that may change what the server holds."""
    return scope["type"] == "http" and scope["method"] not in _READING


class RefuseWhileDraining:
    """ASGI middleware: a server on its way out changes nothing any more; what it is can still be asked."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if changes_something(scope):
            self._drain.check()
        await self._app(scope, receive, send)
