"""The whole HTTP face on a fake engine and a real registry; in the test's own loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from concurrent import futures
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
from fastapi import FastAPI

from server.api.app import create_app
from server.api.connection import ConnectionConfig
from server.api.face import Face
from server.api.listen import Server, bind
from server.api.reading import child
from server.api.reading.messages import ReadAnswer, ReaderStart, ReadJob, ReadRules
from server.api.reading.reader import Reader
from server.api.reading.readers import Readers
from server.base_model import BaseModel
from server.config import Settings
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import Tokenizer
from server.text.tool_calls import ToolStyle
from tests.api.fake_engine import FakeEngine
from tests.registry import adapter_files
from tests.text import tiny_tokenizer

ADAPTERS = ("sql", "team/json")


class Site:
    """`client` talks to the app in-process; `listen` puts it on a port."""

    def __init__(self, app: FastAPI, engine: FakeEngine, client: httpx.AsyncClient) -> None:
        self.app = app
        self.engine = engine
        self.client = client
        self.failures: list[str] = []

    @property
    def face(self) -> Face:
        face: Face = self.app.state.face
        return face

    def say(self, text: str) -> None:
        """What the engine answers from now on."""
        assert self.face.tokenizer is not None
        self.engine.tokens = self.face.tokenizer.encode(text)

    @property
    def prompts(self) -> list[str]:
        """What the engine was asked, as text."""
        tokenizer = self.face.tokenizer
        assert tokenizer is not None
        asked = (request.prompt_token_ids for request in self.engine.requests)
        return [tokenizer.decode(ids, skip_special_tokens=False) for ids in asked]

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": "base", "prompt": "hello"} | fields)

    async def chat(self, **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "hello"}]
        return await self.client.post(
            "/v1/chat/completions", json={"model": "base", "messages": messages} | fields
        )

    def digest(self, name: str) -> str:
        registry = self.face.require_registry()
        with registry.acquire(name) as lease:
            return lease.version.digest

    def leases(self) -> int:
        """How many adapters somebody holds still: deletes them all, and their files go if nobody does."""
        registry = self.face.require_registry()
        gone = [retired.gone for name in ADAPTERS for retired in registry.delete(name)]
        return len(futures.wait(gone, timeout=2).not_done)


def model_folder(root: Path, *, tokenizer: bool = True) -> Path:
    folder = root / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 128}))
    if tokenizer:
        tiny_tokenizer.write(folder)
    return folder


class SameProcess(Readers):
    """Reads in the test's own process what would go to another, whose start takes as long as ten tests."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer | None, style: ToolStyle | None, rules: ReadRules
    ) -> None:
        super().__init__(ReaderStart(str(folder)), tokenizer, rules)
        template = ChatTemplate.load(folder, tokenizer.special_tokens) if tokenizer else None
        self._reader = Reader(tokenizer, template, style)

    async def _answer(self, job: ReadJob) -> ReadAnswer:
        said = child.answer(self._reader, msgspec.structs.replace(job, compiles=True))
        return msgspec.msgpack.decode(msgspec.msgpack.encode(said), type=ReadAnswer)


@asynccontextmanager
async def open_site(
    root: Path,
    engine: FakeEngine | None = None,
    *,
    tokenizer: bool = True,
    wait: bool = True,
    processes: bool = False,
    **fields: Any,
) -> AsyncIterator[Site]:
    """`processes`: bodies are read where they are in a real server."""
    for at, name in enumerate(ADAPTERS):
        adapter_files.write(root / "adapters" / name, adapter_files.files(seed=at))
    settings = Settings(
        model=str(model_folder(root, tokenizer=tokenizer)),
        served_model_name="base",
        load_format="dummy",
        adapters=root / "adapters",
        data_dir=root / "data",
        **{"allowed_hosts": "chorus"} | fields,
    )
    engine = engine or FakeEngine()
    ready = asyncio.Event()
    failures: list[str] = []

    def on_failed(reason: str) -> None:
        failures.append(reason)
        ready.set()

    base = BaseModel.resolve(settings)
    app = create_app(settings, engine, base, on_ready=lambda _: ready.set(), on_failed=on_failed)
    if not processes:
        face: Face = app.state.face
        style, rules = face.style.tools, face.readers.rules
        face.readers = SameProcess(base.tokenizer_folder, face.tokenizer, style, rules)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://chorus",
            event_hooks={"request": [_say_json]},
        ) as client,
    ):
        site = Site(app, engine, client)
        site.failures = failures
        if wait:
            await ready.wait()
        yield site


async def _say_json(request: httpx.Request) -> None:
    """Of bodies that a test gives as bytes."""
    if request.method == "POST":
        request.headers.setdefault("content-type", "application/json")


@asynccontextmanager
async def listen(app: FastAPI) -> AsyncIterator[str]:
    """The app (whose lifespan runs already) on a free port; yields its URL."""
    face: Face = app.state.face
    listener = bind(face.settings.model_copy(update={"port": 0}))
    server = Server(ConnectionConfig(app, face.settings, lifespan="off"), face)
    task = asyncio.create_task(server.serve([listener]))
    while not server.started:  # noqa: ASYNC110 (uvicorn has no event for it)
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


def events(text: str) -> list[Any]:
    """The payloads of a stream; checks its frame and its end."""
    *payloads, end = text.split("\n\n")
    assert end == ""
    assert payloads.pop() == "data: [DONE]"
    assert all(payload.startswith("data: ") for payload in payloads)
    return [json.loads(payload.removeprefix("data: ")) for payload in payloads]


async def eventually(condition: Any) -> None:
    """Waits until `condition()`; the test's own time limit ends it."""
    while not condition():  # noqa: ASYNC110 (any condition)
        await asyncio.sleep(0.005)


async def drained(site: Site) -> None:
    """The server's end, which nobody holds up: no request counts as running any more."""
    await asyncio.wait_for(site.face.drain.finish(grace_s=600), 20)


async def brought_back(site: Site, resident: tuple[str, ...]) -> list[str]:
    """What is loaded again after an engine that had these adapters, in this order."""
    site.engine.loaded.clear()
    site.engine.state = "restarting"
    assert site.engine.on_ready is not None
    restored = site.engine.on_ready(resident)
    assert restored is not None
    await restored
    return site.engine.loaded
