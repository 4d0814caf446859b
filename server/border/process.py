"""The face's hold on one engine process: begins it, talks to it, watches it, stops it.

One `EngineProcess` is one life. A restart makes a new one with a new folder and new sockets, so that no
message of an old life can reach a new engine or a new request.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress

import msgspec
import zmq

from server.border.private_folder import PrivateFolder
from server.border.spare import Spares
from server.config import Settings
from server.messages import Failed, FromEngine, Ready, Shutdown, Start, ToEngine

logger = logging.getLogger(__name__)

_SHUTDOWN_S = 5.0  # after Shutdown, before SIGTERM
_TERM_S = 2.0  # after SIGTERM, before SIGKILL
_RECONNECT_MS = 10  # the child binds its inbox when it is up; until then we try to connect this often
_READ_BURST = 64  # messages read before other tasks of the loop get their turn


class EngineProcess:
    """One life of the engine process, with its sockets and their private folder.

    `on_message` is called on the event loop with each message of the engine; it must not raise. `exited`
    ends with the exit code (negative: minus the signal) within milliseconds of the process's end, when the
    sockets are closed and the folder is gone.

    Messages are read from a plain socket by `loop.add_reader` on its file descriptor, not by zmq.asyncio:
    that costs no future and no task per message. The price is that the descriptor only tells of a change,
    so a reader must go on until the socket is empty (see `read`).
    """

    def __init__(self, settings: Settings, spares: Spares, on_message: Callable[[FromEngine], None]) -> None:
        self._settings = settings
        self._spares = spares
        self._on_message = on_message
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._encoder = msgspec.msgpack.Encoder()
        self._listening = False  # it takes messages, so it can be asked to stop
        self._closed = False

    async def start(self) -> None:
        """Begin; returns when the process runs, long before it is ready. Raises OSError."""
        self._loop = asyncio.get_running_loop()
        self._folder = PrivateFolder()
        self._context = zmq.Context()
        try:
            self.pid = await self._spares.begin(self._open_sockets())
        except zmq.ZMQError as error:
            self._close()
            raise OSError(error.errno, str(error)) from error
        except BaseException:
            self._close()
            raise
        self._loop.add_reader(self._inbox.fileno(), self.read)
        self.exited = asyncio.create_task(self._watch(), name="engine-exit")

    def send(self, message: ToEngine) -> None:
        """Queue a message; never blocks. One to a process that has ended goes nowhere: see `exited`."""
        if not self._closed:
            self._outbox.send(self._encoder.encode(message), zmq.NOBLOCK)

    def read(self) -> bool:
        """Hand on what has arrived. True if there may be more, which is then read in a later turn."""
        for _ in range(_READ_BURST):
            if self._closed:
                return False
            try:
                frame = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                return False
            self._take(self._decoder.decode(frame))
        self._loop.call_soon(self.read)  # the descriptor does not tell again of what is left
        return True

    def kill(self) -> None:
        """SIGKILL, now."""
        self._signal(signal.SIGKILL)

    async def stop(self) -> int:
        """Shutdown, then SIGTERM, then SIGKILL, each after a bounded wait; returns the exit code."""
        if self._listening:
            self.send(Shutdown())
            await asyncio.wait({self.exited}, timeout=_SHUTDOWN_S)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self.exited.done():
                self._signal(number)
                await asyncio.wait({self.exited}, timeout=_TERM_S)
        return await self.exited

    def _open_sockets(self) -> Start:
        inbox, outbox = (f"ipc://{self._folder.name}/{name}" for name in ("from-engine", "to-engine"))
        self._inbox, self._outbox = self._context.socket(zmq.PULL), self._context.socket(zmq.PUSH)
        for socket in (self._inbox, self._outbox):
            socket.set_hwm(0)
        self._outbox.reconnect_ivl = _RECONNECT_MS
        self._inbox.bind(inbox)
        self._outbox.connect(outbox)
        return Start(
            settings=self._settings.model_dump(mode="json") | {"config": None},  # all of it is read already
            factory=self._spares.factory,
            inbox=outbox,
            outbox=inbox,
            parent_pid=os.getpid(),
            leave_spare=self._spares.keep,
        )

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Ready):
            self._listening = True
        elif isinstance(message, Failed):
            self.send(Shutdown())  # it waits for this, so that its reason is not lost with it
        self._on_message(message)

    def _signal(self, number: signal.Signals) -> None:
        if not self.exited.done():
            logger.info("sending %s to engine process %d", number.name, self.pid)
            os.kill(self.pid, number)

    async def _watch(self) -> int:
        await _ended(self.pid)
        code = _reap(self.pid)
        self._spares.engine_ended()
        while self.read():
            pass
        self._loop.remove_reader(self._inbox.fileno())
        self._close()
        return code

    def _close(self) -> None:
        self._closed = True
        self._context.destroy(linger=0)
        self._folder.cleanup()


async def _ended(pid: int) -> None:
    """Until a child has ended. It is a zombie then, so that its id is still its own.

    In a thread of its own, as asyncio does it for the processes that it starts itself.
    """
    loop = asyncio.get_running_loop()
    end = asyncio.Event()

    def wait() -> None:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(end.set)

    threading.Thread(target=wait, name=f"engine-{pid}", daemon=True).start()
    await end.wait()


def _reap(pid: int) -> int:
    """Take the exit code of a child that has ended. What it had started itself, a compiler say, ends too."""
    os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    threading.Thread(target=_reap_group, args=(pid,), daemon=True).start()
    return os.waitstatus_to_exitcode(status)


def _reap_group(pid: int) -> None:
    """Wait for the orphans of a group of processes, which have come to this process."""
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-pid, 0)
