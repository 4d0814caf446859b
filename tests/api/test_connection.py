"""What one connection may do: raw sockets against the real server around a fake engine."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from server.api import connection, listen
from server.api.exchange import AnswerFlow
from tests.api.face_site import Site, drained, events, eventually, open_site
from tests.api.face_site import listen as on_a_port
from tests.api.fake_engine import FakeEngine

LIVE = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"
READ_S = 0.4

Open = Callable[..., AbstractAsyncContextManager[tuple[Site, "Client"]]]


class Socket:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return int(first.split()[1]), headers, body

    async def error(self) -> tuple[int, str]:
        """Status and code of the next answer, which is an error that ends the connection."""
        status, headers, body = await self.answer()
        assert headers["x-request-id"]
        assert headers["connection"] == "close"
        await self.end()
        return status, json.loads(body)["error"]["code"]

    async def events(self, pause_s: float = 0.0) -> list[Any]:
        """The payloads of a whole stream, each of whose chunks is whole events."""
        answer = b""
        while not answer.endswith(b"\r\n0\r\n\r\n"):
            answer += await self.reader.read(1 << 18)
            await asyncio.sleep(pause_s)
        lines = answer.decode().partition("\r\n\r\n")[2].split("\r\n")
        return events("".join(line for line in lines if line.startswith("data: ")))

    async def end(self) -> bytes:
        """All that still comes, until the server has closed."""
        try:
            return await asyncio.wait_for(self.reader.read(), 20)
        except ConnectionError:
            return b""


class Client:
    """Connections to one server."""

    def __init__(self, url: str) -> None:
        self._port = int(url.rpartition(":")[2])
        self._opened: list[Socket] = []

    async def open(self, data: bytes = b"") -> Socket:
        plain = socket.socket()
        plain.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF, 16384
        )  # the kernel keeps little of what is unread
        plain.setblocking(False)
        await asyncio.get_running_loop().sock_connect(plain, ("127.0.0.1", self._port))
        opened = Socket(*await asyncio.open_connection(sock=plain))
        self._opened.append(opened)
        await opened.send(data)
        return opened

    async def live(self) -> int:
        return (await (await self.open(LIVE)).answer())[0]

    def close(self) -> None:
        for each in self._opened:
            each.writer.close()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    monkeypatch.setattr(listen, "_CHECK_S", 0.05)
    monkeypatch.setattr(connection, "_LINGER_S", 0.3)

    @asynccontextmanager
    async def open_server(
        engine: FakeEngine | None = None, **fields: Any
    ) -> AsyncIterator[tuple[Site, Client]]:
        async with open_site(tmp_path, engine, **fields) as site, on_a_port(site.app) as url:
            client = Client(url)
            try:
                yield site, client
            finally:
                client.close()

    return open_server


def post(body: bytes | dict[str, Any], *headers: str, path: str = "/v1/completions") -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", *headers]
    if not any(line.startswith(("content-length", "transfer-encoding")) for line in headers):
        lines.append(f"content-length: {len(raw)}")
    return "\r\n".join([*lines, "", ""]).encode() + raw


async def send_until_closed(opened: Socket, piece: bytes, pause_s: float = 0.0) -> None:
    """Sends until the server has closed; the test's own time limit ends one that does not."""
    try:
        while True:
            await opened.send(piece)
            await asyncio.sleep(pause_s)
    except ConnectionError:
        return


COMPLETE = {"model": "base", "prompt": "hello", "max_tokens": 4}


# what is too much


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health/live HTTP/1.1\r\nhost: localhost\r\nx: " + b"x" * 5000 + b"\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 41 + b"\r\n",
        b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nx: " + b"x" * 2**20,
        b"GET /" + b"x" * 2**20,
    ],
    ids=["long", "many", "target", "endless", "endless-target"],
)
async def test_headers_that_are_too_large(served: Open, head: bytes) -> None:
    async with served(max_request_head_bytes="4KiB", max_request_headers=40) as (_, client):
        assert await (await client.open(head)).error() == (431, "headers_too_large")
        fits = LIVE[:-2] + b"x: y\r\n" * 30 + b"y: " + b"y" * 3000 + b"\r\n\r\n"
        assert (await (await client.open(fits)).answer())[0] == 200


