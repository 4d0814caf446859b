"""What `cuda_capture` leaves behind: torch's own `torch.cuda.graph` over a device that only keeps books."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from server.devices.cuda.capture import cuda_capture
from server.model.device import NotCapturable


class Stream:
    def __init__(self) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


class Generator:
    """Torch's, on CUDA: a capture marks its state, and only one that ends well unmarks it."""

    def __init__(self, capturing: bool = False) -> None:
        self.capturing = capturing

    def clone_state(self) -> Generator:
        return Generator(self.capturing)

    def graphsafe_set_state(self, state: Generator) -> None:
        self.capturing = state.capturing


@dataclass
class Device:
    """A stand-in for the parts of `torch.cuda` that a capture touches."""

    stream: Stream = field(default_factory=Stream)
    generator: Generator = field(default_factory=Generator)
    mode: int | str = 0
    capture_of: Stream | None = None  # where a capture is under way
    invalid: bool = False  # something happened in it that may not
    ran: list[tuple[Stream, int | str, bool]] = field(default_factory=list)  # stream, mode, captured?
    streams: list[Stream] = field(default_factory=list)
    replays: int = 0

    def work(self) -> None:
        self.ran.append((self.stream, self.mode, self.capture_of is not None))

    def wait(self) -> None:
        """What `.item()` does."""
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        self.invalid = self.capture_of is not None

    def new_stream(self) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    def on(self, stream: Stream) -> OnStream:
        return OnStream(self, stream)

    def graph(self) -> Graph:
        return Graph(self)


class OnStream:
    """`torch.cuda.stream`: restores nothing unless its exit is called."""

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device, self._stream = device, stream

    def __enter__(self) -> None:
        self._before, self._device.stream = self._device.stream, self._stream

    def __exit__(self, *error: object) -> None:
        self._device.stream = self._before


class Graph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def capture_begin(self, *pool: object, **options: object) -> None:
        assert pool == ("the pool",)
        self._device.capture_of = self._device.stream
        self._device.generator.capturing = True

    def capture_end(self) -> None:
        device = self._device
        device.capture_of = None
        if device.invalid:
            raise RuntimeError("operation failed due to a previous error during capture")
        device.generator.capturing = False

    def replay(self) -> None:
        self._device.replays += 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    names: dict[str, object] = {
        "graph_pool_handle": lambda: "the pool",
        "Stream": device.new_stream,
        "current_stream": lambda: device.stream,
        "set_stream": lambda stream: setattr(device, "stream", stream),
        "stream": device.on,
        "CUDAGraph": device.graph,
        "get_sync_debug_mode": lambda: device.mode,
        "set_sync_debug_mode": lambda mode: setattr(device, "mode", mode),
        "current_device": lambda: 0,
        "default_generators": (device.generator,),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }
    for name, stands_in in names.items():
        monkeypatch.setattr(torch.cuda, name, stands_in)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    return device


def test_all_work_runs_on_one_side_stream(device: Device) -> None:
    """cuBLAS keeps a workspace for each stream that it has worked on."""
    capture, usual = cuda_capture(), device.stream
    replays = [capture(device.work) for _ in range(3)]
    assert len(device.streams) == 1
    side = device.streams[0]
    assert device.ran == 3 * [(side, "error", False), (side, 0, True)], "rehearsed, then captured"
    assert side.waited_for == 3 * [usual]
    assert usual.waited_for == 3 * [side]
    replays[0]()
    assert device.replays == 1


def unsynchronised(device: Device) -> None:
    """Waits only while it is captured, which a rehearsal cannot foresee."""
    if device.capture_of is not None:
        device.wait()


def out_of_resources(device: Device) -> None:
    class OutOfResources(Exception):
        """Triton's: no RuntimeError."""

    raise OutOfResources("shared memory, required: 131072, limit: 101376")


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (Device.wait, "RuntimeError: called a synchronizing"),
        (unsynchronised, "RuntimeError: operation failed"),
        (out_of_resources, "OutOfResources: shared memory"),
    ],
)
def test_a_failure_leaves_things_as_they_were(
    device: Device, work: Callable[[Device], None], message: str
) -> None:
    capture, usual = cuda_capture(), device.stream
    device.mode = 1  # "warn"
    with pytest.raises(NotCapturable, match=message):
        capture(lambda: work(device))
    assert device.stream is usual
    assert device.mode == 1
    assert not device.generator.capturing, "random numbers would be refused from here on"
    device.invalid = False
    capture(device.work)()
    assert device.replays == 1


def test_what_waits_is_refused_before_a_capture_begins(device: Device) -> None:
    """A capture that fails cannot be undone in full."""

    def work() -> None:
        device.work()
        device.wait()

    with pytest.raises(NotCapturable):
        cuda_capture()(work)
    assert [captured for _, _, captured in device.ran] == [False]
