"""Around every request: its id, its log line, its count, and the answer when something unexpected broke."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import as_chorus_error, error_response
from server.api.operation import Operation
from server.errors import Unavailable
from server.telemetry.metrics import Metrics

logger = logging.getLogger("server.access")

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_LOG_LINE = "%s %s %d %s %.3fs id=%s"


class RequestScope:
    """ASGI middleware. The outermost one, so that no answer leaves without `x-request-id`."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked_id = Headers(scope=scope).get("x-request-id", "")
        request_id = asked_id if _SANE_ID.fullmatch(asked_id) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        began = time.monotonic()
        try:
            await self._app(scope, receive, tagged)
        except Exception as error:
            shown = as_chorus_error(error)
            if status == 0:
                await error_response(shown)(scope, receive, tagged)
        except asyncio.CancelledError:  # the server ends, and this has outlasted the drain
            if status == 0:
                ended = Unavailable("The server is shutting down.", code="shutting_down")
                await error_response(ended)(scope, receive, tagged)
        finally:
            self._finish(scope, status, state.get("outcome"), time.monotonic() - began, request_id)

    def _finish(
        self, scope: Scope, status: int, outcome: str | None, seconds: float, request_id: str
    ) -> None:
        outcome = outcome or _outcome(status)
        operation = Operation.of(scope.get("endpoint"))
        if operation and operation.counted:
            self._metrics.requests.labels(outcome).inc()
        level = logging.DEBUG if operation and operation.quiet else logging.INFO
        shown_path = ascii(scope["path"][:200])[1:-1]  # a log line stays one line
        logger.log(
            level,
            _LOG_LINE,
            scope["method"],
            shown_path,
            status,
            outcome,
            seconds,
            request_id,
        )


def _outcome(status: int) -> str:
    if status == 0:
        return "aborted"
    return "completed" if status < 400 else "rejected" if status < 500 else "failed"
