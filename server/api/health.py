"""`/health`, `/health/live`, `/health/ready` and `/metrics`."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.face import Face, face_of
from server.telemetry.metrics import CONTENT_TYPE

router = APIRouter()

_DEAD_FACTOR = 3  # times watchdog_s without a sign of life: not only not ready, but not live


@router.get("/health/live")
async def live(request: Request) -> Response:
    """503 when only a restart of the whole server can help."""
    face = face_of(request)
    silence = time.monotonic() - face.engine.last_heartbeat
    hung = face.engine.state == "ready" and silence > _DEAD_FACTOR * face.settings.watchdog_s
    alive = face.engine.state != "failed" and not hung
    return JSONResponse({"status": "live" if alive else "dead"}, 200 if alive else 503)


@router.get("/health")
@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """200 when inference requests are taken."""
    face = face_of(request)
    if face.ready:
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": _reason(face)}, 503, {"retry-after": "1"})


def _reason(face: Face) -> str:
    if face.drain.draining:
        return "draining"
    if face.engine.state == "ready":
        return "starting" if face.registry is None else "unresponsive"
    return face.engine.state


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(face_of(request).metrics.render(), headers={"content-type": CONTENT_TYPE})
