"""An engine without a model, for measuring the HTTP face: it gives every request a token at each tick.

The face starts it in a process of its own by the factory `load_tests.fake_engine:create_engine`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from functools import cache

import msgspec

from server.config import Settings
from server.messages import (
    AdapterResult,
    EngineInfo,
    EngineStats,
    LoadAdapter,
    Request,
    TokenOutput,
    UnloadAdapter,
)

FACTORY = "load_tests.fake_engine:create_engine"
STEP_MS = "LOAD_TESTS_STEP_MS"  # environment: from one tick to the next; 0: no pause

_TOKENS = range(100, 1000)  # what it says, over and over: ordinary words of any vocabulary


class TickingEngine:
    """An `EngineLike` of server.engine.worker. A request gets exactly its max_tokens tokens, one a tick.

    Ticks keep to their times: one that comes late does not put off the next. So what the engine offers is
    requests / step_s tokens/s, however fast the face takes them.
    """

    wakeup_fd = None

    def __init__(self, step_s: float) -> None:
        self.info = engine_info()
        self._step_s = step_s
        self._due = 0.0  # of the next tick, time.monotonic()
        self._left: dict[str, int] = {}  # tokens owed to each running request

    def add(self, request: Request) -> None:
        if not self._left:
            self._due = time.monotonic() + self._step_s
        for choice in choices_of(request):
            self._left[choice.request_id] = choice.sampling.max_tokens

    def abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._left.pop(request_id, None)

    def load_adapter(self, call: LoadAdapter) -> None:
        raise RuntimeError("this engine has no adapters")

    def unload_adapter(self, call: UnloadAdapter) -> None:
        raise RuntimeError("this engine has no adapters")

    def step(self) -> tuple[list[TokenOutput], list[AdapterResult]]:
        if not self._left or time.monotonic() < self._due:
            return [], []
        self._due += self._step_s
        return [self._say(request_id, left) for request_id, left in list(self._left.items())], []

    def idle_ms(self) -> int | None:
        if not self._left:
            return None
        return max(0, round(1000 * (self._due - time.monotonic())))

    def stats(self) -> EngineStats:
        return msgspec.structs.replace(empty_stats(), running=len(self._left))

    def _say(self, request_id: str, left: int) -> TokenOutput:
        token = _TOKENS[left % len(_TOKENS)]
        if left > 1:
            self._left[request_id] = left - 1
            return TokenOutput(request_id, [token])
        del self._left[request_id]
        return TokenOutput(request_id, [token], finish_reason="length")


def choices_of(request: Request) -> list[Request]:
    """A request and its forks as requests of their own, for engines to which a prompt costs nothing."""
    alone = msgspec.structs.replace(request, forks=())
    return [
        alone,
        *(
            msgspec.structs.replace(
                alone,
                request_id=fork.request_id,
                sampling=msgspec.structs.replace(request.sampling, seed=fork.seed),
            )
            for fork in request.forks
        ),
    ]


def engine_info() -> EngineInfo:
    """Of an engine that has no model and sets no limit."""
    return EngineInfo(
        pid=os.getpid(), model_type="none", device="none", dtype="float32", vocab_size=10**6,
        max_model_len=10**6, parameters=0, weights_bytes=0,
        block_size=16, kv_blocks=10**9, kv_bytes=0, arena_bytes=0, lora_targets=[], load_seconds=0.0,
    )  # fmt: skip


@cache
def empty_stats() -> EngineStats:
    """Of an engine that holds nothing: every figure 0 or empty, whatever figures there are."""
    zeros = {int: 0, float: 0.0}
    fields = msgspec.structs.fields(EngineStats)
    return msgspec.convert({field.name: zeros.get(field.type, ()) for field in fields}, EngineStats)


def create_engine(settings: Settings) -> TickingEngine:
    """The factory. Leaves the cores of the face, which started this process, to the face."""
    others = set(range(os.cpu_count() or 1)) - os.sched_getaffinity(os.getppid())
    if others:
        for thread in os.listdir("/proc/self/task"):  # ZeroMQ's as well, which are there already
            os.sched_setaffinity(int(thread), others)
    return TickingEngine(float(os.environ[STEP_MS]) / 1000)
