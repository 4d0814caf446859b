"""Around every request: its id, its log line, its count, and the answer when something unexpected broke."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import as_chorus_error, error_response
from server.api.operation import Operation
from server.errors import Unavailable
from server.log import lines_of
from server.telemetry.audit import AuditLog
from server.telemetry.metrics import Metrics
from server.telemetry.traces import RequestTrace, Traces, trace_id_of

logger = logging.getLogger("server.access")

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_LOG_LINE = "%s %s %d %s %.3fs id=%s"


class RequestScope:
    """ASGI middleware. The outermost one, so that no answer leaves without `x-request-id`."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, audit_log: AuditLog, traces: Traces | None = None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._audit_log = audit_log
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = self._begin(scope)
        with lines_of(state):
            await self._serve(scope, receive, send, state)

    def _begin(self, scope: Scope) -> dict[str, Any]:
        """The request's state: its id, and the trace that it belongs to, if any."""
        headers = Headers(scope=scope)
        asked_id = headers.get("x-request-id", "")
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = asked_id if _SANE_ID.fullmatch(asked_id) else uuid.uuid4().hex
        trace = self._traces.begin(headers, scope["method"]) if self._traces else None
        state["trace"] = trace
        state["trace_id"] = trace.trace_id if trace else trace_id_of(headers)
        return state

    async def _serve(self, scope: Scope, receive: Receive, send: Send, state: dict[str, Any]) -> None:
        status = 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(state.get("headers") or {})
                headers["x-request-id"] = state["request_id"]
            await send(message)

        began = time.monotonic()
        try:
            await self._app(scope, receive, tagged)
        except Exception as error:
            shown = as_chorus_error(error)
            state["error_code"], state["error_reason"] = shown.code, shown.reason
            if status == 0:
                await error_response(shown)(scope, receive, tagged)
        except asyncio.CancelledError:  # the server ends, and this has outlasted the drain
            if status == 0:
                ended = Unavailable("The server is shutting down.", code="shutting_down")
                await error_response(ended)(scope, receive, tagged)
        finally:
            self._finish(scope, status, state, time.monotonic() - began)

    def _finish(self, scope: Scope, status: int, state: dict[str, Any], seconds: float) -> None:
        outcome = state.get("outcome") or _outcome(status)
        operation = Operation.of(scope.get("endpoint"))
        quiet = bool(state.get("quiet")) or (operation is not None and operation.quiet)
        if operation and operation.counted:
            self._metrics.count_request(outcome, state.get("error_reason"))
        shown_path = ascii(scope["path"][:200])[1:-1]  # a log line stays one line
        facts = {"method": scope["method"], "path": shown_path, "status": status, "outcome": outcome}
        logger.log(
            logging.DEBUG if quiet else logging.INFO,
            _LOG_LINE,
            *facts.values(),
            seconds,
            state["request_id"],
            extra={"facts": {**facts, "seconds": round(seconds, 6)}},
        )
        self._audit_log.write(state, (scope.get("client") or (None,))[0], status, outcome)
        if state["trace"] is not None and not quiet:
            _end_trace(state["trace"], scope, status, outcome)


def _end_trace(trace: RequestTrace, scope: Scope, status: int, outcome: str) -> None:
    """In the words of the semantic conventions of HTTP servers."""
    route = getattr(scope.get("route"), "path_format", None)
    attributes = {
        "http.request.method": scope["method"],
        "http.response.status_code": status,
        "url.path": scope["path"][:200],
        "url.scheme": scope.get("scheme", "http"),
        "chorus.request.id": scope["state"]["request_id"],
        "chorus.outcome": outcome,
    }
    if route:
        attributes["http.route"] = route
    error = scope["state"].get("error_code") or (str(status) if status else "aborted")
    name = f"{scope['method']} {route}" if route else str(scope["method"])
    trace.end(name, attributes, error if outcome in ("failed", "aborted") else None)


def _outcome(status: int) -> str:
    if status == 0:
        return "aborted"
    return "completed" if status < 400 else "rejected" if status < 500 else "failed"
