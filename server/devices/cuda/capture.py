"""Captures work on the current CUDA device, so that its kernels are one launch from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from server.model.device import NotCapturable

Work = Callable[[], None]
Capture = Callable[[Work], Work]  # work -> its replay; raises NotCapturable


def cuda_capture() -> Capture:
    """Captures on the current device: all graphs in one pool of memory, all work on one side stream.

    One stream, because cuBLAS keeps a workspace for each that it has worked on.
    """
    pool = torch.cuda.graph_pool_handle()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # no hints

    def capture(work: Work) -> Work:
        with _undone_on_failure():
            _rehearse(work, side)
            graph = torch.cuda.CUDAGraph()
            # The thread that loads adapters may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                work()
        return graph.replay

    return capture


def _rehearse(work: Work, side: torch.cuda.Stream) -> None:
    """Compile kernels and make workspaces, which a capture may not. Raises where work waits for the device.

    A capture would refuse that too, but one that fails leaves the allocator in a state that is not undone.
    """
    current, mode = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
    side.wait_stream(current)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            work()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    current.wait_stream(side)


@contextmanager
def _undone_on_failure() -> Iterator[None]:
    """Turns any failure into NotCapturable; then the current stream and torch's random numbers are as before.

    `torch.cuda.graph` leaves both to the capture when ending that raises (torch/cuda/graphs.py, and before
    2.13 the generator's one state stays marked as captured).
    """
    stream, generator = (
        torch.cuda.current_stream(),
        torch.cuda.default_generators[torch.cuda.current_device()],
    )
    state = generator.clone_state()
    try:
        yield
    except Exception as reason:  # Triton's OutOfResources is no RuntimeError
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(state)
        raise NotCapturable(f"{type(reason).__name__}: {reason}") from reason
