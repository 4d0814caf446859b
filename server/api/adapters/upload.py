"""From a request to a published version: multipart uploads, and adapters that a source fetches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing, suppress
from functools import partial
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from server.api.face import Face
from server.config import Settings
from server.errors import ChorusError, InvalidRequest, TooSlow
from server.registry.publication import Publication
from server.registry.records import Published
from server.registry.sources.archive import ARCHIVE_SUFFIXES
from server.registry.sources.upload import Upload, check_size
from server.registry.store import CHUNK_BYTES, FILE_NAMES

_PATIENCE_S = 10.0  # of waiting for a client that sends nothing; what comes in time earns it again
_THREADS = 4  # for all uploads, so that those who wait for them hold up nothing else
_DRAINED_BYTES, _DRAINED_SECONDS = 32 * 2**20, 2.0  # of a refused upload, so that its client reads why

_BINARY = {"type": "string", "format": "binary"}
UPLOAD_FORM = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "description": {"type": "string"},
        "files": {
            "type": "array",
            "items": _BINARY,
            "description": f"{' and '.join(FILE_NAMES)}, or one archive ({', '.join(ARCHIVE_SUFFIXES)}) "
            "of them. Files are known by their file name; the name of their part is free.",
        },
    },
    "required": ["files"],
}

UPLOADERS = ThreadPoolExecutor(_THREADS, thread_name_prefix="adapter-upload")

T = TypeVar("T")


async def receive(face: Face, request: Request, *, name: str | None, replace: bool) -> Published:
    """A multipart upload, parsed, hashed and written in threads while it comes, then judged and published.

    `name` may come with the URL, or as a field of the form. Whatever goes wrong, nothing of it is left.
    Raises what Upload and Publication raise, TooSlow, and Unavailable before the registry is open and when
    the server is on its way out.
    """
    face.drain.check()
    registry = face.require_registry()
    announced = request.headers.get("content-length", "")
    expected = int(announced) if announced.isdecimal() and len(announced) < 20 else 0
    check_size(expected, face.settings.limits)
    publication = registry.publication(create=True, replace=replace, expected_bytes=expected)
    async with aclosing(request.stream()) as body:
        try:
            if name is not None:
                publication.begin(name)
            return await _receive_into(publication, request.headers.get("content-type", ""), body, face)
        except ClientDisconnect as error:
            raise InvalidRequest("The client went away before its upload was complete.") from error
        except ChorusError:
            await _drain(body)
            raise
        finally:
            await in_thread(publication.close)


def fetch(face: Face, name: str, uri: str, *, replace: bool, description: str | None = None) -> Published:
    """Have the source of `uri` fetch an adapter, judge and publish it. Belongs in a thread.

    Raises what Source and Publication raise, and Unavailable before the registry is open and when the server
    is on its way out.
    """
    face.drain.check()
    with face.require_registry().publication(create=True, replace=replace) as publication:
        publication.begin(name)
        provenance = face.sources.fill(uri, publication.staging, face.settings.limits)
        return publication.publish(provenance, description=description)


async def in_thread(call: Callable[[], T], pool: Executor | None = None) -> T:
    """`call()` in a thread. Cancelled, it still waits for the thread, so that nobody cleans up under it."""
    running = asyncio.get_running_loop().run_in_executor(pool, call)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


async def _receive_into(
    publication: Publication, content_type: str, body: AsyncIterator[bytes], face: Face
) -> Published:
    description: str | None = None

    def on_field(field: str, value: str) -> None:
        nonlocal description
        if field == "description":
            description = value
        elif publication.name is None:
            publication.begin(value)
        elif publication.name != value:
            raise InvalidRequest("`name` is not the name in the URL.", param="name")

    def finish() -> Published:
        return publication.publish(upload.finish(), description=description)

    upload = Upload(content_type, publication.staging, on_field, face.settings.limits)
    buffer = bytearray()
    async for chunk in _paced(body, face.settings):
        buffer += chunk
        if len(buffer) >= CHUNK_BYTES:
            full, buffer = bytes(buffer), bytearray()
            await in_thread(partial(upload.feed, full), UPLOADERS)
    await in_thread(partial(upload.feed, bytes(buffer)), UPLOADERS)
    return await in_thread(finish, UPLOADERS)


async def _paced(body: AsyncIterator[bytes], settings: Settings) -> AsyncIterator[bytes]:
    """The chunks of `body`. Raises TooSlow when they come slower than the settings allow.

    Only time spent waiting for the client counts against its rate, not what the server takes to write.
    """
    clock, rate = asyncio.get_running_loop().time, settings.upload_rate_bytes
    patience, deadline = _PATIENCE_S, clock() + settings.upload_timeout_s
    while True:
        began = clock()
        try:
            async with asyncio.timeout_at(min(began + patience, deadline)):
                chunk = await anext(body)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise TooSlow(
                f"The upload was given up: it came at less than {rate} bytes a second, or took more than "
                f"{settings.upload_timeout_s:g} seconds."
            ) from None
        earned = len(chunk) / rate if rate else _PATIENCE_S
        patience = min(_PATIENCE_S, max(0.0, patience - (clock() - began)) + earned)
        yield chunk


async def _drain(body: AsyncIterator[bytes]) -> None:
    """Read on for a while: a connection closed on a client that still sends may lose it the answer."""
    left = _DRAINED_BYTES
    with suppress(ClientDisconnect, TimeoutError):
        async with asyncio.timeout(_DRAINED_SECONDS):
            async for chunk in body:
                left -= len(chunk)
                if left < 0:
                    return
