"""How many streamed tokens/s the HTTP face carries on one core, with a fake engine behind it.

The face has a core of its own; the engine and the clients share the others. The clients only collect bytes
while the clock runs, and read them afterwards, so that they are not what is measured.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from load_tests.client import Target
from load_tests.fake_engine import STEP_MS
from load_tests.serving import ServerProcess, free_port
from load_tests.trace import TraceRequest

_EVENT = re.compile(rb"data: (\{.*\})\n\n")
_PROMPT_TOKENS = 32
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")  # of a process's CPU times


class FaceRun(msgspec.Struct, frozen=True):
    """One round: all clients stream at once."""

    clients: int
    tokens: int  # received in whole, answered streams
    failed: int  # streams cut off or with another number of tokens than asked
    wall_s: float  # from the first request sent to the last stream's end
    cpu_s: float  # of the face process meanwhile
    offered_tokens_per_s: float | None  # what the engine gives; None: as fast as it can
    reads: int  # of the clients, all together; with tokens: how many came at once

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s

    @property
    def tokens_per_cpu_s(self) -> float:
        """What a core could carry if it did nothing else."""
        return self.tokens / max(self.cpu_s, 1 / _TICKS_PER_S)


class FaceResult(msgspec.Struct, frozen=True):
    """All rounds, and their medians."""

    pinned: bool  # the face had a core of its own
    runs: list[FaceRun]
    tokens_per_s: float
    tokens_per_cpu_s: float
    failed: int


def measure(model: Path, clients: int, tokens: int, step_ms: float, rounds: int, log: Path) -> FaceResult:
    """`rounds` times `clients` streams of `tokens` tokens each, one token every `step_ms` ms.

    `model` gives the tokenizer; its weights are not read. A first, short round is not counted.
    """
    with tempfile.TemporaryDirectory(prefix="chorus-face-") as data_dir, _split_cores() as core:
        port = free_port()
        cores = ",".join(map(str, sorted(core)))
        command = [sys.executable, "-m", "load_tests.face_server", str(model), data_dir, str(port), cores]
        with ServerProcess(command, port, log, env={STEP_MS: str(step_ms)}) as server:
            if _run(server, clients, 8, step_ms).failed:
                raise RuntimeError(f"streams failed while warming up; see {log}")
            runs = [_run(server, clients, tokens, step_ms) for _ in range(rounds)]
    return FaceResult(
        pinned=len(core) == 1 and (os.cpu_count() or 1) > 1,
        runs=runs,
        tokens_per_s=statistics.median(run.tokens_per_s for run in runs),
        tokens_per_cpu_s=statistics.median(run.tokens_per_cpu_s for run in runs),
        failed=sum(run.failed for run in runs),
    )


@contextmanager
def _split_cores() -> Iterator[set[int]]:
    """The face's core, while this process keeps to the others; the only one, where there is no other."""
    before = os.sched_getaffinity(0)
    face = {max(before)}
    os.sched_setaffinity(0, before - face or before)
    try:
        yield face
    finally:
        os.sched_setaffinity(0, before)


def _run(server: ServerProcess, clients: int, tokens: int, step_ms: float) -> FaceRun:
    cpu_s = cpu_seconds(server.pid)
    began = time.perf_counter()
    streams = asyncio.run(_stream_all(server.url, clients, tokens))
    wall_s = time.perf_counter() - began
    received = [stream.tokens() for stream in streams]
    return FaceRun(
        clients=clients,
        tokens=sum(received),
        failed=sum(count != tokens for count in received),
        wall_s=wall_s,
        cpu_s=cpu_seconds(server.pid) - cpu_s,
        offered_tokens_per_s=1000 * clients / step_ms if step_ms else None,
        reads=sum(stream.reads for stream in streams),
    )


async def _stream_all(url: str, clients: int, tokens: int) -> list[Stream]:
    loop = asyncio.get_running_loop()
    host, _, port = url.removeprefix("http://").partition(":")
    rng = np.random.default_rng(0)
    prompts = rng.integers(100, 1000, (clients, _PROMPT_TOKENS)).tolist()
    requests = [
        TraceRequest(id=index, arrival_s=0.0, adapter=None, rank=0, prompt=prompt, max_tokens=tokens)
        for index, prompt in enumerate(prompts)
    ]
    streams = [Stream(_http(Target(url), request, host), loop.create_future()) for request in requests]
    waiting = iter(streams)
    for _ in streams:
        await loop.create_connection(waiting.__next__, host, int(port))
    await asyncio.gather(*(stream.ended for stream in streams))
    return streams


def _http(target: Target, request: TraceRequest, host: str) -> bytes:
    body = json.dumps(target.body(request)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Stream(asyncio.Protocol):
    """One client: sends its request, keeps what comes, ends with the connection."""

    def __init__(self, request: bytes, ended: asyncio.Future[None]) -> None:
        self.ended = ended
        self.reads = 0
        self._request = request
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # a TCP connection
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.reads += 1
        self._received += data

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def tokens(self) -> int:
        """How many tokens came; 0 unless the stream is whole. (An event never spans two HTTP chunks.)"""
        if b" 200 " not in self._received[:20] or b"data: [DONE]\n\n" not in self._received[-40:]:
            return 0
        events = (msgspec.json.decode(event) for event in _EVENT.findall(self._received))
        return sum(len(choice["token_ids"]) for event in events for choice in event.get("choices", ()))


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process so far; proc(5), in ticks of 10 ms as a rule."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
