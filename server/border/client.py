"""The async face of the engine that the API uses, and its implementation over an engine process."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import math
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Literal, Protocol

from server.border.process import EngineProcess
from server.border.stream import OutputStream
from server.config import Settings
from server.errors import ChorusError, EngineDied, Unavailable
from server.messages import (
    Abort,
    AdapterRef,
    AdapterResult,
    EngineInfo,
    EngineStats,
    Failed,
    FromEngine,
    LoadAdapter,
    Ready,
    Request,
    StepOutputs,
    TokenOutput,
    UnloadAdapter,
)

logger = logging.getLogger(__name__)

EngineState = Literal["starting", "ready", "restarting", "failed", "stopped"]
OnReady = Callable[[EngineInfo], Awaitable[None] | None]

_FIRST_DELAY_S, _LAST_DELAY_S = 0.1, 10.0  # before a restart, doubling
_SOUND_S = 60.0  # an engine that was ready this long starts the delays anew

# What silence of a ready engine means, in times of watchdog_s. More than 1: not ready. An engine that can be
# healed here must be, before a probe restarts the whole server for it; the client looks every watchdog_s.
HUNG_FACTOR = 5  # killed, and started again
DEAD_FACTOR = 2 * HUNG_FACTOR  # not even the kill has ended it

_NOT_READY = {
    "starting": "The model is loading.",
    "restarting": "The engine is restarting.",
    "failed": "The engine could not start.",
    "stopped": "The server is shutting down.",
}


class EngineStartFailed(Exception):
    """The engine's first start failed; the text is its own reason, meant for the operator."""


class EngineClient(Protocol):
    """What the API asks of an engine. Needs no torch; tests of the API use a fake of it."""

    on_ready: OnReady | None
    """Called, and awaited as a task, each time an engine gets ready, to bring pinned adapters back."""

    @property
    def info(self) -> EngineInfo | None:
        """Of the engine that is, or was last, ready."""
        ...

    @property
    def state(self) -> EngineState: ...

    @property
    def healthy(self) -> bool:
        """Ready, and the last heartbeat is younger than `watchdog_s`."""
        ...

    @property
    def stats(self) -> EngineStats | None: ...

    @property
    def last_heartbeat(self) -> float:
        """`time.monotonic()` of the last sign of life."""
        ...

    @property
    def restarts(self) -> int: ...

    @property
    def retry_after_s(self) -> int:
        """Whole seconds, 1 or more, after which a request that finds no engine should come again.

        What the last start took, less what has gone by of the one that is under way.
        """
        ...

    async def start(self) -> None: ...

    async def wait_ready(self) -> None:
        """Raises EngineStartFailed, or Unavailable after `stop`."""
        ...

    async def stop(self) -> None: ...

    def generate(self, request: Request) -> AsyncGenerator[TokenOutput, None]:
        """Yields outputs of the request and its forks until each has had its terminal one.

        Closing it early aborts those that have not. Raises (on first use) Unavailable when the engine is
        not ready, EngineDied when it ends meanwhile.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Give up one choice that `generate` is yielding outputs of; it gets no terminal one."""
        ...

    async def load_adapter(self, ref: AdapterRef, pin: bool = False) -> AdapterResult:
        """Raises as `generate`; a load that the engine refused is a result with `error`."""
        ...

    async def unload_adapter(self, digest: str, forget: bool = False) -> AdapterResult: ...


