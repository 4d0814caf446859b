"""An engine without a model: answers by a script, and keeps books on what it was asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from itertools import zip_longest
from pathlib import Path

from load_tests.fake_engine import choices_of
from server.border.client import EngineStartFailed, EngineState, OnReady
from server.config import Settings
from server.errors import EngineDied, Unavailable
from server.messages import (
    AdapterRef,
    AdapterResult,
    EngineInfo,
    EngineStats,
    ErrorCode,
    Logprobs,
    Request,
    TokenOutput,
)
from tests.registry import adapter_files

EOS = 1
VOCABULARY = 310  # a little more than the tokenizer has, as padded models do


def engine_info(**fields: object) -> EngineInfo:
    values = {
        "pid": 1, "model_type": "llama", "device": "cpu", "dtype": "float32", "vocab_size": VOCABULARY,
        "max_model_len": 128, "load_seconds": 0.0,
        "parameters": adapter_files.BASE_PARAMETERS, "weights_bytes": 4 * adapter_files.BASE_PARAMETERS,
        "block_size": 16, "kv_blocks": 64, "kv_bytes": 1 << 20, "arena_bytes": 1 << 16,
        "lora_targets": adapter_files.TARGETS,
    }  # fmt: skip
    return EngineInfo(**values | fields)  # type: ignore[arg-type]  # fields of many types


def _of_prompt(request: Request) -> list[TokenOutput]:
    """Two tokens at a time, each a little less likely than the one before."""
    top = [(token, -0.125) for token in range(2, 2 + (request.sampling.prompt_logprobs or 0))]
    entries = [
        Logprobs(token, -0.25 * at, top, rank=at) for at, token in enumerate(request.prompt_token_ids) if at
    ]
    return [
        TokenOutput(request.request_id, [], prompt_logprobs=entries[at : at + 2])
        for at in range(0, len(entries), 2)
    ]


class FakeEngine:
    """Gives each request `tokens`, one an output, then the end-of-sequence token.

    `pause_after`: outputs before it waits for `resume`. `error` ends a request after `error_after` outputs.
    """

    def __init__(self, **info: object) -> None:
        self.info: EngineInfo | None = None
        self.state: EngineState = "starting"
        self.stats: EngineStats | None = None
        self.last_heartbeat = time.monotonic()
        self.restarts = 0
        self.retry_after_s = 1
        self.on_ready: OnReady | None = None
        self.failure: str | None = None  # why it cannot start
        self.tokens: list[int] = []
        self.per_output = 1
        self.pause_after: int | None = None
        self.resume = asyncio.Event()
        self.error: ErrorCode | None = None
        self.error_after = 0
        self.load_gate: asyncio.Event | None = None
        self.requests: list[Request] = []
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.pinned: list[str] = []
        self.configured: list[Settings] = []
        self.loaded: list[str] = []  # digests, as they were asked for
        self.refuses: set[str] = set()  # digests
        self.accepts_calls = False  # before it is ready, as one does to which adapters are brought back
        self.copy_gate: asyncio.Event | None = None  # adapters wait for it on their way
        self._info = engine_info(**info)
        self._died = asyncio.Event()
        self.starts = 0

    @property
    def healthy(self) -> bool:
        return self.state == "ready" and time.monotonic() - self.last_heartbeat <= 60

    def configure(self, settings: Settings) -> None:
        self.configured.append(settings)

    async def start(self) -> None:
        self.starts += 1

    async def wait_ready(self) -> None:
        if self.load_gate is not None:
            await self.load_gate.wait()
        if self.failure is not None:
            self.state = "failed"
            raise EngineStartFailed(self.failure)
        self.info, self.state = self._info, "ready"

    async def stop(self) -> None:
        self.state = "stopped"

    def die(self) -> None:
        self.state = "restarting"
        self._died.set()

    async def generate(self, request: Request) -> AsyncGenerator[TokenOutput, None]:
        if self.state != "ready":
            raise self._unavailable()
        choices = choices_of(request)
        self.requests += choices
        ids = [choice.request_id for choice in choices]
        assert self.running.isdisjoint(ids)
        self.running.update(ids)
        try:
            if request.sampling.prompt_logprobs is not None:
                for output in _of_prompt(request):
                    yield output
            for at, turn in enumerate(zip_longest(*map(self._outputs, choices))):
                if self.pause_after is not None and at >= self.pause_after:
                    await self._wait()
                await asyncio.sleep(0)
                for output in turn:
                    if output is not None and output.request_id in self.running:
                        if output.finish_reason is not None:
                            self.running.discard(output.request_id)
                        yield output
        finally:
            self.aborted += [left for left in ids if left in self.running]
            self.running.difference_update(ids)

    def abort(self, request_id: str) -> None:
        assert request_id in self.running
        self.running.discard(request_id)
        self.aborted.append(request_id)

    async def load_adapter(self, ref: AdapterRef, pin: bool = False) -> AdapterResult:
        if self.state != "ready" and not self.accepts_calls:
            raise self._unavailable()
        assert (Path(ref.path) / "adapter_model.safetensors").is_file()
        self.loaded.append(ref.digest)
        if self.copy_gate is not None:
            await self.copy_gate.wait()
        if ref.digest in self.refuses:
            return AdapterResult(0, "disk", error=ErrorCode.ADAPTER_LOAD_FAILED, message="refused")
        if pin:
            self.pinned.append(ref.digest)
        return AdapterResult(0, "arena", milliseconds=1.0)

    async def unload_adapter(self, digest: str, forget: bool = False) -> AdapterResult:
        return AdapterResult(0, "disk")

    def _unavailable(self) -> Unavailable:
        return Unavailable("The engine is restarting.", retry_after_s=self.retry_after_s)

    async def _wait(self) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in (self.resume, self._died)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._died.is_set():
            message = "The engine ended while it worked on this request."
            raise EngineDied(message, retry_after_s=self.retry_after_s)

    def _outputs(self, request: Request) -> list[TokenOutput]:
        sampling = request.sampling
        tokens = [*self.tokens, EOS]
        if sampling.ignore_eos:
            tokens = (self.tokens or [5]) * sampling.max_tokens
        tokens = tokens[: sampling.max_tokens]
        made = [] if tokens else [TokenOutput(request.request_id, [], "length")]
        for at in range(0, len(tokens), self.per_output):
            ids = tokens[at : at + self.per_output]
            stop = EOS if ids[-1] == EOS and not sampling.ignore_eos else None
            last = at + self.per_output >= len(tokens)
            logprobs = None
            if sampling.logprobs is not None:
                top = [(token, -0.5) for token in range(2, 2 + sampling.logprobs)]
                logprobs = [Logprobs(token_id, -0.25, top) for token_id in ids]
            made.append(
                TokenOutput(
                    request.request_id,
                    ids,
                    finish_reason=("stop" if stop else "length") if last else None,
                    stop_token=stop,
                    cached_tokens=min(3, len(request.prompt_token_ids)) if at == 0 else 0,
                    logprobs=logprobs,
                )
            )
        if self.error is not None:
            failed = TokenOutput(request.request_id, [], finish_reason="error", error=self.error, message="")
            made[self.error_after :] = [failed]
        return made
