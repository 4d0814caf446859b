"""The server that a drill is played on, and what its books must say afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

from load_tests.serving import ServerProcess, engine_of

PROMPT = "Anna saw two red apples =>\n"
_SETTLES_S = 30.0
_MIB = 2**20


@dataclass(frozen=True)
class Books:
    """What an idle server holds. All but `memory_mib` must be as before."""

    running: int
    waiting: int
    kv_blocks_held: int
    staged: int  # entries of the data folder's staging
    open_files: tuple[str, ...]  # of the face, by what they lead to
    children: int  # processes
    memory_mib: int  # PSS of the face and its children

    def leaks(self, before: Books) -> list[str]:
        """What is more than before, in words."""
        told = [
            f"{field.name}: {getattr(before, field.name)} before, {getattr(self, field.name)} after"
            for field in fields(self)
            if field.type == "int" and field.name != "memory_mib"
            if getattr(self, field.name) > getattr(before, field.name)
        ]
        if len(self.open_files) > len(before.open_files):
            more = Counter(self.open_files) - Counter(before.open_files)
            told.append(f"{len(before.open_files)} open files before, after them {dict(more)} more")
        return told


class Site:
    """A server with the base model `base` and a folder of adapters, and ways to ill-treat it.

    `http` keeps no connection open, so that each call is a client of its own, and shows `key`.
    """

    base = "base"

    def __init__(
        self, server: ServerProcess, data_dir: Path, scratch: Path, adapter: Path, key: str | None = None
    ) -> None:
        self.server = server
        self.data_dir = data_dir
        self.scratch = scratch  # an empty folder for what a case writes
        self.adapter = adapter  # a sound one, a folder in PEFT layout
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits, headers=headers)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.http.aclose()

    @property
    def host(self) -> str:
        return self.server.url.removeprefix("http://").partition(":")[0]

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])

    @property
    def face(self) -> psutil.Process:
        return psutil.Process(self.server.pid)

    @property
    def engine(self) -> psutil.Process:
        return psutil.Process(engine_of(self.server.pid))

    async def end(self) -> None:
        """SIGTERM, and the server is gone."""
        self.face.terminate()
        await asyncio.to_thread(self.server.process.wait, 60)

    def shown(self, key: str) -> Site:
        """The same with another key, to be used with `async with`."""
        return Site(self.server, self.data_dir, self.scratch, self.adapter, key)

    async def complete(self, model: str | None = None, **body: Any) -> httpx.Response:
        """A short greedy completion, unless `body` says otherwise."""
        asked = {"model": model or self.base, "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | body
        return await self.http.post("/v1/completions", json=asked)

    async def upload(
        self, name: str, files: dict[str, bytes], method: str = "POST", **options: Any
    ) -> httpx.Response:
        """Multipart, as the file names say."""
        parts = [("files", (file, content)) for file, content in files.items()]
        path = "/v1/adapters" if method == "POST" else f"/v1/adapters/{name}"
        return await self.http.request(method, path, data={"name": name}, files=parts, **options)

    def adapter_files(self) -> dict[str, bytes]:
        """Of the sound adapter, by file name."""
        names = ("adapter_config.json", "adapter_model.safetensors")
        return {name: (self.adapter / name).read_bytes() for name in names}

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection."""
        return await asyncio.open_connection(self.host, self.port)

    def head(self, line: str, *headers: str) -> bytes:
        """The start of a request on a bare connection, without the blank line that ends it."""
        lines = [line + " HTTP/1.1", f"host: {self.host}:{self.port}", *headers]
        return "\r\n".join(lines).encode() + b"\r\n"

    def posted(self, body: dict[str, Any]) -> bytes:
        """A whole request for a completion, for a bare connection."""
        content = json.dumps(body).encode()
        headers = "content-type: application/json", f"content-length: {len(content)}"
        return self.head("POST /v1/completions", *headers) + b"\r\n" + content

    async def half_an_upload(self, name: str, sent: int = 0) -> asyncio.StreamWriter:
        """A PUT of a megabyte of weights of which `sent` bytes have come, on a connection that stays open."""
        _, writer = await self.connect()
        headers = "content-length: 1000000", "content-type: multipart/form-data; boundary=b"
        part = 'content-disposition: form-data; name="files"; filename="adapter_model.safetensors"'
        writer.write(self.head(f"PUT /v1/adapters/{name}", *headers) + b"\r\n--b\r\n")
        writer.write(part.encode() + b"\r\n\r\n" + bytes(sent))
        await writer.drain()
        return writer

    async def metrics(self) -> dict[str, float]:
        """Series without labels, or with the model's alone, by name."""
        text = (await self.http.get("/metrics")).text
        found = re.findall(r"^([a-z_:]+)(?:\{[^}]*\})? ([0-9.e+-]+)$", text, re.M)
        return {name: float(value) for name, value in found}

    async def until(self, condition: Any, what: str, seconds: float = _SETTLES_S) -> None:
        """Waits for an async condition. Raises TimeoutError with `what`."""
        deadline = time.monotonic() + seconds
        while not await condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:g} s in vain for {what}")
            await asyncio.sleep(0.05)

    async def ready(self) -> bool:
        try:
            return (await self.http.get("/health/ready")).status_code == 200
        except httpx.TransportError:
            return False

    async def idle(self) -> bool:
        """Whether it is ready and nothing runs or waits; the figures are half a second old at most."""
        if not await self.ready():
            return False
        metrics = await self.metrics()  # a new engine has said nothing yet
        return metrics.get("vllm:num_requests_running") == metrics.get("vllm:num_requests_waiting") == 0

    async def warm_up(self) -> None:
        """Once a server: what it starts or loads at first use, so that the books show leaks alone."""
        await self.until(self.ready, "the server to be ready")
        await self.complete()
        await self.complete(prompt="word " * 60_000)  # the process that reads large bodies
        await self.complete(regex="a+", max_tokens=2)  # and the one that judges grammars
        await self.http.post("/v1/adapters", json={"name": "absent", "source": "file:/absent"})
        await asyncio.gather(*(self.http.get("/v1/usage") for _ in range(16)))  # all connections to SQLite

    def memory_mib(self) -> int:
        """PSS of the face and its children."""
        family = [self.face, *self.face.children(recursive=True)]
        return int(sum(process.memory_full_info().pss for process in family)) // _MIB

    async def books(self) -> Books:
        """When all has ended, or after half a minute as it is."""
        with contextlib.suppress(TimeoutError):
            await self.until(self.idle, "the server to be idle")
        await asyncio.sleep(1.0)  # one heartbeat, and connections that close
        metrics = await self.metrics()
        await asyncio.sleep(0.2)  # the connection of this call closes, too
        face = self.face
        return Books(
            running=int(metrics["vllm:num_requests_running"]),
            waiting=int(metrics["vllm:num_requests_waiting"]),
            kv_blocks_held=round(metrics["vllm:kv_cache_usage_perc"] * 1e6),
            staged=len(os.listdir(self.data_dir / "staging")),
            open_files=tuple(_open_files(face.pid)),
            children=len(face.children(recursive=True)),
            memory_mib=self.memory_mib(),
        )


def _open_files(pid: int) -> Iterator[str]:
    """What a process has open: names of files, else of what kind."""
    folder = Path(f"/proc/{pid}/fd")
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            target = os.readlink(entry)
            yield Path(target).name if target.startswith("/") else target.partition(":")[0]
