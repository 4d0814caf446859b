"""Taking a body in: bounded while it comes, and all that come together."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from starlette.requests import ClientDisconnect, Request

from server.api.caller import caller_of
from server.errors import InvalidRequest, TooLarge, Unavailable

_SMALL = 64 * 2**10  # bytes; as many such bodies as there are connections may come
_TOGETHER = 256 * 2**20  # bytes of larger ones

Grow = Callable[[int], None]


@dataclass(eq=False)
class _Coming:
    tenant: str
    patience: asyncio.Timeout
    held: int = 0  # bytes


class BodyRoom:
    """How much of larger bodies may be here before they are whole: what thousands of clients send and do not
    end would fill the memory. Where there is no room, the tenant that holds the most gives up the body that
    has been coming the longest: who means it has sent its body in a moment. So nobody loses one to a tenant
    that sends more, and no room need be kept free for those who come later, as it must in the waiting room,
    where nobody is sent away again."""

    def __init__(self, limit: int = _TOGETHER) -> None:
        self._limit = limit
        self._held = 0
        self._coming: dict[_Coming, None] = {}  # the oldest first
        self._by_tenant = Counter[str]()  # bytes

    @property
    def held(self) -> int:
        return self._held

    @asynccontextmanager
    async def enter(self, tenant: str = "") -> AsyncIterator[Grow]:
        """While a body comes; to be called with the size of each piece. Raises Unavailable."""
        try:
            async with asyncio.timeout(None) as patience:
                coming = _Coming(tenant, patience)
                self._coming[coming] = None
                try:
                    yield partial(self._grow, coming)
                finally:
                    self._drop(coming)
        except TimeoutError:
            raise Unavailable("Too many large bodies are on their way.", code="overloaded") from None

    def _grow(self, coming: _Coming, size: int) -> None:
        if coming not in self._coming:
            return  # given up; its reader is about to hear of it
        coming.held += size
        self._held += size
        self._by_tenant[coming.tenant] += size
        while self._held > self._limit and (given_up := self._next_to_go()) is not coming:
            self._drop(given_up)
            given_up.patience.reschedule(asyncio.get_running_loop().time())

    def _next_to_go(self) -> _Coming:
        tenant = max(self._by_tenant, key=self._by_tenant.__getitem__)
        return next(each for each in self._coming if each.tenant == tenant)

    def _drop(self, coming: _Coming) -> None:
        if coming in self._coming:
            del self._coming[coming]
            self._held -= coming.held
            self._by_tenant[coming.tenant] -= coming.held
            if not self._by_tenant[coming.tenant]:
                del self._by_tenant[coming.tenant]


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises TooLarge as soon as it is known to be over `limit` bytes, and Unavailable."""
    announced = request.headers.get("content-length", "")
    size = int(announced[:20]) if announced.isdecimal() else None
    if size is not None and size > limit:
        raise _too_large(limit)
    try:
        if size is not None and size <= _SMALL:
            return await _whole(request, limit)
        room: BodyRoom = request.app.state.face.body_room
        async with room.enter(caller_of(request).tenant) as grow:
            return await _whole(request, limit, grow)
    except ClientDisconnect as error:
        raise InvalidRequest("The client went away before its request was complete.") from error


async def _whole(request: Request, limit: int, grow: Grow | None = None) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        if grow is not None:
            grow(len(chunk))
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"The request is larger than {limit} bytes.")
