import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from server.devices.cuda.copies import CudaCopies
from server.lora.copies import Copies, HostCopies
from server.lora.loader import Check, Job, Loader
from server.messages import ErrorCode
from server.peft.digest import check_digest, read_digest
from tests.lora.adapter_folder import LIMITS, TARGETS, write
from tests.lora.image import Image, packed


class Bench:
    """A loader of one thread, and a way to wait for it and to hold it."""

    def __init__(self, copies: Copies | None = None, check: Check = lambda *_: None) -> None:
        self.ended, self.go_on = threading.Semaphore(0), threading.Semaphore(0)
        self.loader = Loader(
            TARGETS,
            torch.float32,
            copies or HostCopies(),
            threads=1,
            wake=self._wake,
            limits=LIMITS,
            check=check,
        )

    def _wake(self) -> None:
        self.ended.release()
        assert self.go_on.acquire(timeout=30)

    def run(self, *jobs: Job):
        """All of them, after the first of which the thread stands still until the others are in line."""
        for job in jobs:
            self.loader.submit(job)
            if job is jobs[0]:
                assert self.ended.acquire(timeout=30)
        self.go_on.release(len(jobs))
        for _ in jobs[1:]:
            assert self.ended.acquire(timeout=30)
        return list(self.loader.finished())


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.go_on.release(10)
    bench.loader.close()


@pytest.fixture
def image(tmp_path) -> Image:
    return packed(write(tmp_path))


def bytes_of(image: Image, *sizes: int) -> tuple[torch.Tensor, ...]:
    """Its bytes in pieces; the last one is what is left of them."""
    last = image.layout.nbytes - sum(sizes)
    return torch.split(image.data.view(torch.uint8).clone(), [*sizes, last])


def test_short_jobs_go_before_long_ones(tmp_path, image, bench):
    folder, layout = str(tmp_path), image.layout
    whole, rooms = bytes_of(image), [torch.zeros_like(image.data) for _ in range(3)]
    ended = bench.run(
        Job("first", folder),
        Job("ahead", folder, layout, (torch.zeros_like(whole[0]),)),
        Job("read", folder, layout, (), False, rooms[0]),
        Job("judge", folder),
        Job("copy", folder, layout, whole, True, rooms[1]),
        Job("copy too", folder, layout, whole, True, rooms[2]),
    )
    assert [loaded.digest for loaded in ended] == ["first", "copy", "copy too", "judge", "read", "ahead"]
    assert all(torch.equal(room, image.data) for room in rooms)


def test_an_adapter_is_judged_before_there_is_room_for_it(tmp_path, image, bench):
    (loaded,) = bench.run(Job("d", str(tmp_path)))
    assert loaded.layout is not None
    assert loaded.layout.nbytes == image.layout.nbytes
    assert torch.equal(loaded.layout.offsets, image.layout.offsets)


@pytest.mark.parametrize("sizes", [(), (64,), (128, 64, 192)])
def test_an_image_is_read_into_its_pieces_and_copied_from_them(tmp_path, image, bench, sizes):
    pieces = tuple(torch.zeros_like(piece) for piece in bytes_of(image, *sizes))
    rooms = torch.zeros_like(image.data), torch.zeros_like(image.data)
    bench.run(
        Job("read", str(tmp_path), image.layout, pieces, False, rooms[0]),
        Job("copy", "/nowhere", image.layout, pieces, True, rooms[1]),
    )
    assert torch.equal(torch.cat(pieces), image.data.view(torch.uint8))
    assert torch.equal(rooms[0], image.data)
    assert torch.equal(rooms[1], image.data)


@pytest.mark.parametrize("there", [True, False])
def test_room_of_another_size_is_refused(tmp_path, image, bench, caplog, there):
    room = torch.zeros(16)
    (loaded,) = bench.run(Job("odd", str(tmp_path), image.layout, bytes_of(image), there, room))
    assert loaded.layout is None
    assert "ValueError" in loaded.message
    assert not room.any()
    assert "odd" in caplog.text


def test_a_file_that_changed_is_an_error_that_says_so(tmp_path, image, bench):
    with (tmp_path / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(image.layout.file_bytes - 1)
    (loaded,) = bench.run(Job("cut", str(tmp_path), image.layout, bytes_of(image)))
    assert loaded.layout is None
    assert loaded.message == (
        f"`adapter_model.safetensors` has {image.layout.file_bytes - 1} bytes, "
        f"it had {image.layout.file_bytes} when it was judged"
    )


class FakeCuda:
    """Streams and events that write down what they are asked for; copies run at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "stream", self._current)
        monkeypatch.setattr(torch.cuda, "Event", self._event)

    @contextmanager
    def _current(self, stream: object):
        assert stream is self
        self.calls.append("enter")
        yield
        self.calls.append("leave")

    def _event(self, blocking: bool):
        assert blocking, "the thread would spin beside the step"
        return SimpleNamespace(
            record=lambda stream: self.calls.append("record"),
            synchronize=lambda: self.calls.append("wait for the event"),
        )

    def wait_event(self, event: str) -> None:
        self.calls.append(f"after {event}")


def test_a_copy_on_cuda_waits_for_the_steps_before_it_and_is_waited_for(tmp_path, image, monkeypatch):
    cuda, room = FakeCuda(monkeypatch), torch.zeros_like(image.data)
    bench = Bench(CudaCopies(torch.device("cuda")))
    bench.run(Job("copy", str(tmp_path), image.layout, bytes_of(image, 64), True, room, after="a step"))
    bench.loader.close()
    assert torch.equal(room, image.data)
    assert cuda.calls == ["enter", "after a step", "record", "leave", "wait for the event"]


def test_files_are_hashed_once_before_they_are_read_from_disk(tmp_path, image):
    hashed = []
    bench = Bench(check=lambda folder, digest: hashed.append((folder, digest)))
    whole, room = bytes_of(image), torch.zeros_like(image.data)
    bench.run(
        Job("read", str(tmp_path), image.layout, whole),
        Job("read", str(tmp_path), image.layout, (), False, room),
        Job("copied", "/nowhere", image.layout, whole, True, room),
        Job("other", str(tmp_path), image.layout, (), False, room),
        Job("a tenant's", str(tmp_path), image.layout, (), False, room, content="content"),
    )
    bench.loader.close()
    assert sorted(hashed) == [(tmp_path, "content"), (tmp_path, "other"), (tmp_path, "read")]


def test_damaged_files_are_read_into_nothing(tmp_path, image):
    bench, room = Bench(check=check_digest), torch.zeros_like(image.data)
    (loaded,) = bench.run(Job("0" * 64, str(tmp_path), image.layout, (), False, room))
    (sound,) = bench.run(Job(read_digest(tmp_path), str(tmp_path), image.layout, (), False, room.clone()))
    bench.loader.close()
    assert (loaded.layout, loaded.error) == (None, ErrorCode.ADAPTER_DAMAGED)
    assert not room.any()
    assert sound.layout is not None
