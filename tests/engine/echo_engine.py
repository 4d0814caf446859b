"""An engine without a model, for the process border: it says the prompt over and over, a token a step.

Some first tokens of a prompt have a meaning (below), what was aborted is told in
`EngineStats.waiting_digests` and which processes have prepared in `running_digests`, so that a test sees
both sides of the border from the face's side.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from load_tests.fake_engine import choices_of
from server.config import Settings
from server.errors import InvalidRequest
from server.messages import (
    AdapterResult,
    EngineInfo,
    EngineStats,
    ErrorCode,
    LoadAdapter,
    Request,
    TokenOutput,
    UnloadAdapter,
)

REFUSE = 13  # add() raises
CRASH = 666  # step() raises
HANG = 999  # add() does not return

PREPARED: list[str] = []  # ids of processes, this one's or those that it is a copy of
COPY_S = 0.01  # how long an adapter is on its way


@dataclass
class EchoEngine:
    step_s: float = 0.0  # sleep in each step that makes tokens
    made: dict[str, int] = field(default_factory=dict)  # tokens so far of each running request
    requests: dict[str, Request] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    resident: list[str] = field(default_factory=list)
    copies: list[tuple[float, LoadAdapter]] = field(default_factory=list)  # (done at, call)
    results: list[AdapterResult] = field(default_factory=list)
    steps: int = 0
    generated: int = 0
    wakeup_fd: int | None = None

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            pid=os.getpid(), model_type="echo", device="none", dtype="float32", vocab_size=1000,
            max_model_len=10**6, parameters=0, weights_bytes=0,
            block_size=16, kv_blocks=0, kv_bytes=0, arena_bytes=0, lora_targets=[], load_seconds=0.0,
        )  # fmt: skip

    def add(self, request: Request) -> None:
        if request.prompt_token_ids[0] == REFUSE:
            raise InvalidRequest("token 13 is refused")
        if request.prompt_token_ids[0] == HANG:
            time.sleep(3600)
        for choice in choices_of(request):
            self.requests[choice.request_id] = choice
            self.made[choice.request_id] = 0

    def abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if self.requests.pop(request_id, None) is not None:
                self.aborted.append(request_id)

    def load_adapter(self, call: LoadAdapter) -> None:
        if call.adapter.digest == "broken":
            raise RuntimeError("broken adapter")
        if call.adapter.digest == "deadly":
            os._exit(4)
        if call.adapter.digest == "never":
            return
        self.copies.append((time.monotonic() + COPY_S, call))

    def unload_adapter(self, call: UnloadAdapter) -> None:
        self.resident.remove(call.digest)
        self.results.append(AdapterResult(call.call_id, "disk" if call.forget else "host"))

    def step(self) -> tuple[list[TokenOutput], list[AdapterResult]]:
        self.steps += 1
        if self.requests and self.step_s:
            time.sleep(self.step_s)
        outputs = [self._say(request) for request in list(self.requests.values())]
        self._land_copies()
        results, self.results = self.results, []
        return outputs, results

    def idle_ms(self) -> int | None:
        if self.requests or self.results:
            return 0
        if self.copies:
            return max(1, round(1000 * (self.copies[0][0] - time.monotonic())))
        return None

    def stats(self) -> EngineStats:
        return EngineStats(
            steps=self.steps, running=len(self.requests), waiting=0, waiting_for_adapter=len(self.copies),
            kv_blocks_total=0, kv_blocks_free=0, kv_blocks_cached=0, arena_bytes_total=0, arena_bytes_used=0,
            host_bytes_used=0, resident=tuple(self.resident), on_host=(), preemptions=0, adapter_loads=0,
            adapter_evictions=0, prompt_tokens=0, cached_prompt_tokens=0, generated_tokens=self.generated,
            waiting_digests=tuple(self.aborted), running_digests=tuple(PREPARED),
        )  # fmt: skip

    def _say(self, request: Request) -> TokenOutput:
        prompt = request.prompt_token_ids
        if prompt[0] == CRASH:
            raise RuntimeError("told to crash")
        made = self.made[request.request_id]
        self.made[request.request_id] = made + 1
        self.generated += 1
        last = made + 1 == request.sampling.max_tokens
        if last:
            del self.requests[request.request_id]
        return TokenOutput(request.request_id, [prompt[made % len(prompt)]], "length" if last else None)

    def _land_copies(self) -> None:
        while self.copies and self.copies[0][0] <= time.monotonic():
            call = self.copies.pop(0)[1]
            if call.adapter.digest == "missing":
                error = ErrorCode.ADAPTER_LOAD_FAILED
                self.results.append(AdapterResult(call.call_id, "disk", error=error, message="no such file"))
            else:
                self.resident.append(call.adapter.digest)
                self.results.append(AdapterResult(call.call_id, "arena", COPY_S * 1000))


def prepare(settings: Settings) -> None:
    PREPARED.append(str(os.getpid()))


def create_engine(settings: Settings) -> EchoEngine:
    return EchoEngine()


def create_paced_engine(settings: Settings) -> EchoEngine:
    return EchoEngine(step_s=0.002)


def create_parent_engine(settings: Settings) -> EchoEngine:
    """Has started a program that does not end by itself."""
    subprocess.Popen(["sleep", "3600"])
    return EchoEngine()


def create_refused_engine(settings: Settings) -> EchoEngine:
    raise InvalidRequest(f"model {settings.model} is refused")


def create_dying_engine(settings: Settings) -> EchoEngine:
    os._exit(3)


def create_slow_engine(settings: Settings) -> EchoEngine:
    print("loading", flush=True)
    time.sleep(3600)
    return EchoEngine()


def create_late_engine(settings: Settings) -> EchoEngine:
    """Takes more than a second, and without end while the file `data_dir/hang` is there."""
    assert settings.data_dir is not None
    time.sleep(3600 if (settings.data_dir / "hang").exists() else 1.1)
    return EchoEngine()


def create_refusable_engine(settings: Settings) -> EchoEngine:
    """Refused while the file `data_dir/refuse` is there."""
    assert settings.data_dir is not None
    if (settings.data_dir / "refuse").exists():
        raise InvalidRequest("refused this time")
    return EchoEngine(step_s=0.002)
