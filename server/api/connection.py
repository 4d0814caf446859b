"""One connection: uvicorn's HTTP protocol, with bounds on what a client sends, how slowly, and leaves unread.

No timer and no task belongs to a connection: the server calls `check` of each about once a second.
"""

from __future__ import annotations

import asyncio
import heapq
import http
import logging
import math
import uuid
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, cast

import httptools
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.api.errors import error_response
from server.api.exchange import AnswerFlow, Exchange
from server.api.intake import Intake
from server.config import Settings
from server.errors import ChorusError, HeadTooLarge, InvalidRequest, TooSlow, Unavailable
from server.turns import Turns

logger = logging.getLogger(__name__)

_LINGER_S = 2.0  # a refused client may go on sending for so long, or it would lose the answer
_LINGER_BYTES = 2**20  # and so much
_MOST_EARNED_S = 60.0  # that what came of a body faster than it must gives to the rest of it
_LATE_ANSWER_S = 5.0  # after the end of a body's time, for the error to go out
_REFUSED_AT_ONCE = 128  # connections over the limit that are told so; more of them are only closed
_READ_AT_ONCE = 8  # pieces of what clients send, in a turn of the loop; one may complete a body
_PROBE = b"GET /health"
_EVICTED_SHARE = 64  # of all connections, one in so many is closed when room is needed


@dataclass(frozen=True)
class ConnectionLimits:
    """What one connection may hold and for how long; sizes in bytes, times in seconds."""

    connections: int
    head_bytes: int
    headers: int
    pipelined: int
    read_s: float
    rate: int  # bytes/s
    unread_s: float

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(
            connections=settings.max_connections,
            head_bytes=settings.max_request_head_bytes,
            headers=settings.max_request_headers,
            pipelined=settings.max_pipelined_requests,
            read_s=settings.read_timeout_s,
            rate=settings.min_rate_bytes,
            unread_s=settings.unread_timeout_s,
        )


class ConnectionConfig(uvicorn.Config):
    """uvicorn's configuration for connections of this kind."""

    def __init__(
        self, app: ASGIApp, settings: Settings, *, limits: ConnectionLimits | None = None, **more: Any
    ):
        super().__init__(
            app,
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=math.ceil(settings.keep_alive_s),
            **more,
        )
        self.limits = limits or ConnectionLimits.of(settings)
        self.entrance = Turns()
        self.reading = Turns(_READ_AT_ONCE)
        self.intake = Intake()


