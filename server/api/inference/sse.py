"""Server-sent events, and the answer to a generation: a stream of them, or one JSON body."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.body import beside_loop, read_body
from server.api.errors import as_chorus_error, encode_error
from server.api.face import Face, face_of
from server.api.inference.generation import Choice, ClientGone, Generation
from server.api.inference.mix import LeasedMix
from server.api.inference.spec import GenerationSpec
from server.messages import EngineInfo

DONE = b"data: [DONE]\n\n"


def event(payload: bytes) -> bytes:
    """One event of a stream; `payload` is JSON without line ends."""
    return b"data: " + payload + b"\n\n"


async def generate(
    request: Request, spec_of: Callable[[Face, EngineInfo, bytes], GenerationSpec]
) -> Response:
    """What an inference route answers. `spec_of` judges the body, in a thread when that is large."""
    face = face_of(request)
    info = face.require_engine()
    body = await read_body(request, face.settings.max_request_bytes)
    return GenerationResponse(face, request, await beside_loop(len(body), lambda: spec_of(face, info, body)))


class GenerationResponse(Response):
    """Runs a spec and sends what comes of it. One `with` spans all that the request holds."""

    def __init__(self, face: Face, request: Request, spec: GenerationSpec) -> None:
        super().__init__()
        self._face = face
        self._request = request
        self._spec = spec

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what failed before the first token, so that it is answered with its own status."""
        face, spec = self._face, self._spec
        try:
            with spec.mix.lease(face) as leased:
                choices = spec.choices(leased)
                spec.reply.start(leased.version, choices)
                generation = Generation(face.engine, choices, face.metrics, face.settings.max_unread_bytes)
                with face.drain.serving(generation.fail), _counted(face, leased, choices):
                    await self._answer(generation, receive, send)
        except ClientGone:
            self._request.state.outcome = "aborted"

    async def _answer(self, generation: Generation, receive: Receive, send: Send) -> None:
        async with generation:
            watch = asyncio.create_task(_watch(receive, generation))
            try:
                if self._spec.stream:
                    await self._stream(generation, send)
                else:
                    await self._whole(generation, send)
            finally:
                watch.cancel()

    async def _whole(self, generation: Generation, send: Send) -> None:
        reply = self._spec.reply
        while ready := await generation.take():
            for delta in ready:
                reply.add(delta)
        await Response(reply.body(), media_type="application/json")(self._request.scope, _nothing, send)

    async def _stream(self, generation: Generation, send: Send) -> None:
        ready = await generation.take()  # what fails before the first token is not a stream yet
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        reply = self._spec.reply
        try:
            async with generation.handing_over():
                while ready:
                    events = b"".join([event(chunk) for delta in ready if (chunk := reply.chunk(delta))])
                    if events:
                        await send({"type": "http.response.body", "body": events, "more_body": True})
                    ready = await generation.take()
            usage = reply.usage_chunk()
            last = event(usage) + DONE if usage else DONE
        except ClientGone:
            raise
        except Exception as error:  # the status is sent: an error can only be an event now
            self._request.state.outcome = "failed"
            last = event(encode_error(as_chorus_error(error))) + DONE
        await send({"type": "http.response.body", "body": last, "more_body": False})


@contextmanager
def _counted(face: Face, leased: LeasedMix, choices: list[Choice]) -> Iterator[None]:
    """Adds the request and its tokens to the registry's figures, however it ended."""
    try:
        yield
    finally:
        tokens = sum(choice.completion_tokens for choice in choices)
        for version, _ in leased.members:
            face.require_registry().served(version, tokens)


async def _watch(receive: Receive, generation: Generation) -> None:
    """Ends the generation when the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.fail(ClientGone())


async def _nothing() -> dict[str, str]:
    return {"type": "http.disconnect"}
