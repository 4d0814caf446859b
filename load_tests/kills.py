"""SIGKILL of the engine process, again and again, under traffic: who waits how long, what is wrong or left.

The server gets greedy requests for several models in float32, so that each answer is known: one that was
cut off must be the beginning of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from rich.table import Table

from load_tests.serving import ServerProcess, children_of, engine_of, free_port

OUTPUT_TOKENS = 96
LATE_S = 1.0  # an open request must end within this after the kill
_PATIENCE_S = 120.0  # for a server that must become ready
_PAUSE_S = 0.05  # of a client that was refused


@dataclass(frozen=True)
class Held:
    """What the server's face holds while nobody asks anything."""

    descriptors: int
    children: int  # processes, zombies among them
    zombies: int
    folders: int  # in its temporary folder
    rss_bytes: int

    @classmethod
    def of(cls, pid: int, folder: Path) -> Held:
        children = [_status(child) for child in children_of(pid)]
        return cls(
            descriptors=len(os.listdir(f"/proc/{pid}/fd")),
            children=len(children),
            zombies=sum(status["State"].startswith("Z") for status in children),
            folders=len(list(folder.iterdir())),
            rss_bytes=1024 * int(_status(pid)["VmRSS"].split()[0]),
        )


@dataclass
class KillsResult:
    ready_s: list[float] = field(default_factory=list)  # from each kill until ready
    ended_s: list[float] = field(default_factory=list)  # from a kill until a request open then had its error
    outcomes: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # what clients saw and must not
    before: Held | None = None
    after: Held | None = None

    @property
    def leaked(self) -> list[str]:
        """What the face holds more of than before; its memory aside, which is judged by eye."""
        assert self.before is not None
        assert self.after is not None
        names = ("descriptors", "children", "zombies", "folders")
        return [name for name in names if getattr(self.after, name) > getattr(self.before, name)]

    @property
    def late(self) -> int:
        return sum(ended > LATE_S for ended in self.ended_s)


def serving(model: Path, adapters: Path, folder: Path, flags: Sequence[str] = ()) -> ServerProcess:
    """A small server whose temporary folders are made in `folder / "tmp"`."""
    (folder / "tmp").mkdir(parents=True)
    port = free_port()
    command = [
        *(sys.executable, "-m", "server", "serve", "--model", str(model), "--served-model-name", "base"),
        *("--adapters", str(adapters), "--data-dir", str(folder / "data"), "--port", str(port)),
        *("--dtype", "float32", "--kv-cache-bytes", "64MiB", "--arena-bytes", "64MiB"),
        *("--host-cache-bytes", "64MiB", *flags),
    ]
    log = folder / "server.log"
    return ServerProcess(command, port, log, env={"TMPDIR": str(folder / "tmp")})


