"""Server-sent events, and the answer to a generation: a stream of them, or one JSON body."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.body import read_body
from server.api.caller import caller_of
from server.api.errors import as_chorus_error, encode_error
from server.api.face import Face, face_of, tenant_of
from server.api.inference.generation import ClientGone, Delta, Generation
from server.api.inference.limits import check_limits, within_limits
from server.api.inference.meter import Meter
from server.api.inference.mix import LeasedMix
from server.api.inference.served import count_served
from server.api.inference.spans import trace_generation
from server.api.inference.spec import GenerationSpec
from server.api.pieces import JSONPieces
from server.messages import EngineInfo

# Deltas before other tasks run: each has up to 20 log-probabilities a token, one of a prompt those of many.
_ADDED_A_TURN = 16

DONE = b"data: [DONE]\n\n"


def event(payload: bytes) -> bytes:
    """One event of a stream; `payload` is JSON without line ends."""
    return b"data: " + payload + b"\n\n"


async def generate(
    request: Request, spec_of: Callable[[Face, EngineInfo, bytes], Awaitable[GenerationSpec]]
) -> Response:
    """What an inference route answers. `spec_of` judges the body."""
    face = face_of(request)
    info = face.require_engine()
    face.waiting_room.check(tenant_of(request))  # before anything is read
    check_limits(request)
    body = await read_body(request, face.settings.max_request_bytes)
    return GenerationResponse(face, request, await spec_of(face, info, body))


class GenerationResponse(Response):
    """Runs a spec and sends what comes of it. One `with` spans all that the request holds."""

    def __init__(self, face: Face, request: Request, spec: GenerationSpec) -> None:
        super().__init__()
        self._face = face
        self._request = request
        self._spec = spec

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what failed before the first token, so that it is answered with its own status."""
        face, spec, tenant = self._face, self._spec, tenant_of(self._request)
        caller = caller_of(self._request)
        weight = face.quotas.weight(caller.tenant) if face.quotas else 1.0
        try:
            with (
                face.waiting_room.enter(tenant, len(spec.prompts) * spec.n) as ticket,
                spec.mix.lease(face, caller.tenant) as leased,
                within_limits(self._request, leased, spec.prompt_tokens) as grant,
            ):
                choices = spec.choices(leased, tenant, face.settings.request_timeout_s, weight)
                spec.reply.start(leased.version, choices)
                most_unread = face.settings.max_unread_bytes
                generation = Generation(face.engine, choices, face.metrics, ticket, most_unread)
                with face.drain.serving(generation.fail), self._counted(leased, generation):
                    meter = Meter.of(face, caller, spec, leased, grant)
                    await self._answer(generation, meter, receive, send)
        except ClientGone:
            self._request.state.outcome = "aborted"

    @contextmanager
    def _counted(self, leased: LeasedMix, generation: Generation) -> Iterator[None]:
        """Adds the request and its tokens to the figures of its adapters, however it ended."""
        outcome = "failed"
        try:
            yield
            outcome = getattr(self._request.state, "outcome", "completed")
        except (ClientGone, asyncio.CancelledError):
            outcome = "aborted"
            raise
        finally:
            count_served(self._face, leased, generation, outcome)
            if (trace := getattr(self._request.state, "trace", None)) is not None and trace.wanted:
                trace_generation(trace, self._spec, leased, generation)

    async def _answer(self, generation: Generation, meter: Meter, receive: Receive, send: Send) -> None:
        async with generation:
            watch = asyncio.create_task(_watch(receive, generation))
            try:
                if self._spec.stream:
                    await self._stream(generation, meter, send)
                else:
                    await self._whole(generation, meter, send)
            finally:
                watch.cancel()

    async def _whole(self, generation: Generation, meter: Meter, send: Send) -> None:
        reply = self._spec.reply
        while ready := await generation.take():
            for at, delta in enumerate(ready, 1):
                reply.add(delta)
                meter.add(delta)
                if at % _ADDED_A_TURN == 0 or delta.prompt_logprobs:
                    await asyncio.sleep(0)
        body = JSONPieces(reply.body())
        meter.tell()
        await body(self._request.scope, _nothing, send)

    async def _stream(self, generation: Generation, meter: Meter, send: Send) -> None:
        ready = await generation.take()  # what fails before the first token is not a stream yet
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        reply = self._spec.reply
        try:
            async with generation.handing_over():
                while ready:
                    events = await self._events(ready, meter)
                    meter.tell()
                    if events:
                        body = {"type": "http.response.body", "body": events, "more_body": True}
                        await generation.hand_over(send(body))
                    ready = await generation.take()
            usage = reply.usage_chunk()
            last = event(usage) + DONE if usage else DONE
        except ClientGone:
            raise
        except Exception as error:  # the status is sent: an error can only be an event now
            shown = as_chorus_error(error)
            state = self._request.state
            state.outcome, state.error_code, state.error_reason = "failed", shown.code, shown.reason
            last = event(encode_error(shown)) + DONE
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _events(self, ready: list[Delta], meter: Meter) -> bytes:
        events = bytearray()
        for delta in ready:
            for chunk in self._spec.reply.chunks(delta):
                events += event(chunk)
                if delta.prompt_logprobs:
                    await asyncio.sleep(0)
            meter.add(delta)
        return bytes(events)


async def _watch(receive: Receive, generation: Generation) -> None:
    """Ends the generation when the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.fail(ClientGone())


async def _nothing() -> dict[str, str]:
    return {"type": "http.disconnect"}
