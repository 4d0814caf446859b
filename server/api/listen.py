"""The HTTP server around the app: its socket, its signals, and what it says at start."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import cast

import uvicorn
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from uvicorn.config import STARTUP_FAILURE

from server.api.acceptor import Acceptor
from server.api.app import create_app
from server.api.connection import Connection, ConnectionConfig, ConnectionLimits
from server.api.face import Face
from server.api.intake import Inlet
from server.api.output import discard_output, say
from server.api.signals import handling_signals
from server.api.tls import tls_context
from server.base_model import BaseModel, StartError
from server.border.client import EngineClient
from server.config import Settings
from server.garbage import Garbage

logger = logging.getLogger(__name__)

BACKLOG = 2048

_SWITCH_S = 0.001  # how long a thread keeps the interpreter from the event loop; Python's own is 5 ms
_UNSENT_BYTES = 128 * 2**10  # of an answer, in the kernel, or it takes megabytes that nobody reads
_UPLOADS_S = 5  # what may still run after the drain: an upload, say
_CHECK_S = 1.0  # between two looks at every connection
_CLOSED_AT_ONCE = 8  # connections, before others of the loop get their turn
_CHECKED_AT_ONCE = 512  # of those that may stay
_LAST_S = 1.0  # for the engine, when a second signal ends the server at once
_FEW = 16  # requests, of which none would notice a millisecond
_OWN_FILES = 256  # descriptors that are not connections: the registry, adapters, the engine's sockets


class Server(uvicorn.Server):
    """Ends in order: the first signal drains, a second one ends at once."""

    def __init__(self, config: ConnectionConfig, face: Face) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._connections = config
        self._face = face
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: list[asyncio.Task[None]] = []
        self._signals = 0
        self._checked_at = 0.0
        self._garbage: Garbage | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's own, with connections that are taken in turns."""
        self._loop = asyncio.get_running_loop()
        self._checked_at = self._loop.time()
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        face, handshake_s = self._face, self._face.settings.read_timeout_s
        acceptors = [
            Acceptor(each, self._connection, tls=lambda: face.tls, handshake_s=handshake_s)
            for each in sockets or ()
        ]
        self.servers = cast("list[asyncio.Server]", acceptors)  # uvicorn closes them, and waits for their end
        self.started = True

    def _connection(self) -> asyncio.BaseProtocol:
        state = self.lifespan.state
        connection = Connection(self._connections, self.server_state, state, self._loop)
        return Inlet(connection, self._connections.intake)

    async def on_tick(self, counter: int) -> bool:
        now = asyncio.get_running_loop().time()
        if (elapsed := now - self._checked_at) >= _CHECK_S:
            self._checked_at = now
            await self._check_connections(now, elapsed)
            if self._garbage is not None:
                self._garbage.look_if_due(quiet=len(self.server_state.tasks) < _FEW)
        return await super().on_tick(counter)

    async def _check_connections(self, now: float, elapsed: float) -> None:
        """A few closings or some hundred looks at a time: thousands of clients must not hold up others."""
        room = 1.0
        for connection in list(self.server_state.connections):
            closed = isinstance(connection, Connection) and connection.check(now, elapsed)
            room -= 1 / (_CLOSED_AT_ONCE if closed else _CHECKED_AT_ONCE)
            if room <= 0:
                room = 1.0
                await asyncio.sleep(0)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with handling_signals(self.handle_exit):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._loop is None:
            self.should_exit = True
        elif self._signals == 1:
            self._loop.call_soon_threadsafe(self._begin, self._end)
        elif self._signals == 2:
            say(f"{signal.Signals(sig).name} came again: ends at once")
            self._loop.call_soon_threadsafe(self._begin, partial(self._end_at_once, 128 + sig))
        else:
            os._exit(128 + sig)

    def ready(self) -> None:
        """What there is now lives to the end."""
        self._garbage = Garbage()

    def fail(self, reason: str) -> None:
        """The server cannot do its work: say why, end with code 1."""
        say(reason)
        self.exit_code = 1
        self.should_exit = True

    def _begin(self, end: Callable[[], Coroutine[None, None, None]]) -> None:
        self._ending.append(asyncio.create_task(end(), name="end"))

    async def _end(self) -> None:
        await self._face.drain.finish(self._face.settings.shutdown_grace_s)
        self.should_exit = True

    async def _end_at_once(self, code: int) -> None:
        """As a kill would, which loses nothing that was answered; but the engine's sockets are removed."""
        with suppress(Exception):
            await asyncio.wait_for(self._face.engine.stop(), _LAST_S)
        os._exit(code)


