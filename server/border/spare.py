"""Where engine processes come from, so that one that died is back at once.

Most of an engine's start is reading its program: torch and transformers take ten times as long as a small
model. So a process that is about to become an engine first leaves a copy of itself (fork), which has the
program and nothing else, and waits to be the next. It shares its memory with the engine until one of them
writes there. `server.engine.worker` is the other side.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from server.border.program import program
from server.messages import Start, Waiting

logger = logging.getLogger(__name__)

_AGAIN_S = 10.0  # after this long a spare that ended by itself is replaced
_COPY_S = 5.0  # an engine has left its copy, or has not, well before this has gone by
_LARGEST = 4096  # bytes of what a process says while it waits
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class Spare:
    """A line of processes: the one that waits to become an engine, and the copy that each leaves behind.

    They share the far end of one socket, which only the one that waits reads. So the socket ends here when
    none waits any more, and a waiting process ends with the face. Use it from one event loop.
    """

    def __init__(self, factory: str, on_gone: Callable[[int | None], None]) -> None:
        """Starts the first of the line. `on_gone` gets the id of the last that waited. Raises OSError."""
        self._loop = asyncio.get_running_loop()
        self._on_gone = on_gone
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                first = subprocess.Popen(
                    program("server.engine.worker", factory),
                    stdin=theirs.fileno(),
                    start_new_session=True,  # signals to the face's process group are for the face alone
                )
        except BaseException:
            self._control.close()
            raise
        first.returncode = 0  # its end is waited for here, or by the EngineProcess that it becomes
        self._control.setblocking(False)
        self._loop.add_reader(self._control.fileno(), self._read)
        self.gone = False  # none waits, nor will
        self.pid: int | None = first.pid  # of the one that waits; None between a start and its copy
        self._settled = asyncio.Event()  # it is known who waits, or that nobody does
        self._settled.set()
        self.began_at = time.monotonic()
        self.warm_at: float | None = None  # when it had read its program

    async def begin(self, start: Start) -> int | None:
        """Make an engine of the process that waits. Returns its id; None where none waits."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), _COPY_S)
        if self.gone:
            return None
        pid, self.pid = self.pid, None
        self._settled.clear()
        if pid is not None:
            try:
                self._control.send(msgspec.json.encode(start))
            except OSError:  # it has just ended, which `_read` is about to see
                self.pid = pid
                self._end()
                return None
        return pid

    def close(self) -> None:
        """End the process that waits. Its engine has ended before, so it is a child of this process."""
        self._read()  # there may be one that has not been heard yet
        if not self.gone and self.pid is not None and _is_child(self.pid):
            os.kill(self.pid, signal.SIGKILL)
        self._end()

    def _read(self) -> None:
        if self.gone:
            return
        try:
            frame = self._control.recv(_LARGEST)
        except BlockingIOError:
            return
        except OSError:
            frame = b""
        if not frame:
            self._end()
            return
        waiting = msgspec.json.decode(frame, type=Waiting)
        if self.warm_at is None:  # the first of the line, which may have been given its Start already
            self.warm_at = time.monotonic()
        else:
            self.pid = waiting.pid
            self._settled.set()

    def _end(self) -> None:
        if not self.gone:
            self.gone = True
            self._loop.remove_reader(self._control.fileno())
            self._control.close()
            self._settled.set()
            self._on_gone(self.pid)


class Spares:
    """Keeps a spare, and makes engines of it.

    Without `keep` every engine is a process that begins with nothing. Use it from one event loop.
    """

    def __init__(self, factory: str, *, keep: bool) -> None:
        self.factory = factory
        self.keep = keep
        self._line: Spare | None = None
        self._read_s = 0.0  # what a process last took to read its program
        self._ended: set[int] = set()  # spares that may be zombies
        self._renewal: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def warm_at(self) -> float:
        """`time.monotonic()` when the line's first process had read its program; 0: not yet, or no line."""
        return self._line.warm_at or 0.0 if self._line is not None else 0.0

    @property
    def wait_s(self) -> float:
        """Seconds until a process is there that could begin to load a model, as far as is known."""
        line = self._line
        if line is not None and line.warm_at is not None:
            self._read_s = line.warm_at - line.began_at
        if line is None or line.gone:
            return self._read_s
        return 0.0 if line.warm_at is not None else max(0.0, line.began_at + self._read_s - time.monotonic())

    @property
    def pid(self) -> int | None:
        """Of the process that waits."""
        return None if self._line is None or self._line.gone else self._line.pid

    async def begin(self, start: Start) -> int:
        """Make an engine of the spare, or of a new process where there is none; its id. Raises OSError."""
        if self.keep:
            _adopt_orphans()
        pid = None if self._line is None or self._line.gone else await self._line.begin(start)
        if pid is None:
            self.discard()
            self._line = Spare(self.factory, self._on_gone)
            pid = await self._line.begin(start)
        if pid is None:
            raise OSError(errno.EPIPE, "it ended at once")
        return pid

    def engine_ended(self) -> None:
        """To be called when an engine has ended, before the next begins."""
        self._reap()

    def discard(self) -> None:
        """The next engine begins with nothing: this one's copy did not get ready, which may be its fault."""
        if self._line is not None:
            line, self._line = self._line, None
            line.close()

    def close(self) -> None:
        """End the spare, after its engine."""
        self._closed = True
        if self._renewal is not None:
            self._renewal.cancel()
        self.discard()

    def _on_gone(self, pid: int | None) -> None:
        if pid is not None:
            self._ended.add(pid)
            self._reap()
        if self.keep and not self._closed:
            self._renewal = asyncio.get_running_loop().call_later(_AGAIN_S, self._renew)

    def _reap(self) -> None:
        """Leave no zombie: one that ended beside its engine is the engine's to wait for, while that lives."""
        for pid in list(self._ended):
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
                self._ended.discard(pid)

    def _renew(self) -> None:
        if self._line is None or not self._line.gone:
            return
        logger.warning("the spare engine process has ended; a new one is started")
        try:
            self._line = Spare(self.factory, self._on_gone)
        except OSError as error:
            logger.warning("no spare engine process could be started: %s", error.strerror)
            self._renewal = asyncio.get_running_loop().call_later(_AGAIN_S, self._renew)


def _adopt_orphans() -> None:
    """Have what the engine leaves, its spare above all, become a child of this process (prctl(2), Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _is_child(pid: int) -> bool:
    """Whether it is a child that has not been waited for, so that its id is not another's by now."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