async def test_a_head_that_stops_beyond_the_limit_is_refused_at_once(served: Open) -> None:
    async with served(max_request_head_bytes="4KiB", read_timeout_s=600) as (_, client):
        unfinished = LIVE[:-2] + b"x: " + b"x" * 5000
        assert await (await client.open(unfinished)).error() == (431, "headers_too_large")
        begun = await client.open(post(b'"' + b"x" * 5000) + LIVE[:-2])  # what came before does not count
        assert (await begun.answer())[0] == 400
        await begun.send(b"\r\n")
        assert (await begun.answer())[0] == 200


async def test_an_endless_header_is_cut_while_it_comes(served: Open) -> None:
    async with served() as (_, client):
        sender = await client.open(b"GET /health/live HTTP/1.1\r\nx: ")
        await send_until_closed(sender, b"x" * 2**20)
        assert await client.live() == 200


async def test_more_requests_in_line_than_may_wait(served: Open) -> None:
    async with served(max_pipelined_requests=4) as (site, client):
        in_line = await client.open(LIVE * 5)
        assert [(await in_line.answer())[0] for _ in range(5)] == [200] * 5
        site.engine.tokens, site.engine.pause_after = [5] * 50, 1
        holder = await client.open(post(COMPLETE))
        await eventually(lambda: site.engine.running)
        await holder.send(LIVE * 1000)
        assert await holder.end() == b""
        await eventually(lambda: not site.engine.running)


async def test_one_connection_more_than_the_limit(served: Open) -> None:
    """The one that has been idle the longest makes room; where all are at work, the new one is told."""
    async with served(max_connections=3) as (site, client):
        idle = await client.open(LIVE)
        await idle.answer()
        half = await client.open(LIVE[:20])
        site.engine.tokens, site.engine.pause_after = [5] * 50, 1
        busy = [await client.open(post(COMPLETE | {"stream": True}))]
        await eventually(lambda: len(site.engine.running) == 1)
        busy.append(await client.open(post(COMPLETE | {"stream": True})))
        assert await idle.end() == b""
        await eventually(lambda: len(site.engine.running) == 2)
        busy.append(await client.open(post(COMPLETE | {"stream": True})))
        assert await half.end() == b""
        await eventually(lambda: len(site.engine.running) == 3)
        assert await (await client.open(LIVE)).error() == (503, "no_connections")
        site.engine.resume.set()
        for each in busy:
            assert await each.events()
        assert await client.live() == 200


# what is too slow


@pytest.mark.parametrize("sent", [b"", b"GET /health/live HT", LIVE[:-2]])
async def test_headers_that_do_not_come(served: Open, sent: bytes) -> None:
    async with served(read_timeout_s=READ_S) as (_, client):
        slow = [await client.open(sent) for _ in range(20)]
        assert await client.live() == 200
        for each in slow:
            if sent:
                assert await each.error() == (408, "too_slow")
            else:
                assert await each.end() == b""


async def test_headers_that_come_a_byte_at_a_time(served: Open) -> None:
    async with served(read_timeout_s=READ_S) as (_, client):
        slow = await client.open(LIVE[:20])
        await send_until_closed(slow, b"x", pause_s=0.05)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/adapters/sql/load", "/tokenize"])
async def test_a_body_that_comes_a_byte_at_a_time(served: Open, path: str) -> None:
    async with served(read_timeout_s=READ_S) as (site, client):
        slow = await client.open(post(b"{", "content-length: 1000", path=path))
        sending = asyncio.create_task(send_until_closed(slow, b" ", pause_s=0.05))
        assert await slow.error() == (408, "too_slow")
        sending.cancel()
        assert site.leases() == 0


async def test_a_slow_body_at_the_least_rate_is_read(served: Open) -> None:
    async with served(read_timeout_s=READ_S, min_rate_bytes=1000) as (_, client):
        body = json.dumps(COMPLETE).encode()
        slow = await client.open(post(b"", f"content-length: {len(body) + 1000}"))
        for _ in range(10):
            await slow.send(b" " * 100)
            await asyncio.sleep(0.08)
        await slow.send(body)
        assert (await slow.answer())[0] == 200