class ProcessEngineClient:
    """An `EngineClient` over an engine process, which it starts again when it dies or hangs.

    A first start that fails is final (`failed`): the reason is in the settings. Later ones are tried again
    for ever, with growing delays. Use it from one event loop.
    """

    def __init__(self, settings: Settings, factory: str = "server.engine.engine:create_engine") -> None:
        self.info: EngineInfo | None = None
        self.state: EngineState = "starting"
        self.stats: EngineStats | None = None
        self.last_heartbeat = time.monotonic()
        self.restarts = 0
        self.failure: str | None = None  # why the engine is not there; None while it is ready
        self.on_ready: OnReady | None = None
        self._settings = settings
        self._factory = factory
        self._process: EngineProcess | None = None
        self._began_at = time.monotonic()  # the present start, or the next one
        self._start_s = 0.0  # how long the last start took
        self._ready_at: float | None = None  # of the present process
        self._refusal: str | None = None  # its reason, when it could not load
        self._streams: dict[str, OutputStream] = {}  # choices of one request have the same
        self._calls: dict[int, asyncio.Future[AdapterResult]] = {}
        self._call_ids = itertools.count(1)
        self._supervisor: asyncio.Task[None] | None = None
        self._hook: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._settled = asyncio.Event()  # neither starting nor restarting

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the engine's last sign of life; a sound one gives one every half second."""
        return time.monotonic() - self.last_heartbeat

    @property
    def healthy(self) -> bool:
        return self.state == "ready" and self.heartbeat_age <= self._settings.watchdog_s

    @property
    def retry_after_s(self) -> int:
        gone = 0.0 if self.state == "ready" else time.monotonic() - self._began_at
        return max(1, math.ceil(self._start_s - gone))

    async def start(self) -> None:
        """Returns at once; see `wait_ready`."""
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def wait_ready(self) -> None:
        while self.state in ("starting", "restarting"):
            await self._settled.wait()
        if self.state == "failed":
            raise EngineStartFailed(self.failure)
        if self.state == "stopped":
            raise Unavailable(_NOT_READY["stopped"])

    async def stop(self) -> None:
        """End the process in bounded time. What is still open ends with Unavailable."""
        self._enter("stopped")
        self._fail_open(lambda: Unavailable(_NOT_READY["stopped"]))
        self._stopping.set()
        if self._hook is not None:
            self._hook.cancel()
        if self._supervisor is not None:
            await asyncio.shield(self._supervisor)

    async def generate(self, request: Request) -> AsyncGenerator[TokenOutput, None]:
        process = self._ready_process()
        request_ids = [request.request_id, *(fork.request_id for fork in request.forks)]
        stream = OutputStream(request_ids)
        self._streams.update(dict.fromkeys(request_ids, stream))
        try:
            process.send(request)
            while outputs := await stream.take():
                for output in outputs:
                    yield output
        finally:
            for request_id in request_ids:
                del self._streams[request_id]
            if stream.running:
                process.send(Abort(sorted(stream.running)))

    def abort(self, request_id: str) -> None:
        stream = self._streams.get(request_id)
        if stream is not None and request_id in stream.running and self._process is not None:
            stream.give_up(request_id)
            self._process.send(Abort([request_id]))

    async def load_adapter(self, ref: AdapterRef, pin: bool = False) -> AdapterResult:
        return await self._call(LoadAdapter(next(self._call_ids), ref, pin))

    async def unload_adapter(self, digest: str, forget: bool = False) -> AdapterResult:
        return await self._call(UnloadAdapter(next(self._call_ids), digest, forget))

    async def _call(self, message: LoadAdapter | UnloadAdapter) -> AdapterResult:
        process = self._ready_process()
        answer: asyncio.Future[AdapterResult] = asyncio.get_running_loop().create_future()
        self._calls[message.call_id] = answer
        try:
            process.send(message)
            return await answer
        finally:
            del self._calls[message.call_id]

    def _ready_process(self) -> EngineProcess:
        if self.state != "ready" or self._process is None:
            reason = _NOT_READY.get(self.state, _NOT_READY["restarting"])
            raise Unavailable(reason, retry_after_s=self.retry_after_s)
        return self._process

    def _enter(self, state: EngineState) -> None:
        self.state = state
        if state in ("starting", "restarting"):
            self._settled.clear()
        else:
            self._settled.set()

    def _on_message(self, message: FromEngine) -> None:
        self.last_heartbeat = time.monotonic()
        if isinstance(message, StepOutputs):
            if message.stats is not None:
                self.stats = message.stats
            for output in message.outputs:
                stream = self._streams.get(output.request_id)
                if stream is not None:  # else it was aborted meanwhile
                    stream.push(output)
        elif isinstance(message, AdapterResult):
            answer = self._calls.get(message.call_id)
            if answer is not None and not answer.done():
                answer.set_result(message)
        elif isinstance(message, Ready):
            self._on_engine_ready(message.info)
        elif isinstance(message, Failed):
            self._refusal = message.message

    def _on_engine_ready(self, info: EngineInfo) -> None:
        if self._stopping.is_set():
            return
        self.info, self.failure, self._ready_at = info, None, time.monotonic()
        self._start_s = self._ready_at - self._began_at
        self._enter("ready")
        logger.info("engine process %d is ready after %.1f s", info.pid, info.load_seconds)
        if self.on_ready is not None:
            self._hook = asyncio.create_task(self._call_hook(self.on_ready, info), name="engine-on-ready")

    async def _call_hook(self, hook: OnReady, info: EngineInfo) -> None:
        try:
            pending = hook(info)
            if inspect.isawaitable(pending):
                await pending
        except Exception:  # an engine without its pinned adapters is better than none
            logger.exception("the on_ready hook failed")

    def _fail_open(self, error: Callable[[], ChorusError]) -> None:
        for stream in self._streams.values():
            stream.fail(error())
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error())

    async def _supervise(self) -> None:
        """One life of the engine after another, until `stop` or a first start that failed."""
        delay = _FIRST_DELAY_S
        while True:
            failure = await self._live()
            if self._stopping.is_set():
                return
            self.failure = failure
            if self.info is None:
                logger.error("the engine could not start: %s", failure)
                self._enter("failed")
                return
            if self._ready_at is not None and time.monotonic() - self._ready_at > _SOUND_S:
                delay = _FIRST_DELAY_S
            logger.error("the engine is gone (%s); it is started again in %.1f s", failure, delay)
            self._began_at = time.monotonic() + delay
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
                return
            delay = min(2 * delay, _LAST_DELAY_S)
            self.restarts += 1

    async def _live(self) -> str:
        """Start a process, follow it to its end, fail what it leaves open. Returns why it ended."""
        self._ready_at = self._refusal = None
        self._began_at = time.monotonic()
        process = EngineProcess(self._settings, self._factory, self._on_message)
        try:
            await process.start()
        except OSError as error:
            return f"process could not be started: {error.strerror}"
        self._process = process
        await self._follow(process)
        self._process = None
        self.stats = None
        self._began_at = time.monotonic()  # of what comes next
        if not self._stopping.is_set():
            if self.info is not None:
                self._enter("restarting")
            self._fail_open(self._died)
        return self._refusal or _describe(process.exited.result())

    def _died(self) -> EngineDied:
        message = "The engine ended while it worked on this request."
        return EngineDied(message, retry_after_s=self.retry_after_s)

    async def _follow(self, process: EngineProcess) -> None:
        """Until the process has ended; stops it when asked to, kills it when it hangs."""
        stopping = asyncio.create_task(self._stopping.wait())
        watchdog_s = self._settings.watchdog_s
        while not process.exited.done():
            await asyncio.wait(
                {process.exited, stopping}, timeout=watchdog_s, return_when=asyncio.FIRST_COMPLETED
            )
            if stopping.done():
                await process.stop()
            elif self._ready_at is not None and self.heartbeat_age > HUNG_FACTOR * watchdog_s:
                process.read()  # perhaps it was this loop that hung, and the heartbeats lie there
                if self.heartbeat_age > HUNG_FACTOR * watchdog_s:
                    logger.error("no sign of life from the engine for %.0f s", self.heartbeat_age)
                    process.kill()
        stopping.cancel()


def _describe(code: int) -> str:
    if code >= 0:
        return f"process ended with code {code}"
    with suppress(ValueError):
        return f"process was ended by {signal.Signals(-code).name}"
    return f"process was ended by signal {-code}"
