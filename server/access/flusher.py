"""What is counted in memory goes to disk now and then, in a thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress


class Flusher:
    """Has `flush` called in a thread of its own, at most every `every_s` seconds; `flush` must not raise.
    Thread-safe, if calls to `when_due` are not concurrent."""

    def __init__(self, flush: Callable[[], None], every_s: float, name: str) -> None:
        self._flush = flush
        self._every_s = every_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._due = time.monotonic() + every_s

    def when_due(self) -> None:
        """To be called when there is something to flush. Never waits."""
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + self._every_s
            with suppress(RuntimeError):  # closing, which flushes by itself
                self._thread.submit(self._flush)

    def close(self) -> None:
        """Flush what is left. Idempotent."""
        self._thread.shutdown()
        self._flush()