class Kills:
    """One run against one server."""

    def __init__(self, server: ServerProcess, temporary: Path, prompt: str, seed: int) -> None:
        self.result = KillsResult()
        self._server = server
        self._temporary = temporary
        self._prompt = prompt
        self._random = random.Random(seed)
        self._expected: dict[str, str] = {}
        self._killed_at = 0.0
        self._over = False

    async def run(self, kills: int, clients: int, pause_s: float) -> KillsResult:
        """Kill so many times, each at a random moment within `pause_s` after the engine was ready."""
        async with self._http() as http:
            await self._learn(http)
            await self._kill(http)  # what only the first one makes the face hold is no leak
            self.result.before = await self._idle(http)
            async with self._http() as traffic:  # so that its connections are gone at the end
                tasks = [asyncio.create_task(self._client(traffic, n)) for n in range(clients)]
                for _ in range(kills):
                    await asyncio.sleep(self._random.uniform(0, pause_s))
                    self.result.ready_s.append(await self._kill(http))
                self._over = True
                await asyncio.gather(*tasks)
            self.result.after = await self._idle(http)
        return self.result

    def _http(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self._server.url, timeout=_PATIENCE_S, limits=limits)

    async def _learn(self, http: httpx.AsyncClient) -> None:
        models = (await http.get("/v1/models")).json()["data"]
        for name in [model["id"] for model in models]:
            answer = await http.post("/v1/completions", json=self._body(name))
            self._expected[name] = answer.raise_for_status().json()["choices"][0]["text"]

    async def _kill(self, http: httpx.AsyncClient) -> float:
        """Returns the seconds until it is ready again."""
        engine = engine_of(self._server.pid)
        os.kill(engine, signal.SIGKILL)
        self._killed_at = time.monotonic()
        await self._until(http, 503)
        await self._until(http, 200)
        return time.monotonic() - self._killed_at

    async def _until(self, http: httpx.AsyncClient, status: int) -> None:
        async with asyncio.timeout(_PATIENCE_S):
            while (await http.get("/health/ready")).status_code != status:  # noqa: ASYNC110  # another process
                await asyncio.sleep(0.005)

    async def _idle(self, http: httpx.AsyncClient) -> Held:
        """What is held with one connection open, once the spare is there."""
        await http.get("/health")
        await asyncio.sleep(1.0)
        return Held.of(self._server.pid, self._temporary)

    def _body(self, name: str, **fields: Any) -> dict[str, Any]:
        body = {"model": name, "prompt": self._prompt, "max_tokens": OUTPUT_TOKENS}
        return body | {"temperature": 0, "ignore_eos": True} | fields

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        names = sorted(self._expected)
        for turn in range(sys.maxsize):
            if self._over:
                return
            began = time.monotonic()
            outcome = await self._ask(http, names[(number + turn) % len(names)])
            self.result.outcomes[outcome] = self.result.outcomes.get(outcome, 0) + 1
            if outcome == "cut" and began < self._killed_at:
                self.result.ended_s.append(time.monotonic() - self._killed_at)
            if outcome == "refused":
                await asyncio.sleep(_PAUSE_S)

    async def _ask(self, http: httpx.AsyncClient, name: str) -> str:
        """One streamed request: `answered`, `cut` by an error event, `refused` by a 503, or `wrong`."""
        body = self._body(name, stream=True)
        try:
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code == 503:
                    waits = int(answer.headers["retry-after"])
                    return "refused" if waits >= 1 else self._wrong(f"retry-after {waits}")
                events = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
        except (httpx.HTTPError, KeyError, ValueError) as error:
            return self._wrong(f"{type(error).__name__}: {error}")
        return self._judge(name, [event.removeprefix("data: ") for event in events])

    def _judge(self, name: str, events: list[str]) -> str:
        if not events or events[-1] != "[DONE]":
            return self._wrong(f"{name}: a stream without its end")
        pieces = [json.loads(event) for event in events[:-1]]
        text = "".join(_texts(pieces))
        errors = [piece["error"]["code"] for piece in pieces if "error" in piece]
        if not self._expected[name].startswith(text):
            return self._wrong(f"{name}: {text!r}")
        if errors:
            return "cut" if errors == ["engine_restarted"] else self._wrong(f"{name}: {errors}")
        return "answered" if text == self._expected[name] else self._wrong(f"{name}: {text!r} is not all")

    def _wrong(self, what: str) -> str:
        self.result.wrong.append(what)
        return "wrong"


def _texts(pieces: Sequence[dict[str, Any]]) -> Iterator[str]:
    for piece in pieces:
        for choice in piece.get("choices", ()):
            yield choice["text"]


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def table(result: KillsResult) -> Table:
    """What a person wants to see of a run."""
    found = Table("figure", "value", title=f"{len(result.ready_s)} kills of the engine")
    ready, ended = sorted(result.ready_s), sorted(result.ended_s) or [0.0]
    spread = "median {:.2f}, 90 % {:.2f}, longest {:.2f}"
    found.add_row("ready again, s", spread.format(median(ready), ready[len(ready) * 9 // 10], ready[-1]))
    found.add_row(
        "open requests ended, s", spread.format(median(ended), ended[len(ended) * 9 // 10], ended[-1])
    )
    found.add_row(f"ended later than {LATE_S:g} s", str(result.late))
    for outcome, count in sorted(result.outcomes.items()):
        found.add_row(f"requests {outcome}", str(count))
    found.add_row("face before", str(result.before))
    found.add_row("face after", str(result.after))
    found.add_row("leaked", ", ".join(result.leaked) or "nothing")
    return found


def as_json(result: KillsResult) -> str:
    return json.dumps(asdict(result) | {"leaked": result.leaked, "late": result.late}, indent=2)
