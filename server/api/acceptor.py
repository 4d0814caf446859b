"""Takes the connections that wait at a listening socket: a few in each turn of the event loop."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

logger = logging.getLogger(__name__)

_TAKEN_AT_ONCE = 16  # connections, in one turn of the loop
_PAUSE_S = 1.0  # when the process or the machine has no descriptor or memory for another


class Acceptor:
    """What `loop.create_server` gives, as far as the end of a server needs it, but for two thousand at once.

    The servers of asyncio and of libuv take all that wait in the turn in which they find out, and hold up
    everybody for as long. Here the rest stays with the kernel until the next turn.
    """

    def __init__(
        self,
        listener: socket.socket,
        new_protocol: Callable[[], asyncio.BaseProtocol],
        *,
        tls: Callable[[], ssl.SSLContext | None] = lambda: None,
        handshake_s: float | None = None,
    ) -> None:
        """Begins at once. `tls` is asked for each connection, as certificates are renewed; `handshake_s`: how
        long a client may take to agree on it."""
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._new_protocol = new_protocol
        self._tls = tls
        self._handshake_s = handshake_s
        self._opening: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._begin()

    def close(self) -> None:
        """Take no more; who has not agreed on TLS by now is cut."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for task in self._opening:
            task.cancel()

    async def wait_closed(self) -> None:
        """Until nothing of what was begun goes on."""
        await asyncio.gather(*self._opening, return_exceptions=True)

    def _begin(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._take)

    def _take(self) -> None:
        for _ in range(_TAKEN_AT_ONCE):
            try:
                taken, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue  # it has gone already
            except OSError as error:
                logger.error("no connection can be taken for %g seconds: %s", _PAUSE_S, error.strerror)
                self._loop.remove_reader(self._listener)
                self._pause = self._loop.call_later(_PAUSE_S, self._begin)
                return
            task = self._loop.create_task(self._open(taken), name="open a connection")
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, taken: socket.socket) -> None:
        try:
            taken.setblocking(False)
            tls = self._tls()
            handshake_s = self._handshake_s if tls is not None else None
            with suppress(OSError):  # by which a client's TLS fails, or the client has gone
                await self._loop.connect_accepted_socket(
                    self._new_protocol, taken, ssl=tls, ssl_handshake_timeout=handshake_s
                )
        except BaseException:
            taken.close()
            raise
