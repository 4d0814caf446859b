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

import torch

from server.config import Limits
from server.errors import ChorusError, DamagedAdapter
from server.lora.copies import Copies, Lane, Mark, Pieces, move, parts_of
from server.lora.layout import Layout
from server.lora.pack import pack
from server.messages import ErrorCode, LoraTarget
from server.peft.digest import check_digest
from server.peft.format import judge

Check = Callable[[Path, str], None]  # of a folder and its digest; raises DamagedAdapter, OSError

_MOST_CHECKED = 100_000  # versions remembered, some 15 MB

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Judge a version that has no `layout`; read one that is not `packed`; copy it where there is `room`."""

    digest: str
    path: str
    layout: Layout | None = None
    pieces: Pieces = ()  # its room on the host, untouched by others until the job is done; none: not kept
    packed: bool = False  # the image is there already
    room: torch.Tensor | None = None  # [elements] of the arena, untouched by others until the job is done
    after: Mark | None = None  # steps that may still read what was in `room` before
    content: str = ""  # what its files are compared with, where that is not `digest`

    @property
    def turn(self) -> int:
        """Smaller comes first: short jobs before long ones, reads ahead of need last."""
        if self.layout is None:
            return 1
        if self.room is None:
            return 3
        return 0 if self.packed else 2


@dataclass(frozen=True)
class Loaded:
    """How a job ended: with its layout when all was done that it asked for, or with an error."""

    digest: str
    milliseconds: float
    layout: Layout | None = None
    error: ErrorCode = ErrorCode.ADAPTER_LOAD_FAILED
    message: str = ""


class Loader:
    """Runs jobs on its threads, by their `turn` and each kind in order.

    Files are compared with their digest (`check`) when they are read for the first time. `wake` is called on
    a worker thread after each job that ended.
    """

    def __init__(
        self,
        targets: Sequence[LoraTarget],
        dtype: torch.dtype,
        copies: Copies,
        *,
        threads: int,
        wake: Callable[[], None] | None,
        limits: Limits,
        check: Check = check_digest,
    ) -> None:
        self._check = check
        self._checked: dict[str, None] = {}  # digests, in the order in which their files were hashed
        self._targets = targets
        self._dtype = dtype
        self._copies = copies
        self._wake = wake
        self._limits = limits
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
        self._jobs.put((job.turn, next(self._numbers), job))

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
        lane = self._copies.lane()
        while (job := self._jobs.get()[2]) is not None:
            self._finished.put(self._run(job, lane))
            del job  # the room that it holds
            if self._wake is not None:
                self._wake()

    def _run(self, job: Job, lane: Lane) -> Loaded:
        start = time.perf_counter()
        error = ErrorCode.ADAPTER_LOAD_FAILED
        try:
            if job.layout is None:
                layout = self._judge(job)
            else:
                layout = job.layout
                self._load(job, layout, lane)
            return Loaded(job.digest, (time.perf_counter() - start) * 1e3, layout)
        except DamagedAdapter as failure:
            error, message = ErrorCode.ADAPTER_DAMAGED, failure.message
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

    def _judge(self, job: Job) -> Layout:
        adapter = judge(Path(job.path), self._targets, self._limits)
        return Layout.of(adapter, self._targets, self._dtype)

    def _load(self, job: Job, layout: Layout, lane: Lane) -> None:
        """Disk to host, unless that is done, and host to arena, if there is room."""
        image = job.pieces
        if not job.packed:
            self._check_once(job)
            whole = image[0] if len(image) == 1 else lane.staging(layout.nbytes)
            pack(Path(job.path), layout, whole.view(layout.dtype))
            for part, piece in parts_of(whole, image) if len(image) > 1 else ():
                move(part, piece)
            image = (whole,)
        if job.room is not None:
            lane.copy(image, job.room, job.after)

    def _check_once(self, job: Job) -> None:
        """Hashing also brings the files into the page cache, from which they are packed."""
        if job.digest in self._checked:
            return
        self._check(Path(job.path), job.content or job.digest)
        self._checked[job.digest] = None
        if len(self._checked) > _MOST_CHECKED:
            self._checked.pop(next(iter(self._checked)), None)