class Connection(HttpToolsProtocol):
    """Closed by whatever is beyond its limits; with an answer, where none is on its way already."""

    def __init__(self, config: ConnectionConfig, *args: Any, **more: Any) -> None:
        super().__init__(config, *args, **more)
        self._limits = config.limits
        self._entrance = config.entrance
        self._pieces = config.reading
        self._intake = config.intake
        self._unread = 0  # pieces that have come and wait for a turn of the loop
        self._held = False  # no more of them is wanted meanwhile
        self._reading: Literal["nothing", "head", "body"] = "nothing"
        self._since = self.loop.time()  # of what is read, or waited for, now
        self._size = 0  # bytes of it so far
        self._told = 0  # bytes of this piece that are not of the head it ends in
        self._exchange: Exchange | None = None
        self._refused = False
        self._judged = 0  # how often a limit was felt
        self._closing_at: float | None = None

    # what asyncio calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self.flow = self._answer_flow = AnswerFlow(transport, self.loop.time)
        over = len(self.connections) - self._limits.connections
        if over > 0:
            self._make_room(over)

    def connection_lost(self, error: Exception | None) -> None:
        """uvicorn tells the last request alone; the one that is answered may have others behind it."""
        super().connection_lost(error)
        self.pipeline.clear()
        if self._exchange is not None:
            self._exchange.hang_up()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._size += len(data)  # it is only waited for the client to read why
            if self._size > _LINGER_BYTES:
                self.transport.abort()
            return
        self._unset_keepalive_if_required()
        self._unread += 1
        self._intake.waiting += len(data)
        at_once = self._unread == 1 and data.startswith(_PROBE)
        self._pieces.enter(partial(self._take, data), at_once=at_once)
        if self._unread and not self._held:
            self._held = True
            self.transport.pause_reading()

    def _take(self, data: bytes) -> None:
        """A piece in its turn: thousands that come at once must not hold up the others."""
        self._unread -= 1
        self._intake.waiting -= len(data)
        if not self._refused and not self.transport.is_closing():
            self._parse(data)
        if self._held and not self._unread:
            self._held = False
            if not self.flow.read_paused and not self.transport.is_closing():
                self.transport.resume_reading()

    def _parse(self, data: bytes) -> None:
        self._told = 0
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            if self.cycle is not None:
                self.cycle.keep_alive = False  # answered as if it had not asked; what follows is not HTTP
        except httptools.HttpParserError as error:
            cause = error.__context__  # what one of the calls below raised
            if not isinstance(cause, ChorusError):
                cause = InvalidRequest("This is not a valid HTTP request.")
            self._refuse(cause)
        else:
            if self._reading == "head":
                self._count_head(len(data) - self._told)

    def _count_head(self, size: int) -> None:
        """Of a piece that ends within a head; what the parser has not told of yet counts as well."""
        self._size += size
        if self._size > self._limits.head_bytes:
            self._refuse(self._head_too_large())

    # what the parser calls; what is raised here ends the parsing

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= self._limits.pipelined:
            raise InvalidRequest(f"More than {self._limits.pipelined} requests wait on this connection.")
        self._begin("head")
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self._limits.head_bytes:
            raise self._head_too_large()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reading != "head":
            return  # a trailer must not pass for a header
        super().on_header(name, value)
        if len(self.headers) > self._limits.headers:
            raise HeadTooLarge(f"The request has more than {self._limits.headers} headers.")

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.head_bytes:
            raise self._head_too_large()
        if not self.url.startswith((b"/", b"*")):
            self._take_authority()
        self._told += size
        self._begin("body")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        most = self._limits.rate * (self.loop.time() - self._since + _MOST_EARNED_S)
        self._size = min(self._size + len(body), int(most))
        self._told += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._begin("nothing")
        super().on_message_complete()
        if self._exchange is not None and self._exchange.close_after_body:
            self.transport.close()

    # the app

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        exchange = self._exchange = Exchange(self._answer_flow, cycle)

        async def run(scope: Scope, receive: Receive, send: Send) -> None:
            await app(scope, exchange.receive, exchange.send)

        start = super()._start_asgi_task

        def begin() -> None:
            if not cycle.disconnected:
                start(cycle, cast(Any, run))

        self._entrance.enter(begin, at_once=cycle.scope["path"].startswith("/health"))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._since = self.loop.time()

    # limits

    def check(self, now: float, elapsed: float) -> bool:
        """Close what is overdue, and say whether it was: that is work.

        `now` is the loop's time, `elapsed` the seconds since the last call.
        """
        before = self._judged
        self._judge(now, elapsed)
        return self._judged > before

    def _judge(self, now: float, elapsed: float) -> None:
        limits, flow = self._limits, self._answer_flow
        if self._refused or self.transport.is_closing():
            self._check_closing(now)
        elif flow.overdue(now, limits.unread_s, limits.rate):
            self._abort("it does not read its answer")
        elif flow.read_paused or self._unread:
            self._since += elapsed  # it is us who do not read
        elif self._reading == "body":
            self._check_body(now)
        elif self.answering:
            self._since = now
        elif self._reading == "head" and now - self._since > limits.read_s:
            self._refuse(TooSlow(f"The request's headers took longer than {limits.read_s:g} seconds."))
        elif self._exchange is None and now - self._since > limits.read_s:
            self._judged += 1
            self.transport.close()  # not a byte came

    def _check_closing(self, now: float) -> None:
        if self._closing_at is None:
            self._closing_at = now
        if now - self._closing_at > (_LINGER_S if self._refused else self._limits.unread_s):
            self.transport.abort()

    def _check_body(self, now: float) -> None:
        late_s = now - self._since - self._limits.read_s - self._size / self._limits.rate
        if self.cycle.response_complete:
            if now - self._since > _LINGER_S:
                self.transport.close()
        elif self._exchange is None or self._exchange.cycle is not self.cycle:
            if late_s > 0:
                self._abort("the body of a waiting request is late")
        elif late_s > _LATE_ANSWER_S:
            self._abort("it is late, and is not told so")
        elif late_s > 0 and not self._exchange.given_up:
            self._judged += 1
            self._exchange.give_up(TooSlow("The request's body came too slowly."))

    @property
    def answering(self) -> bool:
        """Whether there is a request without its whole answer."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def idle_since(self) -> float | None:
        """Since when no request is there to be answered (`loop.time()`); None while there is one."""
        busy = self.answering or self._reading == "body" or self._unread
        return None if busy or self._refused else self._since

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest(msg))

    def _begin(self, reading: Literal["nothing", "head", "body"]) -> None:
        self._reading, self._since, self._size = reading, self.loop.time(), 0

    def _take_authority(self) -> None:
        """Of a target like `http://host/path` the host counts, whatever the header says (RFC 9112, 3.2.2)."""
        target = httptools.parse_url(self.url)
        host = target.host or b""
        authority = host if target.port is None else b"%s:%d" % (host, target.port)
        self.headers[:] = [*(each for each in self.headers if each[0] != b"host"), (b"host", authority)]

    def _head_too_large(self) -> HeadTooLarge:
        return HeadTooLarge(f"The request's headers are larger than {self._limits.head_bytes} bytes.")

    def _make_room(self, over: int) -> None:
        """Close those that have asked for nothing the longest, or this one where all are at work."""
        most = 1 + len(self.connections) // _EVICTED_SHARE
        if evict(self.connections, self, most):
            return
        if over > _REFUSED_AT_ONCE:
            self.transport.abort()
        else:
            self._refuse(Unavailable("The server has no room for another connection.", code="no_connections"))

    def _refuse(self, error: ChorusError) -> None:
        """Answer with `error` and close. While another answer is on its way there is only the closing."""
        if self.answering:
            self._abort(error.message)
            return
        if self.transport.is_closing():
            return
        logger.info("a connection is refused: %d %s", error.status, error.message)
        self._judged += 1
        self._refused = True
        self._size = 0
        self.transport.write(self._plain(error))
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _abort(self, reason: str) -> None:
        logger.info("a connection is cut: %s", reason)
        self._judged += 1
        self._refused = True
        self.transport.abort()

    def _plain(self, error: ChorusError) -> bytes:
        response = error_response(error)
        own = [(b"x-request-id", uuid.uuid4().hex.encode()), (b"connection", b"close")]
        lines = [f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}".encode()]
        for name, value in (*self.server_state.default_headers, *response.raw_headers, *own):
            lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", bytes(response.body)])


def evict(connections: set[Any], newcomer: Connection, most: int) -> int:
    """Cut up to `most` connections that wait for a request, those first that do so longest; how many."""
    waiting = [
        (since, at, each)
        for at, each in enumerate(connections)
        if isinstance(each, Connection) and each is not newcomer and (since := each.idle_since) is not None
    ]
    chosen = heapq.nsmallest(most, waiting)
    for _, _, connection in chosen:
        connections.discard(connection)  # now: its end is told of later, when others have come
        connection.transport.abort()
    return len(chosen)
