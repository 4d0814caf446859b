"""The engine process: receive, step, publish.

`server.border.spare` starts it; nothing else does. The engine itself comes from a dotted factory name, so
that this module never imports torch.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import NoReturn, Protocol

import msgspec
import zmq

from server.config import Settings
from server.errors import ChorusError
from server.garbage import Garbage
from server.log import configure
from server.messages import (
    Abort,
    AdapterResult,
    EngineInfo,
    EngineStats,
    ErrorCode,
    Failed,
    FromEngine,
    LoadAdapter,
    Ready,
    Request,
    Shutdown,
    Start,
    StepOutputs,
    ToEngine,
    TokenOutput,
    UnloadAdapter,
    Waiting,
)

logger = logging.getLogger(__name__)

EXIT_STOPPED = 0
EXIT_START_FAILED = 1
EXIT_STEP_FAILED = 70  # EX_SOFTWARE of sysexits.h

_HEARTBEAT_S = 0.5  # stats of an idle engine
_STATS_S = 0.05  # stats of a busy one, at most this often
_LINGER_MS = 1000  # how long the last messages may take to leave before the process ends
_LARGEST_START = 2**20  # bytes
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class EngineLike(Protocol):
    """What the worker asks of an engine. One thread calls it; no method but `step` may take long."""

    @property
    def info(self) -> EngineInfo: ...

    def add(self, request: Request) -> None: ...

    def abort(self, request_ids: Iterable[str]) -> None: ...

    def load_adapter(self, call: LoadAdapter) -> None: ...

    def unload_adapter(self, call: UnloadAdapter) -> None: ...

    def step(self) -> tuple[list[TokenOutput], list[AdapterResult]]: ...

    def idle_ms(self) -> int | None:
        """0: call `step` now; n: nothing can run, look again after n ms; None: idle until a message."""
        ...

    @property
    def wakeup_fd(self) -> int | None:
        """A descriptor that is readable when there is something for `step` to take in, however idle it was;
        `step` clears it. None: only messages and time bring work."""
        ...

    def stats(self) -> EngineStats: ...


class Worker:
    """Joins an engine to the two sockets. Sends never block: neither queue has a high-water mark."""

    def __init__(self, engine: EngineLike, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]) -> None:
        self._engine = engine
        self._inbox = inbox
        self._outbox = outbox
        self._arrivals = zmq.Poller()
        self._arrivals.register(inbox, zmq.POLLIN)
        if engine.wakeup_fd is not None:
            self._arrivals.register(engine.wakeup_fd, zmq.POLLIN)
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._encoder = msgspec.msgpack.Encoder()
        self._refusals: list[TokenOutput] = []  # published with the next step
        self._failed_calls: list[AdapterResult] = []
        self._stats_at = 0.0  # time.monotonic() when stats were last sent
        self._stats_stale = True  # a step ran since stats were sent

    def turn(self) -> bool:
        """Take what has arrived, run one step, publish. False once Shutdown came.

        Whatever escapes the engine's `step` escapes here.
        """
        idle_ms = self._engine.idle_ms()
        woken = idle_ms != 0 and self._wait(idle_ms)
        received = 0
        while (frame := self._receive()) is not None:
            received += 1
            if not self._handle(frame):
                return False
        outputs, results = self._refusals, self._failed_calls
        self._refusals, self._failed_calls = [], []
        if received or woken or idle_ms is not None:
            made, answered = self._engine.step()
            outputs, results = outputs + made, results + answered
            self._stats_stale = True
        self._publish(outputs, results)
        return True

    def send(self, message: FromEngine) -> None:
        self._outbox.send(self._encoder.encode(message), zmq.NOBLOCK)

    def _stats_due(self) -> float:
        return self._stats_at + (_STATS_S if self._stats_stale else _HEARTBEAT_S)

    def _wait(self, idle_ms: int | None) -> bool:
        """Sleep until a message, the engine, the next heartbeat or the engine's own time comes; True when it
        was one of the first two."""
        due_ms = max(0, math.ceil(1000 * (self._stats_due() - time.monotonic())))
        return bool(self._arrivals.poll(due_ms if idle_ms is None else min(idle_ms, due_ms)))

    def _receive(self) -> bytes | None:
        try:
            frame: bytes = self._inbox.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return frame

    def _handle(self, frame: bytes) -> bool:
        try:
            message = self._decoder.decode(frame)
        except msgspec.ValidationError as error:
            self._refuse_malformed(frame, error)
            return True
        match message:
            case Request():
                self._add(message)
            case Abort():
                self._engine.abort(message.request_ids)
            case LoadAdapter() | UnloadAdapter():
                self._call(message)
            case Shutdown():
                return False
        return True

    def _add(self, request: Request) -> None:
        """A request that the engine cannot even take fails alone."""
        try:
            self._engine.add(request)
        except Exception as error:
            logger.exception("request %s could not be added", request.request_id)
            self._refuse(request.request_id, error)

    def _call(self, call: LoadAdapter | UnloadAdapter) -> None:
        try:
            if isinstance(call, LoadAdapter):
                self._engine.load_adapter(call)
            else:
                self._engine.unload_adapter(call)
        except Exception as error:
            logger.exception("adapter call %d failed", call.call_id)
            self._failed_calls.append(
                AdapterResult(call.call_id, "disk", error=ErrorCode.INTERNAL, message=_public(error))
            )

    def _refuse(self, request_id: str, error: Exception) -> None:
        self._refusals.append(
            TokenOutput(request_id, [], "error", error=ErrorCode.INTERNAL, message=_public(error))
        )

    def _refuse_malformed(self, frame: bytes, error: msgspec.ValidationError) -> None:
        """msgspec checks types in decoding only, so a slip of the face shows here: it ends one request."""
        fields = msgspec.msgpack.decode(frame)
        if not isinstance(fields, dict) or "request_id" not in fields:
            raise error
        logger.error("request %s is malformed: %s", fields["request_id"], error)
        self._refuse(str(fields["request_id"]), error)

    def _publish(self, outputs: list[TokenOutput], results: list[AdapterResult]) -> None:
        """Answers come after stats that show what they say: a caller with its answer can read there on."""
        now = time.monotonic()
        stats = None
        if results or now >= self._stats_due():
            stats = self._engine.stats()
            self._stats_at, self._stats_stale = now, False
        if outputs or stats is not None:
            self.send(StepOutputs(outputs, stats))
        for result in results:
            self.send(result)


def main(factory: str) -> NoReturn:
    """Wait for a `Start` on standard input, a socket, then serve and end the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for the face, which then tells us
    _end_with_parent()
    control = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # the socket must end with those who wait for it
    _read_program(factory)
    start = _take_start(control)
    _end_with_parent()
    if os.getppid() != start.parent_pid:  # it ended before the call above
        os._exit(EXIT_STOPPED)
    code = _serve(start)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a copy thread or a device library's exit hook must not be able to hold the process.
    os._exit(code)


