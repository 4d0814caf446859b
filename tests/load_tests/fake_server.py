"""A small OpenAI-style server in the test's own event loop; model and prompt alone decide its answers."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from aiohttp import web

from load_tests.client import Target


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition on plain state."""
    while not condition():  # noqa: ASYNC110 - what is waited for sets no event
        await asyncio.sleep(0.001)


class FakeServer:
    """Streams completions; what it does wrong is set by its attributes, by model name."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.refuses: set[str] = set()  # 503
        self.breaks: set[str] = set()  # closes the connection after the first token
        self.ends_early: set[str] = set()  # closes the stream without [DONE]
        self.errs: set[str] = set()  # an error event after the first token
        self.hangs: set[str] = set()  # never goes on after the first token
        self.falls_short: set[str] = set()  # one token less than asked
        self.lies: set[str] = set()  # a wrong last token, but only while others are in flight
        self.knows_token_ids = True
        self.tokens_per_chunk = 1
        self.token_delay_s = 0.0
        self.cuts_lines = False
        self.in_flight = 0
        self.most_in_flight = 0
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[FakeServer]:
        app = web.Application()
        app.router.add_post("/v1/completions", self._completions)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield self
        finally:
            await runner.cleanup()

    def target(self, **options: Any) -> Target:
        return Target(self.url, **options)

    def answer(self, model: str, prompt: object, count: int) -> list[int]:
        """The right token ids."""
        digest = hashlib.sha256(json.dumps([model, prompt]).encode()).digest()
        return [digest[index % 32] for index in range(count)]

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self.bodies.append(body)
        self.headers.append(dict(http.headers))
        if body["model"] in self.refuses:
            error = {"message": "draining", "type": "server_error", "param": None, "code": "unavailable"}
            return web.json_response({"error": error}, status=503)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self._stream(http, response, body)
        finally:
            self.in_flight -= 1
        return response

    async def _stream(self, http: web.Request, response: web.StreamResponse, body: dict[str, Any]) -> None:
        model, asked = body["model"], body["max_tokens"]
        ids = self.answer(model, body["prompt"], asked - (model in self.falls_short))
        if model in self.lies and self.in_flight > 1:
            ids[-1] += 1000
        await response.write(b": a comment, as keep-alives are\r\n\r\n")
        for start in range(0, len(ids), self.tokens_per_chunk):
            await asyncio.sleep(self.token_delay_s)
            some = ids[start : start + self.tokens_per_chunk]
            choice: dict[str, Any] = {"index": 0, "text": "".join(f"<{i}>" for i in some), "logprobs": None}
            choice["finish_reason"] = "length" if start + len(some) == len(ids) else None
            if self.knows_token_ids and body.get("return_token_ids"):
                choice["token_ids"] = some
            await self._send(
                response, {"choices": [choice], "model": model, "adapter_version": f"sha-{model}"}
            )
            if model in self.breaks:
                assert http.transport is not None
                http.transport.abort()
                return
            if model in self.errs:
                await self._send(
                    response, {"error": {"message": "engine restarted", "code": "engine_restarted"}}
                )
                break
            if model in self.ends_early:
                return
            if model in self.hangs:
                await asyncio.sleep(3600)
        if body.get("stream_options", {}).get("include_usage"):
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(ids)}
            await self._send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")

    async def _send(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(event).encode() + b"\n\n"
        if self.cuts_lines:
            await response.write(data[:20])
            await asyncio.sleep(0.01)  # so that the halves arrive apart
            data = data[20:]
        await response.write(data)
