"""A second stream inside a captured step: two branches of its graph, which the device runs side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """One stream for all branches; torch's current one is the other.

    Only while a graph is captured. There the order of memory is safe: what a branch reads and writes is
    allocated on the current stream before `fork`, is held until after `join`, and nobody else writes there
    meanwhile. A step that runs as it is may fail between the two, and its memory would go to others.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    @property
    def is_open(self) -> bool:
        """Whether a branch may begin here."""
        begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # no hints
        return begun and torch.cuda.is_current_stream_capturing()

    @contextmanager
    def fork(self) -> Iterator[None]:
        """What the body enqueues follows what the current stream has so far, and goes on beside the rest."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # no hints
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What the current stream gets from here on follows the branch."""
        assert self._stream is not None
        torch.cuda.current_stream().wait_stream(self._stream)
