"""The seam between the scheduler and adapter residency: may a sequence that needs these adapters run now?

`lora/residency.py` implements it over the arena; the scheduler's tests implement it in a few lines.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from server.messages import AdapterRef, ErrorCode


class AcquireStatus(enum.Enum):
    """Whether all adapters of a mix are in the arena."""

    READY = "ready"  # they are, and one reference to each was taken
    PENDING = "pending"  # on their way, and nothing of the mix is evicted until it is asked for again
    FULL = "full"  # no room until others release what they hold; nothing is kept for the caller
    FAILED = "failed"  # cannot be loaded; asking again does not help


@dataclass(frozen=True)
class Acquire:
    """Answer to `AdapterGate.acquire`. `error` and `message` are set for FAILED only."""

    status: AcquireStatus
    error: ErrorCode | None = None
    message: str = ""


class AdapterGate(Protocol):
    """Holds the adapters of running sequences in place. Every call returns at once.

    A sequence's calls are: `prefetch` of each adapter when it arrives; `acquire` of its whole mix, once a
    step at most, until READY; then one `release` when it ends, is preempted or lacks KV blocks to start
    (and again from `acquire` on in the last two cases). Of those who wait for the same adapters one asks for
    all, and when the last of them ends without holding them, there is one `cancel`.
    """

    @property
    def promises(self) -> Collection[frozenset[str]]:
        """Digests of each mix that was answered PENDING and not asked for again or cancelled since."""
        ...

    def prefetch(self, ref: AdapterRef) -> None:
        """A sequence that needs this adapter has arrived: start bringing it near, if there is room."""
        ...

    def acquire(self, refs: tuple[AdapterRef, ...]) -> Acquire:
        """All or nothing: only READY takes references, one to each of `refs`. Starts missing copies."""
        ...

    def release(self, refs: tuple[AdapterRef, ...]) -> None:
        """Give back what a READY `acquire` of the same `refs` took."""
        ...

    def cancel(self, refs: tuple[AdapterRef, ...]) -> None:
        """Nobody waits for `refs` any longer."""
        ...
