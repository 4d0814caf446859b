"""Worker threads that bring adapters from disk to the host and into the arena, beside the model's steps."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from server.engine.messages import ErrorCode, LoraTarget
from server.errors import ChorusError
from server.lora.pack import PackedAdapter, pack
from server.registry.peft_format import judge

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Bring a version to the host (unless `packed` is there) and into `room` (unless that is None)."""

    digest: str
    path: str
    packed: PackedAdapter | None
    room: torch.Tensor | None  # [elements] of the arena, untouched by others until the job is done
    after: torch.cuda.Event | None = None  # steps that may still read what was in the room before


@dataclass(frozen=True)
class Loaded:
    """How a job ended: with `packed`, which also lies in the job's room if it had one, or with an error."""

    digest: str
    milliseconds: float
    packed: PackedAdapter | None = None
    error: ErrorCode = ErrorCode.ADAPTER_LOAD_FAILED
    message: str = ""


class Loader:
    """Runs jobs on its threads: those with room in the arena first, then reads, each kind in order.

    `wake` is called on a worker thread after each job that ended.
    """

    def __init__(
        self,
        targets: Sequence[LoraTarget],
        dtype: torch.dtype,
        device: torch.device,
        *,
        threads: int,
        wake: Callable[[], None] | None,
        max_header_bytes: int,
        max_tensors: int,
    ) -> None:
        self._targets = targets
        self._dtype = dtype
        self._device = device
        self._wake = wake
        self._max_header_bytes = max_header_bytes
        self._max_tensors = max_tensors
        self._jobs: queue.PriorityQueue[tuple[int, int, Job | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._finished: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"adapter-loader-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        self._jobs.put((1 if job.room is None else 0, next(self._numbers), job))

    def finished(self) -> Iterator[Loaded]:
        """Take what has ended so far; never waits."""
        while True:
            try:
                yield self._finished.get_nowait()
            except queue.Empty:
                return

    def close(self) -> None:
        """Stop the threads. Jobs that have not begun are dropped."""
        for _ in self._threads:
            self._jobs.put((-1, next(self._numbers), None))
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        stream = None
        if self._device.type == "cuda":
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch has no hints here
        while (job := self._jobs.get()[2]) is not None:
            self._finished.put(self._run(job, stream))
            del job  # the room and the image it holds
            if self._wake is not None:
                self._wake()

    def _run(self, job: Job, stream: torch.cuda.Stream | None) -> Loaded:
        start = time.perf_counter()
        error = ErrorCode.ADAPTER_LOAD_FAILED
        try:
            packed = job.packed or self._read(job)
            if job.room is not None:
                _copy(job.room, packed.data, stream, job.after)
            return Loaded(job.digest, (time.perf_counter() - start) * 1e3, packed)
        except ChorusError as failure:
            message = failure.message
        except OSError as failure:  # its own text may hold a path
            message = f"the adapter's files cannot be read: {failure.strerror or type(failure).__name__}"
        except (MemoryError, torch.OutOfMemoryError):
            error, message = ErrorCode.OUT_OF_MEMORY, "no memory to load the adapter"
        except Exception as failure:  # whatever it is, somebody waits for an answer
            _log.exception("adapter %s could not be loaded", job.digest)
            message = f"the adapter could not be loaded: {type(failure).__name__}"
        return Loaded(job.digest, (time.perf_counter() - start) * 1e3, None, error, message)

    def _read(self, job: Job) -> PackedAdapter:
        folder = Path(job.path)
        adapter = judge(
            folder, self._targets, max_header_bytes=self._max_header_bytes, max_tensors=self._max_tensors
        )
        pin = self._device.type == "cuda"
        return pack(folder, adapter, len(self._targets), self._dtype, pin=pin, digest=job.digest)


def _copy(
    room: torch.Tensor,
    data: torch.Tensor,
    stream: torch.cuda.Stream | None,
    after: torch.cuda.Event | None,
) -> None:
    """Copy host to arena beside the running step; returns when the data is there."""
    if room.shape != data.shape:
        raise ValueError(f"room of {room.numel()} elements for an adapter of {data.numel()}")
    if stream is None:  # one memmove: torch's copy would start threads against those of the step
        np.copyto(room.view(torch.uint8).numpy(), data.view(torch.uint8).numpy())
        return
    with torch.cuda.stream(stream):
        if after is not None:
            stream.wait_event(after)
        room.copy_(data, non_blocking=True)
    stream.synchronize()
