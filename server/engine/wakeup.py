"""How a thread wakes another one that sleeps on descriptors."""

from __future__ import annotations

import contextlib
import os
import select


class Wakeup:
    """A descriptor that any thread makes readable and that one thread waits on, beside sockets (eventfd(2)).

    That one clears it before it looks for what has happened, so that nothing falls between.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """Readable from `set` to the next `clear`."""
        return self._fd

    def set(self) -> None:
        os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it was clear
            os.eventfd_read(self._fd)

    def wait(self, timeout_s: float) -> bool:
        """Sleep until it is set; False when it was not within `timeout_s`."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(1000 * timeout_s))

    def close(self) -> None:
        """Nobody may use it any more."""
        os.close(self._fd)