def serve(settings: Settings, new_engine: Callable[[Settings], EngineClient]) -> int:
    """Runs until a signal; returns the exit code. `new_engine` gets the settings with what was found of the
    model filled in. Raises StartError."""
    tls = tls_context(settings)
    base = BaseModel.resolve(settings)
    resolved = {"model": str(base.folder), "served_model_name": base.name}
    resolved |= {"tokenizer": str(base.tokenizer_folder)}
    settings = settings.model_copy(update=resolved)
    listener = bind(settings)
    return run(settings, new_engine(settings), base, listener, tls)


def run(
    settings: Settings,
    engine: EngineClient,
    base: BaseModel,
    listener: socket.socket,
    tls: ssl.SSLContext | None = None,
) -> int:
    """The same with a given engine, on a bound socket."""
    scheme = "https" if tls else "http"
    url = f"{scheme}://{_for_url(settings.host)}:{listener.getsockname()[1]}"
    server: Server | None = None

    def on_ready(face: Face) -> None:
        face.background.start(face.readers.start())
        face.background.start(app.describe())
        if server is not None:
            server.ready()
        print_summary(face, url)

    def on_failed(reason: str) -> None:
        if server is not None:
            server.fail(reason)

    app = create_app(settings, engine, base, on_ready=on_ready, on_failed=on_failed)
    limits = ConnectionLimits.of(settings)
    limits = replace(limits, connections=_room_for(limits.connections))
    config = ConnectionConfig(
        app, settings, limits=limits, lifespan="on", timeout_graceful_shutdown=_UPLOADS_S
    )
    app.state.face.tls = tls
    server = Server(config, app.state.face)
    sys.setswitchinterval(_SWITCH_S)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(server, engine, listener))
    return server.exit_code


async def _serve(server: Server, engine: EngineClient, listener: socket.socket) -> None:
    try:
        await server.serve([listener])
    finally:
        await engine.stop()  # when the lifespan was not begun, it has not done it


def _room_for(connections: int) -> int:
    """How many of them this process may have open at once; raises its limit of open files for them."""
    wanted = connections + _OWN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    room = max(1, soft - _OWN_FILES)
    logger.warning("open files are limited to %d: at most %d connections (--max-connections)", soft, room)
    return room


def bind(settings: Settings) -> socket.socket:
    """Before the model is loaded, so that a port in use is known at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        return listener
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartError(f"--host {settings.host} --port {settings.port}: {reason}") from error


def print_summary(face: Face, url: str) -> None:
    """What the server holds, once it is ready."""
    info = face.engine.info
    if info is None or face.registry is None:
        return
    table = Table.grid(padding=(0, 2))
    weights = f"{decimal(info.weights_bytes)}, {info.parameters:,} parameters, {info.dtype} on {info.device}"
    table.add_row("weights", weights)
    tokens = info.kv_blocks * info.block_size
    table.add_row("KV cache", f"{decimal(info.kv_bytes)}, {info.kv_blocks:,} blocks, {tokens:,} tokens")
    table.add_row(
        "adapter arena", f"{decimal(info.arena_bytes)}, {info.rank16_adapters:,} adapters of rank 16"
    )
    table.add_row("adapters", f"{face.registry.size:,} registered")
    table.add_row("context", f"{info.max_model_len:,} tokens")
    table.add_row("ready at", url)
    console = Console(highlight=False)
    try:
        console.print(
            f"[bold]{face.base.name}[/bold] ({info.model_type}), loaded in {info.load_seconds:.1f} s"
        )
        console.print(table)
    except (OSError, SystemExit):  # rich's word for a broken pipe; but the server's work is elsewhere
        logger.warning("the summary could not be printed: nobody reads standard output")
        discard_output()


def _for_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
