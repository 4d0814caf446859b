"""Bodies that come and do not end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from server.api.adapters import upload
from server.api.body import BodyRoom
from server.errors import Unavailable
from tests.api.face_site import eventually, listen, open_site

KIB = 2**10


class Sender:
    """Connections to one port, which it closes at its end."""

    def __init__(self, url: str) -> None:
        self._port = int(url.rpartition(":")[2])
        self._writers: list[asyncio.StreamWriter] = []

    async def send(self, path: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers.append(writer)
        writer.write(f"POST {path} HTTP/1.1\r\nhost: localhost\r\n".encode() + body)
        return reader, writer

    def close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


def json_head(length: int) -> bytes:
    return f"content-type: application/json\r\ncontent-length: {length}\r\n\r\n".encode()


async def test_the_oldest_large_body_makes_way_and_small_ones_are_not_counted(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site, listen(site.app) as url:
        room = site.face.body_room = BodyRoom(300 * KIB)
        with closing(Sender(url)) as sender:
            half = json_head(200 * KIB) + b'{"prompt": "' + b"x" * (128 * KIB)
            first, _ = await sender.send("/v1/completions", half)
            await eventually(lambda: room.held > 128 * KIB)
            second, finishing = await sender.send("/tokenize", half)
            await eventually(lambda: room.held > 256 * KIB)
            await sender.send("/v1/chat/completions", half)
            refused = await first.readuntil(b"\r\n\r\n")
            assert b" 503 " in refused
            assert b"retry-after: " in refused
            assert b'"overloaded"' in await first.readuntil(b"}}")
            small = json.dumps({"model": "base", "prompt": "hello"}).encode()
            fourth, _ = await sender.send("/v1/completions", json_head(len(small)) + small)
            assert b" 200 " in await fourth.readline()
            finishing.write(b"x" * (72 * KIB - 14) + b'"}')
            assert b" 400 " in await second.readline()  # it was read to its end: such a text has no room
        await eventually(lambda: room.held == 0)


async def test_one_body_may_be_larger_than_the_room() -> None:
    room = BodyRoom(10)
    async with room.enter() as grow:
        grow(100)
        assert room.held == 100
    assert room.held == 0


async def test_who_was_given_up_gives_back_once() -> None:
    room = BodyRoom(10)

    async def waits() -> None:
        async with room.enter() as grow:
            grow(8)
            await asyncio.Event().wait()

    waiting = asyncio.create_task(waits())
    await asyncio.sleep(0)
    async with room.enter() as grow:
        grow(8)
        with pytest.raises(Unavailable):
            await waiting
        assert room.held == 8
    assert room.held == 0


async def test_a_tenant_that_sends_more_makes_way_for_others_and_they_never_for_it() -> None:
    room = BodyRoom(100)
    ended: list[str] = []

    async def body(tenant: str, name: str, size: int) -> None:
        try:
            async with room.enter(tenant) as grow:
                grow(size)
                await asyncio.Event().wait()
        except Unavailable:
            ended.append(name)

    async with asyncio.TaskGroup() as senders:
        sent = []

        async def send(tenant: str, name: str, size: int) -> None:
            sent.append(senders.create_task(body(tenant, name, size)))
            await asyncio.sleep(0.01)

        await send("quiet", "q0", 30)
        for at in range(4):
            await send("loud", f"l{at}", 30)
        assert ended == ["l0", "l1"]
        await send("quiet", "q1", 15)
        assert ended == ["l0", "l1", "l2"]  # though the other has more by number now
        await send("third", "t0", 40)
        assert ended == ["l0", "l1", "l2", "q0"]  # who holds the most, whoever that is
        assert room.held == 30 + 15 + 40
        for each in sent:
            each.cancel()
    assert room.held == 0
    assert not room._by_tenant


async def test_of_many_uploads_each_keeps_less_in_memory() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield bytes(32 * KIB)

    alone = [sum(map(len, each)) async for each in upload._gathered(pieces(), lambda: 64 * KIB * KIB)]
    beside = [sum(map(len, each)) async for each in upload._gathered(pieces(), lambda: 64 * KIB)]
    assert alone == [KIB * KIB] * 2 + [0]
    assert beside == [64 * KIB] * 32 + [0]
    assert max([sum(map(len, each)) async for each in upload._gathered(pieces(), lambda: 1)]) == 32 * KIB
