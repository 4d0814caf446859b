"""What every part is given: its sizes, its time, where its figures go, and the engine that parts share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from load_tests.gpu.figures import Deadline, Results
from load_tests.gpu.timing import copy_rate, device
from load_tests.gpu.workload import Workload

if TYPE_CHECKING:
    from load_tests.gpu.subject import Subject  # it imports transformers, which takes seconds


@dataclass(frozen=True)
class Context:
    workload: Workload
    results: Results
    deadline: Deadline  # of the part; what does not begin before it is left out
    shared: Callable[[], Subject]  # the engine that parts share, started at its first use

    def subject(self) -> Subject:
        """The shared engine, named in the results."""
        on = self.shared()
        self.head(on)
        return on

    def head(self, on: Subject) -> None:
        """Say what is measured, on which of its paths, and how much time its start has left."""
        self.results.add(**on.about, copy_rate=self.rate)
        self.results.say(f"{on.head}; ready with {self.deadline.left:.0f} s left")

    @property
    def rate(self) -> float | None:
        """The copy rate of the device, bytes/s; None without a CUDA device, where there is no floor."""
        return _rate(self.workload.copy_bytes)


@cache
def _rate(nbytes: int) -> float | None:
    return copy_rate(nbytes) if device() == "cuda" else None