def _read_program(factory: str) -> None:
    """Import the engine. What fails here fails again in `_run`, which can say so."""
    gc.disable()  # nothing that is imported is garbage
    with suppress(Exception):
        importlib.import_module(factory.partition(":")[0])
    gc.freeze()  # a collection would write to every object, and so part the memory of engine and spare


def _prepare(start: Start) -> None:
    """Do what the engine's module can do before a fork, once for this process and its copies."""
    with suppress(Exception):  # as above
        prepare = getattr(importlib.import_module(start.factory.partition(":")[0]), "prepare", None)
        if prepare is not None:
            prepare(Settings(**start.settings))
    gc.freeze()


def _take_start(control: socket.socket) -> Start:
    """Wait until this process is to be an engine. A copy of it goes on waiting, if one is wanted.

    Forks before the process has a thread, a device or anything else that a copy must not share.
    """
    while True:
        control.send(msgspec.json.encode(Waiting(os.getpid())))
        frame = control.recv(_LARGEST_START)
        if not frame:  # the face has ended, or wants no spare any more
            os._exit(EXIT_STOPPED)
        start = msgspec.json.decode(frame, type=Start)
        _prepare(start)
        spare = os.fork() if start.leave_spare else None
        if spare != 0:
            break
        os.setsid()  # what ends the engine's group of processes is not meant for its spare
    control.close()
    gc.enable()
    if spare is not None:
        _leave_no_zombie(spare)
    return start


def _leave_no_zombie(child: int) -> None:
    """Have this child waited for when it ends; others are the affair of who starts them."""

    def wait(*_: object) -> None:
        with suppress(ChildProcessError):
            os.waitpid(child, os.WNOHANG)

    signal.signal(signal.SIGCHLD, wait)
    wait()  # it may have ended before


def _serve(start: Start) -> int:
    """Open the sockets and run an engine on them. Returns the exit code."""
    with zmq.Context() as context:
        # The receiver binds and the sender connects: a PUSH that connected can always send.
        inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        for socket in (inbox, outbox):
            socket.set_hwm(0)
            socket.linger = _LINGER_MS
        inbox.bind(start.inbox)
        outbox.connect(start.outbox)
        with inbox, outbox:
            return _run(start, inbox, outbox)


def _run(start: Start, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]) -> int:
    try:
        settings = Settings(**start.settings)
        configure(settings.log_level, settings.log_format)
        module, _, name = start.factory.partition(":")
        engine: EngineLike = getattr(importlib.import_module(module), name)(settings)
        worker = Worker(engine, inbox, outbox)
        worker.send(Ready(engine.info))
    except Exception as error:
        logger.exception("the engine could not start")
        outbox.send(msgspec.msgpack.encode(Failed(_public(error))))
        inbox.poll(_LINGER_MS)  # the face answers with Shutdown when it has the reason
        return EXIT_START_FAILED
    gc.collect()
    garbage = Garbage()  # the model's and the libraries' objects stay
    try:
        while worker.turn():
            garbage.look_if_due(quiet=engine.idle_ms() is None)
            if os.getppid() != start.parent_pid:  # where PR_SET_PDEATHSIG is not to be had
                break
    except Exception:
        logger.exception("the engine failed; this process ends with code %d", EXIT_STEP_FAILED)
        return EXIT_STEP_FAILED
    return EXIT_STOPPED


def _end_with_parent() -> None:
    """Have the kernel kill this process when its parent, the face, ends (prctl(2), Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _public(error: Exception) -> str:
    """The text of an error as the face may log it; only a ChorusError's is fit for a client."""
    return error.message if isinstance(error, ChorusError) else f"{type(error).__name__}: {error}"
