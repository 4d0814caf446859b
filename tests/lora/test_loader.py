import threading

import torch

from server.lora.loader import Job, Loader
from server.lora.pack import pack
from server.registry.peft_format import judge
from tests.lora.adapter_folder import TARGETS, write


def test_copies_into_the_arena_go_before_reads(tmp_path):
    folder = str(write(tmp_path))
    packed = pack(tmp_path, judge(tmp_path, TARGETS), len(TARGETS), torch.float32)
    room = torch.empty_like(packed.data)
    ended, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def wake() -> None:
        ended.release()
        assert go_on.acquire(timeout=30)

    loader = Loader(
        TARGETS,
        torch.float32,
        torch.device("cpu"),
        threads=1,
        wake=wake,
        max_header_bytes=1 << 20,
        max_tensors=100,
    )
    loader.submit(Job("first", folder, None, None))
    assert ended.acquire(timeout=30)  # its worker stands still until `go_on`
    loader.submit(Job("read", folder, None, None))
    loader.submit(Job("copy", folder, packed, room))
    for _ in range(3):
        go_on.release()
    assert ended.acquire(timeout=30)
    assert ended.acquire(timeout=30)
    assert [loaded.digest for loaded in loader.finished()] == ["first", "copy", "read"]
    assert torch.equal(room, packed.data)
    loader.close()


def test_room_of_another_size_is_refused(tmp_path, caplog):
    folder = str(write(tmp_path))
    ended = threading.Semaphore(0)
    loader = Loader(
        TARGETS,
        torch.float32,
        torch.device("cpu"),
        threads=1,
        wake=ended.release,
        max_header_bytes=1 << 20,
        max_tensors=100,
    )
    room = torch.zeros(16)
    loader.submit(Job("odd", folder, None, room))
    assert ended.acquire(timeout=30)
    (loaded,) = loader.finished()
    assert loaded.packed is None
    assert "ValueError" in loaded.message
    assert not room.any()
    assert "odd" in caplog.text
    loader.close()
