"""When this process looks for garbage that counting references does not find.

Python looks through every object whenever there are a quarter more than at the last look, which is what a
rush of requests makes: a look at 150,000 objects held a process for 120 ms. Young objects are looked at as
ever, the others in a quiet moment, and those that a slow look has found alive never again.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

_NEVER = 2**31 - 1
_EVERY_S = 10.0
_LATEST_S = 300.0  # where no moment is quiet
_SLOW_S = 0.01


class Garbage:
    """For one process, which calls `look_if_due` now and then."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked_at = clock()
        young, middle, _ = gc.get_threshold()
        gc.set_threshold(young, middle, _NEVER)
        gc.freeze()  # what is there from the start stays to the end

    def look_if_due(self, *, quiet: bool) -> bool:
        """`quiet`: nobody waits for this process, or few. Returns whether it looked."""
        began = self._clock()
        if began - self._looked_at < (_EVERY_S if quiet else _LATEST_S):
            return False
        gc.collect()
        self._looked_at = self._clock()
        if self._looked_at - began > _SLOW_S:
            gc.freeze()
        return True
