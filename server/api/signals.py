"""The signals that end the server."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from server.api.output import say

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def handling_signals(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Inside it each signal that ends the server calls `handler`. One that is ignored (`nohup`) stays so."""
    before = {number: signal.getsignal(number) for number in _ENDING}
    taken = [number for number in _ENDING if before[number] is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def end_during_start(sig: int, frame: FrameType | None) -> None:
    """Of a server that holds nothing yet: it ends as one that was asked to and has nobody to wait for."""
    say(f"ended by {signal.Signals(sig).name} during its start")
    os._exit(0)
