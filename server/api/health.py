"""`/health`, `/health/live`, `/health/ready`, `/metrics` and `/metrics/adapters`."""

from __future__ import annotations

import time

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.face import face_of
from server.api.inference.replies import Status
from server.api.operation import Operation
from server.border.client import DEAD_FACTOR
from server.telemetry.metrics import CONTENT_TYPE

router = APIRouter()

_PROBE = Operation({200: Status, 503: Status}, quiet=True, scopes=(), open=True)


@router.get("/health/live")
@_PROBE
async def live(request: Request) -> Response:
    """503 when only a restart of the whole server can help."""
    face = face_of(request)
    silence = time.monotonic() - face.engine.last_heartbeat
    hung = face.engine.state == "ready" and silence > DEAD_FACTOR * face.settings.watchdog_s
    alive = face.engine.state != "failed" and not hung
    return _answer("live") if alive else _answer("dead", 503)


@router.get("/health")
@router.get("/health/ready")
@_PROBE
async def ready(request: Request) -> Response:
    """200 when inference requests are taken."""
    face = face_of(request)
    if face.ready:
        return _answer("ready")
    return _answer(face.status, 503, {"retry-after": str(face.engine.retry_after_s)})


@router.get("/metrics")
@Operation({200: str}, quiet=True, scopes=("metrics",))
async def metrics(request: Request) -> Response:
    return Response(face_of(request).metrics.render(), headers={"content-type": CONTENT_TYPE})


@router.get("/metrics/adapters")
@Operation({200: str}, quiet=True, scopes=("metrics",))
async def adapter_metrics(request: Request) -> Response:
    """Figures of the adapters with the most traffic, and of all others together."""
    return Response(face_of(request).metrics.render_adapters(), headers={"content-type": CONTENT_TYPE})


def _answer(status: str, code: int = 200, headers: dict[str, str] | None = None) -> Response:
    body = msgspec.json.encode(Status(status))
    return Response(body, code, headers, media_type="application/json")
