"""Reading a JSON body: bounded while it comes in, and parsed beside the event loop when it is large."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from server.errors import InvalidRequest, TooLarge

T = TypeVar("T")

_INLINE = 64 * 2**10  # bytes; what is smaller takes less time than a thread's start


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises TooLarge as soon as it is known to be over `limit` bytes."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            chunks.append(chunk)
    except ClientDisconnect as error:
        raise InvalidRequest("The client went away before its request was complete.") from error
    return b"".join(chunks)


async def beside_loop(size: int, work: Callable[[], T]) -> T:
    """`work()`, in a thread when its input is `size` bytes or characters and that is much."""
    return work() if size <= _INLINE else await asyncio.to_thread(work)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"The request is larger than {limit} bytes.")
