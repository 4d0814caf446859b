"""Times on a CUDA device: medians of graph replays, and the copy rate that they are held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def median_seconds(work: Callable[[], None], replays: int = 9) -> float:
    """Median time of one captured run of `work`, launch gaps left out."""
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


def copy_rate(gibibytes: int = 4) -> float:
    """Bytes/s of a device-to-device copy, counting bytes read and bytes written."""
    source = torch.randn(gibibytes * 2**28, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * source.nbytes / median_seconds(copy)
