"""From a request to a published version: multipart uploads, and adapters that a source fetches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from contextvars import copy_context
from functools import partial
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from server.access.caller import DEFAULT_TENANT, Caller
from server.api.caller import caller_of
from server.api.face import Face
from server.errors import ChorusError, Forbidden, InvalidRequest, TooSlow
from server.registry.publication import Publication
from server.registry.records import Published
from server.registry.sources.archive import ARCHIVE_SUFFIXES
from server.registry.sources.upload import Upload, check_size
from server.registry.store import CHUNK_BYTES, FILE_NAMES
from server.turns import Turns

_GATHERED_BYTES = 64 * 2**20  # of all uploads together, before it is written
_LEAST_GATHERED_BYTES = 16 * 2**10  # of one, of a rate that may be as low in a second
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
    Raises what Upload and Publication raise, TooSlow, and Unavailable before the registry is open.
    """
    registry = face.require_registry()
    announced = request.headers.get("content-length", "")
    expected = int(announced) if announced.isdecimal() and len(announced) < 20 else 0
    check_size(expected, face.settings.limits)
    tenant = caller_of(request).tenant
    begin = partial(
        registry.publication, create=True, replace=replace, expected_bytes=expected, tenant=tenant
    )
    async with _begun(begin) as publication, aclosing(request.stream()) as body:
        try:
            if name is not None:
                publication.begin(name)
            with _counted(face):
                return await _receive_into(publication, request.headers.get("content-type", ""), body, face)
        except ClientDisconnect as error:
            raise InvalidRequest("The client went away before its upload was complete.") from error
        except ChorusError:
            await _drain(body, face.upload_turns)
            raise


def fetch(
    face: Face, caller: Caller, name: str, uri: str, *, replace: bool, description: str | None = None
) -> Published:
    """Have the source of `uri` fetch an adapter, judge and publish it. Belongs in a thread.

    Raises what Source and Publication raise, and Unavailable before the registry is open.
    """
    if caller.tenant != DEFAULT_TENANT and not caller.may("admin"):
        raise Forbidden("Only the operator may register what lies on the server.", param="source")
    registry = face.require_registry()
    with registry.publication(create=True, replace=replace, tenant=caller.tenant) as publication:
        publication.begin(name)
        provenance = face.sources.fill(uri, publication.staging, face.settings.limits)
        return publication.publish(provenance, description=description)


@asynccontextmanager
async def _begun(begin: Callable[[], Publication]) -> AsyncIterator[Publication]:
    """A publication, closed in any case. Both in a thread: even to make a folder waits for a disk that is
    syncing what others have uploaded."""
    begun: list[Publication] = []
    try:
        await in_thread(lambda: begun.append(begin()))
        yield begun[0]
    finally:
        for publication in begun:
            await in_thread(publication.close)


async def in_thread(call: Callable[[], T], pool: Executor | None = None) -> T:
    """`call()` in a thread. Cancelled, it still waits for the thread, so that nobody cleans up under it."""
    context = copy_context()  # log lines say whose request it is
    running = asyncio.get_running_loop().run_in_executor(pool, context.run, call)
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
    chunks = _in_time(body, face.settings.upload_timeout_s, face.upload_turns)
    async for pieces in _gathered(chunks, lambda: _GATHERED_BYTES // max(face.uploads, 1)):
        await in_thread(partial(_feed, upload, pieces), UPLOADERS)
    return await in_thread(finish, UPLOADERS)


@contextmanager
def _counted(face: Face) -> Iterator[None]:
    face.uploads += 1
    try:
        yield
    finally:
        face.uploads -= 1


def _feed(upload: Upload, pieces: list[bytes]) -> None:
    upload.feed(b"".join(pieces))


async def _gathered(chunks: AsyncIterator[bytes], share: Callable[[], int]) -> AsyncIterator[list[bytes]]:
    """A megabyte at a time, or `share` bytes where that is less: what thousands leave half sent is memory."""
    pieces: list[bytes] = []
    size = 0
    async for chunk in chunks:
        pieces.append(chunk)
        size += len(chunk)
        if size >= min(CHUNK_BYTES, max(share(), _LEAST_GATHERED_BYTES)):
            yield pieces
            pieces, size = [], 0
    yield pieces


async def _in_time(body: AsyncIterator[bytes], most_s: float, turns: Turns) -> AsyncIterator[bytes]:
    """The chunks of `body`. Raises TooSlow when they take longer than `most_s` seconds in all; their least
    rate is the connection's matter, as of every body. Only some of all uploads take one in a turn of the
    loop: each is up to 256 KB, copied more than once, and while it is not taken no other is read for it."""
    deadline = asyncio.get_running_loop().time() + most_s
    while True:
        await turns.turn()
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await anext(body)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise TooSlow(f"The upload was given up: it took more than {most_s:g} seconds.") from None
        yield chunk


async def _drain(body: AsyncIterator[bytes], turns: Turns) -> None:
    """Read on for a while: a connection closed on a client that still sends may lose it the answer."""
    left = _DRAINED_BYTES
    with suppress(ClientDisconnect, TimeoutError):
        async with asyncio.timeout(_DRAINED_SECONDS):
            async for chunk in body:
                left -= len(chunk)
                if left < 0:
                    return
                await turns.turn()
