"""What many connections send at once is read in small pieces once much of it waits."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from server.api import connection
from server.api.intake import Intake
from tests.api.face_site import eventually, listen, open_site

KIB = 2**10
MANY = 150
MUCH = 512 * KIB


class Watched(Intake):
    """Remembers the most that waited."""

    most = 0
    made: Watched

    def __init__(self) -> None:
        super().__init__(MUCH)
        type(self).made = self

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "waiting":
            super().__setattr__("most", max(self.most, self.waiting))


async def test_many_bodies_at_once_wait_in_bounded_memory_and_come_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "Intake", Watched)
    async with open_site(tmp_path) as site, listen(site.app) as url:
        loop, intake = asyncio.get_running_loop(), Watched.made
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        body = b'{"prompt": "' + b"x" * (60 * KIB) + b'"}'
        head = f"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
        request = f"{head}content-type: application/json\r\n\r\n".encode() + body
        with ExitStack() as opened:
            clients = [opened.enter_context(socket.socket()) for _ in range(MANY)]
            for client in clients:
                client.setblocking(False)
                await loop.sock_connect(client, address)
            await asyncio.sleep(0.1)  # they are all open before anything comes
            sent = [client.send(request) for client in clients]  # while the loop has no turn
            for client, size in zip(clients, sent, strict=True):
                await loop.sock_sendall(client, request[size:])
            for client in clients:
                answer = await loop.sock_recv(client, 12)
                assert answer in (b"HTTP/1.1 400", b"HTTP/1.1 200", b"HTTP/1.1 503")
        await eventually(lambda: intake.waiting == 0)
        assert MUCH < intake.most < MUCH + 256 * KIB + MANY * 16 * KIB < sum(sent)
        assert (await site.complete()).status_code == 200


def test_the_room_is_small_while_much_waits() -> None:
    intake = Intake(100)
    assert len(intake.room) == 256 * KIB
    intake.waiting = 101
    assert len(intake.room) == 16 * KIB
    intake.room[:3] = b"abc"
    assert intake.take(2) == b"ab"
    intake.waiting = 100
    assert len(intake.room) == 256 * KIB
