"""Ends a process that takes too long over one thing, with an answer."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOOK_S = 0.02


@contextmanager
def at_most(processor_s: float, answer: Callable[[], None]) -> Iterator[None]:
    """While inside, a thread looks how much time the process has taken of the processors. Beyond
    `processor_s` it calls `answer` and ends the process, whatever compiled code that is in: for code that
    lets other threads run. No thread can be stopped, a process can."""
    done = threading.Event()
    until = time.process_time() + processor_s

    def watch() -> None:
        while not done.wait(_LOOK_S):
            if time.process_time() > until:
                answer()
                os._exit(0)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
