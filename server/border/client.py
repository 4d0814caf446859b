"""The async face of the engine that the API uses, and its implementation over an engine process."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Literal, Protocol

from server.border.open_calls import OpenCalls
from server.border.process import EngineProcess
from server.border.spare import Spares
from server.config import Settings
from server.errors import EngineDied, Unavailable
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
OnReady = Callable[[tuple[str, ...]], Awaitable[None] | None]

_FIRST_DELAY_S, _LAST_DELAY_S = 0.1, 10.0  # before a restart; doubles with each that did not get ready
RESTORE_S = 60.0  # how long an engine that could serve waits for its hook, where a disk hangs

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
    """Called each time an engine has loaded, to bring adapters back before `state` says ready; with the
    digests that were in the arena when the engine before it ended, most recently used last.

    It may call `load_adapter`. `state` waits for it, a minute at most, but not for what it raises.
    """

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

        What a start is known to take, less what has gone by of the one that is under way.
        """
        ...

    def configure(self, settings: Settings) -> None:
        """Go by these from now on; an engine process that runs keeps those that it began with."""
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
        self._spares = Spares(factory, keep=settings.spare_engine)
        self._process: EngineProcess | None = None
        self._began_at = time.monotonic()  # the present start
        self._load_s = 0.0  # how long the last start took a process that had read its program
        self._due_at = time.monotonic()  # when the present start, or the next, is likely to be done
        self._loaded = False  # the present process takes adapter calls
        self._served = False  # it has been ready
        self._restores = True  # adapters are brought back when the next one has loaded
        self._refusal: str | None = None  # its reason, when it could not load
        self._resident: tuple[str, ...] = ()  # adapters that the last engine ended with
        self._open_calls = OpenCalls()
        self._supervisor: asyncio.Task[None] | None = None
        self._opening: asyncio.Task[None] | None = None
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
        return max(1, math.ceil(self._due_in_s()))

    def _due_in_s(self) -> float:
        if self.state != "ready":
            return self._due_at - time.monotonic()
        if self.healthy:
            return self._restart_s()
        # It may go on at any time: as likely as not within as long again. If not, it is killed.
        until_killed = max(0.0, HUNG_FACTOR * self._settings.watchdog_s - self.heartbeat_age)
        return min(self.heartbeat_age, until_killed + self._restart_s())

    def _restart_s(self) -> float:
        return _FIRST_DELAY_S + self._spares.wait_s + self._load_s

    def configure(self, settings: Settings) -> None:
        self._settings = settings

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
        self._open_calls.fail(lambda: Unavailable(_NOT_READY["stopped"]))
        self._stopping.set()
        if self._hook is not None:
            self._hook.cancel()
        if self._supervisor is not None:
            await asyncio.shield(self._supervisor)

    async def generate(self, request: Request) -> AsyncGenerator[TokenOutput, None]:
        process = self._ready_process()
        request_ids = [request.request_id, *(fork.request_id for fork in request.forks)]
        with self._open_calls.stream(request_ids) as stream:
            try:
                process.send(request)
                while outputs := await stream.take():
                    for output in outputs:
                        yield output
            finally:
                if stream.running:
                    process.send(Abort(sorted(stream.running)))

    def abort(self, request_id: str) -> None:
        if self._open_calls.give_up(request_id) and self._process is not None:
            self._process.send(Abort([request_id]))

    async def load_adapter(self, ref: AdapterRef, pin: bool = False) -> AdapterResult:
        process = self._loaded_process()
        with self._open_calls.call() as (call_id, answer):
            process.send(LoadAdapter(call_id, ref, pin))
            return await answer

    async def unload_adapter(self, digest: str, forget: bool = False) -> AdapterResult:
        process = self._loaded_process()
        with self._open_calls.call() as (call_id, answer):
            process.send(UnloadAdapter(call_id, digest, forget))
            return await answer

    def _ready_process(self) -> EngineProcess:
        """The one that takes requests. Raises Unavailable."""
        if self.state != "ready":
            raise self._unavailable(_NOT_READY[self.state])
        return self._loaded_process()

    def _loaded_process(self) -> EngineProcess:
        """The one that takes adapter calls, if not requests yet. Raises Unavailable."""
        if not self._loaded or self._process is None:
            raise self._unavailable(_NOT_READY.get(self.state, _NOT_READY["restarting"]))
        if self.heartbeat_age > self._settings.watchdog_s:
            raise self._unavailable("The engine does not answer at present.")
        return self._process

    def _unavailable(self, reason: str) -> Unavailable:
        return Unavailable(reason, retry_after_s=self.retry_after_s)

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
            self._open_calls.push(message.outputs)
        elif isinstance(message, AdapterResult):
            self._open_calls.answer(message)
        elif isinstance(message, Ready):
            self._on_loaded(message.info)
        elif isinstance(message, Failed):
            self._refusal = message.message

    def _on_loaded(self, info: EngineInfo) -> None:
        if not self._stopping.is_set():
            self.info, self._loaded = info, True
            self._opening = asyncio.create_task(self._open(info), name="engine-opening")

    async def _open(self, info: EngineInfo) -> None:
        """Bring adapters back, as far as the hook takes it upon itself; then be ready."""
        if self.on_ready is not None and self._restores:
            self._restores = False  # for the next engine, should this one not survive it
            self._hook = asyncio.create_task(self._call_hook(self.on_ready), name="engine-on-ready")
            await asyncio.wait({self._hook}, timeout=RESTORE_S)
        if self._stopping.is_set() or not self._loaded or self.info is not info:
            return
        self.failure, self._restores, self._served = None, True, True
        self._load_s = time.monotonic() - max(self._began_at, self._spares.warm_at)
        self._enter("ready")
        logger.info("engine process %d is ready after %.1f s", info.pid, time.monotonic() - self._began_at)

    async def _call_hook(self, hook: OnReady) -> None:
        try:
            pending = hook(self._resident)
            if inspect.isawaitable(pending):
                await pending
        except EngineDied:
            logger.warning("the engine ended while adapters were brought back")
        except Exception:  # an engine without its adapters is better than none
            logger.exception("the on_ready hook failed")

    async def _supervise(self) -> None:
        try:
            await self._lives()
        finally:
            self._spares.close()

    async def _lives(self) -> None:
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
            if self._served:
                delay = _FIRST_DELAY_S
            logger.error("the engine is gone (%s); it is started again in %.1f s", failure, delay)
            self._due_at = time.monotonic() + delay + self._spares.wait_s + self._load_s
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
                return
            delay = min(2 * delay, _LAST_DELAY_S)
            self.restarts += 1

    async def _live(self) -> str:
        """Begin a process, follow it to its end, fail what it leaves open. Returns why it ended."""
        self._refusal, self._served = None, False
        self._began_at = time.monotonic()
        process = EngineProcess(self._settings, self._spares, self._on_message)
        try:
            await process.start()
        except OSError as error:
            return f"process could not be started: {error.strerror}"
        self._due_at = time.monotonic() + self._spares.wait_s + self._load_s
        self._process = process
        await self._follow(process)
        self._clear()
        return self._refusal or _describe(process.exited.result())

    def _clear(self) -> None:
        """The process has ended."""
        if not self._loaded:
            self._spares.discard()  # it may be the spare's fault
        if self._served and self.stats is not None:
            self._resident = self.stats.resident
        self._process = self.stats = None
        self._loaded = False
        self._due_at = time.monotonic() + self._restart_s()
        if not self._stopping.is_set():
            if self.info is not None:
                self._enter("restarting")
            self._open_calls.fail(self._died)

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
            elif self._loaded and self.heartbeat_age > HUNG_FACTOR * watchdog_s:
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
