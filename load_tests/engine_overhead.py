"""What one engine step costs the host beside the model: plan, batch, update, publish.

The real Worker turns around the real Scheduler, block pool and `BatchBuilder`; in the model's place stands a
list of tokens, in the arena's a gate that holds every adapter. All sequences decode, as nearly all do in
nearly every step. "publish" is all that a turn does beside the engine's step: it looks for messages, encodes
the outputs, sends them.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from load_tests.fake_engine import empty_stats, engine_info
from server.engine.worker import Worker
from server.messages import (
    AdapterRef,
    AdapterResult,
    EngineStats,
    LoadAdapter,
    Request,
    SamplingParams,
    TokenOutput,
    UnloadAdapter,
)
from server.model.batch import BatchBuilder
from server.scheduling.adapter_gate import Acquire, AcquireStatus
from server.scheduling.block_pool import BlockPool
from server.scheduling.scheduler import Scheduler
from server.scheduling.sequence import Sequence

PARTS = ("plan", "batch", "update", "publish")

_BLOCK_SIZE = 16  # tokens, as the server's default
_EOS = (2,)
_PROMPT_TOKENS = 128
_TOKEN = 7  # what the absent model says


class PartTimes(msgspec.Struct, frozen=True):
    """Microseconds a step of one part, over all steps."""

    median: float
    p99: float

    @classmethod
    def of(cls, seconds: NDArray[np.float64]) -> PartTimes:
        median, p99 = (1e6 * np.percentile(seconds, (50, 99))).tolist()
        return cls(median, p99)


class Overhead(msgspec.Struct, frozen=True):
    """Of steps with `adapters` distinct adapters among `sequences`."""

    sequences: int
    adapters: int
    steps: int
    parts: dict[str, PartTimes]  # by PARTS, and "step": all of them together


class AllResident:
    """An AdapterGate over an arena that holds every adapter there is; digests are slot numbers."""

    def prefetch(self, ref: AdapterRef) -> None:
        pass

    def acquire(self, refs: tuple[AdapterRef, ...]) -> Acquire:
        return Acquire(AcquireStatus.READY)

    def release(self, refs: tuple[AdapterRef, ...]) -> None:
        pass

    def cancel(self, refs: tuple[AdapterRef, ...]) -> None:
        pass


class _NoModelEngine:
    """An `EngineLike` of server.engine.worker whose steps are those of server.engine.engine, without a model.

    `times` gets, for each step, the seconds of planning, batching and updating.
    """

    wakeup_fd = None

    def __init__(self, scheduler: Scheduler) -> None:
        self.info = engine_info()
        self.times: list[tuple[float, float, float]] = []
        self._scheduler = scheduler
        self._batches = BatchBuilder(int, _BLOCK_SIZE, _EOS)

    def add(self, request: Request) -> None:
        order = len(self._scheduler.request_ids)
        if refusal := self._scheduler.add(Sequence(request, time.monotonic(), order)):
            raise RuntimeError(refusal.message)

    def abort(self, request_ids: Iterable[str]) -> None:
        pass  # nobody asks for it, nor for adapters

    def load_adapter(self, call: LoadAdapter) -> None:
        pass

    def unload_adapter(self, call: UnloadAdapter) -> None:
        pass

    def step(self) -> tuple[list[TokenOutput], list[AdapterResult]]:
        begun = time.perf_counter()
        plan = self._scheduler.plan()
        planned = time.perf_counter()
        self._batches.build(plan.runs)
        tokens = [[_TOKEN] * run.rows for run in plan.runs]
        built = time.perf_counter()
        outputs = self._scheduler.update(plan, tokens)
        self.times.append((planned - begun, built - planned, time.perf_counter() - built))
        return outputs, []

    def idle_ms(self) -> int | None:
        return 0

    def stats(self) -> EngineStats:
        return msgspec.structs.replace(empty_stats(), running=self._scheduler.running)


def measure(sequences: int, adapters: int, steps: int) -> Overhead:
    """Times of `steps` steps in which `sequences` sequences decode, using `adapters` adapters in turns.

    With no adapters all use the base model. Prompts differ in length, so that in every step some sequences
    start a block.
    """
    max_model_len = _PROMPT_TOKENS + _BLOCK_SIZE + steps + 2
    scheduler = Scheduler(
        BlockPool(sequences * (2 + max_model_len // _BLOCK_SIZE), _BLOCK_SIZE),
        AllResident(),
        max_num_seqs=sequences,
        max_num_batched_tokens=sequences * (_PROMPT_TOKENS + _BLOCK_SIZE),
        max_model_len=max_model_len,
        eos_token_ids=_EOS,
    )
    engine = _NoModelEngine(scheduler)
    with _sockets() as (inbox, outbox, face):
        worker = Worker(engine, inbox, outbox)
        for index in range(sequences):
            engine.add(_request(index, adapters, max_model_len))
        _turn(worker, face)  # every prompt, as a whole
        engine.times.clear()
        with _quiet_collector():
            turns = [_turn(worker, face) for _ in range(steps)]
    if scheduler.running != sequences:
        raise RuntimeError(f"{scheduler.running} of {sequences} sequences run")
    times = np.column_stack([np.array(engine.times), turns])  # [steps, 4] seconds
    times[:, 3] -= times[:, :3].sum(axis=1)  # what a turn takes beside the engine's step
    columns = {part: times[:, index] for index, part in enumerate(PARTS)} | {"step": np.array(turns)}
    parts = {part: PartTimes.of(column) for part, column in columns.items()}
    return Overhead(sequences, adapters, steps, parts)


def _request(index: int, adapters: int, max_model_len: int) -> Request:
    length = _PROMPT_TOKENS + index % _BLOCK_SIZE
    prompt = np.random.default_rng(index).integers(3, 50_000, length).tolist()
    refs = (AdapterRef(str(index % adapters), ""),) if adapters else ()
    sampling = SamplingParams(max_tokens=max_model_len, temperature=0.0, ignore_eos=True)
    return Request(f"cmpl-{index:032x}", prompt, sampling, refs)


def _turn(worker: Worker, face: zmq.Socket[bytes]) -> float:
    """Seconds of one turn of the worker; what it sent is then taken off the face's socket."""
    begun = time.perf_counter()
    worker.turn()
    seconds = time.perf_counter() - begun
    face.recv()
    return seconds


@contextmanager
def _sockets() -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes], zmq.Socket[bytes]]]:
    """The worker's inbox and outbox, and the socket on which the face would receive; as in server.engine."""
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        inbox, face = context.socket(zmq.PULL), context.socket(zmq.PULL)
        with inbox, face, context.socket(zmq.PUSH) as outbox:
            inbox.bind(f"ipc://{folder}/to-engine")
            face.bind(f"ipc://{folder}/from-engine")
            outbox.connect(f"ipc://{folder}/from-engine")
            yield inbox, outbox, face


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """As the worker does before its loop: what lives by then is not looked at by later collections."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
