"""The HTTP server around the app: its socket, its signals, and what it says at start."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from server.api.app import create_app
from server.api.face import Face
from server.base_model import BaseModel, StartError
from server.border.client import EngineClient
from server.config import Settings

_UPLOADS_S = 5  # what may still run after the drain: an upload, say


class Server(uvicorn.Server):
    """Ends in order: the first SIGTERM or SIGINT drains, a second one ends at once."""

    def __init__(self, config: uvicorn.Config, face: Face) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._face = face
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self._signalled = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled or self._loop is None:
            self.force_exit = self.should_exit = True
            return
        self._signalled = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def fail(self, reason: str) -> None:
        """The server cannot do its work: say why, end with code 1."""
        print(f"chorus: {_one_line(reason)}", file=sys.stderr, flush=True)
        self.exit_code = 1
        self.should_exit = True

    def _begin_drain(self) -> None:
        self._drain = asyncio.create_task(self._end(), name="drain")

    async def _end(self) -> None:
        await self._face.drain.finish(self._face.settings.shutdown_grace_s)
        self.should_exit = True


def serve(settings: Settings, new_engine: Callable[[Settings], EngineClient]) -> int:
    """Runs until a signal; returns the exit code. `new_engine` gets the settings with what was found of the
    model filled in. Raises StartError."""
    base = BaseModel.resolve(settings)
    resolved = {"model": str(base.folder), "served_model_name": base.name}
    resolved |= {"tokenizer": str(base.tokenizer_folder)}
    settings = settings.model_copy(update=resolved)
    listener = bind(settings)
    return run(settings, new_engine(settings), base, listener)


def run(settings: Settings, engine: EngineClient, base: BaseModel, listener: socket.socket) -> int:
    """The same with a given engine, on a bound socket."""
    url = f"http://{_for_url(settings.host)}:{listener.getsockname()[1]}"
    server: Server | None = None

    def on_ready(face: Face) -> None:
        face.background.start(face.readers.start())
        gc.freeze()  # what lives from now on to the end need not be looked at by every collection
        print_summary(face, url)

    def on_failed(reason: str) -> None:
        if server is not None:
            server.fail(reason)

    app = create_app(settings, engine, base, on_ready=on_ready, on_failed=on_failed)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=_UPLOADS_S,
    )
    server = Server(config, app.state.face)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(server, engine, listener))
    return server.exit_code


async def _serve(server: Server, engine: EngineClient, listener: socket.socket) -> None:
    try:
        await server.serve([listener])
    finally:
        await engine.stop()  # after a forced end the lifespan has not done it


def bind(settings: Settings) -> socket.socket:
    """Before the model is loaded, so that a port in use is known at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
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
    table.add_row("adapters", f"{len(list(face.registry.records())):,} registered")
    table.add_row("context", f"{info.max_model_len:,} tokens")
    table.add_row("ready at", url)
    console = Console(highlight=False)
    console.print(f"[bold]{face.base.name}[/bold] ({info.model_type}), loaded in {info.load_seconds:.1f} s")
    console.print(table)


def _for_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _one_line(text: str) -> str:
    return " ".join(text.split())
