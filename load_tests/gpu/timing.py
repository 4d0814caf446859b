"""Times of repeated work, and the copy rate that they are held against.

On a CUDA device medians of graph replays, launch gaps left out; elsewhere of calls by the clock, which only
shows that what is timed runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def device() -> str:
    """The type of the device that is measured."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def median_seconds(work: Callable[[], None], replays: int = 9) -> float:
    """Median time of one run of `work`, which is captured on CUDA."""
    if device() == "cpu":
        return statistics.median(clocked(work) for _ in range(replays))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()  # compiles, and warms the allocator
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def clocked(work: Callable[[], None]) -> float:
    """Seconds of one run by the host's clock, until the device has done it."""
    start = time.perf_counter()
    work()
    if device() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def copy_rate(nbytes: int = 4 * 2**30) -> float:
    """Bytes/s of a copy within the device's memory, counting bytes read and bytes written."""
    source = torch.randn(nbytes // 4, device=device())
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * source.nbytes / median_seconds(copy)