async def test_what_comes_fast_earns_no_endless_patience(
    served: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A megabyte at once, and then next to nothing."""
    monkeypatch.setattr(connection, "_MOST_EARNED_S", 0.3)
    async with served(read_timeout_s=READ_S, min_rate_bytes=1000) as (_, client):
        slow = await client.open(post(b" " * 2**20, "content-length: 8000000"))
        sending = asyncio.create_task(send_until_closed(slow, b" ", pause_s=0.05))
        assert await slow.error() == (408, "too_slow")
        sending.cancel()


async def test_an_upload_that_dribbles_gives_its_name_back(served: Open) -> None:
    async with served(read_timeout_s=READ_S) as (site, client):
        head = b"PUT /v1/adapters/slow HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n"
        slow = await client.open(head + b"content-type: multipart/form-data; boundary=x\r\n\r\n--x\r\n")
        sending = asyncio.create_task(send_until_closed(slow, b" ", pause_s=0.05))
        assert await slow.error() == (408, "too_slow")
        sending.cancel()
        assert list((site.face.settings.data_dir or Path()).glob("staging/*")) == []


async def test_a_body_that_nobody_reads_does_not_keep_the_connection(served: Open) -> None:
    async with served() as (_, client):
        refused = await client.open(post(b"{", "content-length: 100000000"))
        assert (await refused.answer())[0] == 413
        sending = asyncio.create_task(send_until_closed(refused, b" ", pause_s=0.05))
        await refused.end()
        sending.cancel()


async def test_a_refused_body_that_ends_leaves_the_connection_open(served: Open) -> None:
    async with served(max_request_bytes=100) as (_, client):
        refused = await client.open(post(b"x" * 10, "content-length: 200000"))
        assert (await refused.answer())[0] == 413
        await refused.send(b"x" * 199990 + LIVE)
        assert (await refused.answer())[0] == 200


async def test_an_idle_connection_is_closed(served: Open) -> None:
    async with served(keep_alive_s=1) as (_, client):
        idle = await client.open(LIVE)
        assert (await idle.answer())[0] == 200
        assert await idle.end() == b""


# what is not read

LONG = {"model": "sql", "prompt": "hello", "stream": True, "ignore_eos": True}


def long_engine() -> FakeEngine:
    engine = FakeEngine(max_model_len=10**6, kv_blocks=10**6)
    engine.tokens = [5]
    return engine


async def test_a_stream_that_is_not_read_is_cut_at_a_bound_of_bytes(served: Open) -> None:
    async with served(long_engine(), max_unread_bytes="200kB") as (site, client):
        body = LONG | {"max_tokens": 4000, "n": 2, "logprobs": 20}
        unread = await client.open(post(body))
        await eventually(lambda: site.engine.aborted)
        await drained(site)
        assert site.leases() == 0
        assert (await unread.events())[-1]["error"]["code"] == "too_slow"


async def test_a_stream_of_many_prompts_that_is_not_read_ends_whole(served: Open) -> None:
    async with served(long_engine(), max_unread_bytes="200kB") as (site, client):
        body = LONG | {"max_tokens": 3000, "prompt": ["a", "b", "c"], "logprobs": 20}
        await client.open(post(body))
        await eventually(lambda: len(site.engine.aborted) == 3)
        assert not site.engine.running


async def test_a_stream_that_is_not_read_is_cut_at_a_bound_of_seconds(served: Open) -> None:
    async with served(long_engine(), unread_timeout_s=0.5, max_unread_bytes="1GB") as (site, client):
        site.engine.pause_after = 3000
        body = LONG | {"max_tokens": 5000, "logprobs": 20}
        unread = await client.open(post(body))
        await eventually(lambda: site.engine.aborted)
        await drained(site)
        assert site.leases() == 0
        assert b"[DONE]" not in await unread.end()


async def test_the_last_words_do_not_wait_for_who_does_not_read(
    served: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = asyncio.Event()
    pause = AnswerFlow.pause_writing
    monkeypatch.setattr(AnswerFlow, "pause_writing", lambda self: (pause(self), waits.set()))
    async with served(long_engine()) as (site, client):
        site.engine.pause_after = 3000
        unread = await client.open(post(LONG | {"max_tokens": 5000, "logprobs": 20}))
        await waits.wait()
        await site.face.drain.finish(grace_s=0)
        assert site.engine.aborted
        assert (await unread.events())[-1]["error"]["code"] == "shutting_down"


async def test_a_slow_reader_gets_all_of_it(served: Open) -> None:
    async with served(long_engine(), unread_timeout_s=0.3, max_unread_bytes="50MB") as (_, client):
        slow = await client.open(post(LONG | {"max_tokens": 1500, "logprobs": 20}))
        assert len(await slow.events(pause_s=0.02)) == 1500


# what is not HTTP, or tries to be something else


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01\x00", b"hello\r\n\r\n", b"GET nowhere HTTP/1.1\r\n\r\n"]
)
async def test_what_is_not_http(served: Open, data: bytes) -> None:
    async with served() as (_, client):
        status, headers, body = await (await client.open(data)).answer()
        assert (status, headers["content-type"]) == (400, "application/json")
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


async def test_an_upgrade_is_not_taken(served: Open) -> None:
    async with served() as (_, client):
        for kind in (b"websocket", b"h2c"):
            asked = await client.open(LIVE[:-2] + b"connection: upgrade\r\nupgrade: " + kind + b"\r\n\r\n")
            assert (await asked.answer())[0] == 200
            assert await asked.end() == b""


async def test_a_trailer_is_no_header(served: Open) -> None:
    async with served() as (_, client):
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        body = json.dumps(COMPLETE).encode()
        chunks = b"%x\r\n%s\r\n0\r\ncontent-type: application/json\r\n\r\n" % (len(body), body)
        assert (await (await client.open(head + chunks)).answer())[0] == 415


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("http://localhost/health/live", "evil.example", 200),
        ("http://evil.example/health/live", "localhost", 421),
        ("http://evil.example:80/health/live", "localhost", 421),
        ("/health/live", "evil.example", 421),
        ("//evil.example/health/live", "localhost", 404),
        ("/health/live", "localhost\r\nhost: evil.example", 400),
        ("*", "localhost", 404),
    ],
)
async def test_where_a_request_says_it_goes(served: Open, target: str, host: str, status: int) -> None:
    async with served() as (_, client):
        asked = await client.open(f"GET {target} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
        assert (await asked.answer())[0] == status


async def test_a_request_without_a_host(served: Open) -> None:
    async with served() as (_, client):
        assert (await (await client.open(b"GET /health/live HTTP/1.1\r\n\r\n")).answer())[0] == 400
        assert (await (await client.open(b"GET /health/live HTTP/1.0\r\n\r\n")).answer())[0] == 200


async def test_what_hundreds_send_at_once_is_parsed_in_turns(
    served: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two thousand heads in one turn of the loop hold it for 100 ms; bodies that are read then for longer."""
    turn, parsed, completed = 0, Counter[int](), Counter[int]()

    def next_turn() -> None:
        nonlocal turn
        turn += 1
        asyncio.get_running_loop().call_soon(next_turn)

    def on_message_begin(self: connection.Connection) -> None:
        parsed[turn] += 1
        begin(self)

    def on_message_complete(self: connection.Connection) -> None:
        completed[turn] += 1
        complete(self)

    begin, complete = connection.Connection.on_message_begin, connection.Connection.on_message_complete
    monkeypatch.setattr(connection.Connection, "on_message_begin", on_message_begin)
    monkeypatch.setattr(connection.Connection, "on_message_complete", on_message_complete)
    async with served() as (_, client):
        opened = [await client.open() for _ in range(300)]
        next_turn()
        request = post({"tokens": [1]}, path="/detokenize")
        for part in (request[:-10], request[-10:]):
            for each in opened:
                each.writer.write(part)
            await eventually(lambda: sum(parsed.values()) == 300)
        answers = [await each.answer() for each in opened]
    assert {status for status, _, _ in answers} == {200}
    assert (sum(parsed.values()), sum(completed.values())) == (300, 300)
    most = 2 * connection._READ_AT_ONCE  # of one turn, and at the start of the next
    assert (max(parsed.values()) <= most, max(completed.values()) <= most) == (True, True)


async def test_what_waits_for_its_turn_is_not_late(served: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[Callable[[], None]] = []
    async with served(read_timeout_s=READ_S) as (_, client):
        with monkeypatch.context() as held_up:
            held_up.setattr(
                connection.Turns, "enter", lambda self, begin, at_once=False: waiting.append(begin)
            )
            opened = [await client.open(post(COMPLETE)), await client.open(LIVE[:-10])]
            await asyncio.sleep(4 * READ_S)
        for begin in waiting:
            begin()
        assert (await opened[0].answer())[0] == 200
        await opened[1].send(LIVE[-10:])
        assert (await opened[1].answer())[0] == 200
